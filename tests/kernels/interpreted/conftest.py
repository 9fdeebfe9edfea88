"""Tests in this folder run Triton kernels in its interpreter, in a process of their own.

``TRITON_INTERPRET=1`` must be set before a kernel's module is imported, and then no kernel can be
compiled: the tests one folder up start these in a child process (interpreter.py). By hand:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
