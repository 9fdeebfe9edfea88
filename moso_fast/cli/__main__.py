"""``python -m moso_fast.cli`` is ``moso-fast``."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
