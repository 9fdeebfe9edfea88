"""``python -m benches COMMAND`` at the root of the source tree; each has ``--help``.

    run        what `moso-fast bench` does, and other libraries, growth, charts and a page
    page       draw the charts and write the page of a results file
    compare    whether a second run reproduces the ratios of the first
    gate       hold instruction counts, calls and ratios against a file, or write it

More, each by itself: python -m benches.gpu (all that needs a GPU), python benches/readme.py (the
README's numbers), python benches/triton_resources.py, pytest benches/suites --benchmark-enable.

Exit codes: 0 done, 1 a finding (a wrong result, a regression), 2 bad arguments or files.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "benches.run",
    "page": "benches.charts.page",
    "compare": "benches.compare",
    "gate": "benches.gate.command",
}


def main() -> int:
    """Hand the arguments to the command; return its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(__doc__, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    return int(importlib.import_module(COMMANDS[name]).main(arguments))


if __name__ == "__main__":
    sys.exit(main())
