"""The source tree's ``benches`` on the path."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that plain `pytest` still tests the installed moso_fast.
sys.path.append(str(Path(__file__).resolve().parents[2]))
