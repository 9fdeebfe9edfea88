"""Hold instruction counts, calls and ratios against a file; exit code 1 where one is worse.

    python -m benches gate benches/results/gate.json
    python -m benches gate benches/results/gate.json --write     measure and write the file

Write it where a change is meant to cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moso_fast.cli.bench_output import caption_bar, emit, print_table

from ..arguments import bad_input, parser
from . import gate

COLUMNS = ("number", "measured", "bound", "", "")


def main(arguments: Sequence[str]) -> int:
    """Check, or measure and write."""
    made = parser("gate", __doc__)
    made.add_argument("file", type=Path, metavar="FILE")
    made.add_argument("--write", action="store_true", help="measure and write the file")
    options = made.parse_args(arguments)
    shown = {"as_json": options.json, "quiet": options.quiet}
    with caption_bar("gate", None, shown=not options.quiet) as (tick, _):
        if options.write:
            found = gate.measure(tick)
            gate.write(options.file, found)
            emit({"wrote": str(options.file), **found}, **shown)
            return 0
        with bad_input():
            held = gate.read(options.file)
        findings, skipped = gate.check(held, tick)
    passed = all(finding.passed for finding in findings)
    if options.json:
        rows = [vars(finding) for finding in findings]
        emit({"passed": passed, "skipped": skipped, "findings": rows}, **shown)
    elif not options.quiet:
        print_table(COLUMNS, [_cells(finding) for finding in findings])
        for line in skipped:
            print(f"skipped {line}")
    return 0 if passed else 1


def _cells(found: gate.Finding) -> list[object]:
    verdict = "ok" if found.passed else "WORSE"
    return [found.name, float(found.measured), float(found.bound), verdict, found.why]
