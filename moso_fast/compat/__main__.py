"""``python -m moso_fast.compat``."""

from .script import main

raise SystemExit(main())
