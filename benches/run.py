"""Time moso_fast beside plain PyTorch and other libraries, check every result, keep the numbers.

What `moso-fast bench` does, and more: --against peers adds the libraries that are installed here
(`make bench-peers` makes an environment for them), --growth sweeps sizes, and charts and a page
are drawn at the end. Writes PROFILE.json, PROFILE_*.png and PROFILE.html into the folder, adding
to the cases that PROFILE.json holds already: several short runs fill one file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moso_fast.bench import session, store
from moso_fast.bench.cases import PROFILES, select_cases
from moso_fast.cli.bench_output import caption_bar, emit, print_cases, print_registry

from .arguments import bad_input, parser
from .charts.page import draw
from .growth import AXES, measure_growth

REGISTRIES = {"plain": "moso_fast.bench.providers", "peers": "benches.peers"}


def main(arguments: Sequence[str]) -> int:
    """Measure, save, draw; return the exit code."""
    options = _parser().parse_args(arguments)
    registry = REGISTRIES[options.against]
    if options.list_cases:
        print_registry(options.profile, "benches.peers")
        return 0
    with bad_input():
        session.check_device(options.device)
        cases = [] if options.growth and not options.case else select_cases(options.case)
    sweeps = AXES if options.growth else {}
    with (
        session.given_threads(options.threads),
        caption_bar("benchmarks", len(cases) + len(sweeps), shown=not options.quiet) as bar,
    ):
        tick, advance = bar
        path = session.results_path(options.out, options.profile, options.device)
        with bad_input():
            running = session.Session(
                path, options.profile, options.device, options.measure, registry, tick
            )
            running.check(cases)
        for case in cases:
            running.measure(case)
            advance()
        for axis in sweeps:
            sweep = measure_growth(axis, tick, running.settings.memory_limit)
            running.keep({"cases": {}, "growth": {axis: sweep}})
            advance()
    kept = store.load(path)
    # Growth alone has no case to draw yet; the run that adds cases draws both.
    written = [str(path), *(draw(path) if options.charts and kept["cases"] else ())]
    now = {case.name: kept["cases"][case.name] for case in cases}
    if options.json:
        emit({"wrote": written, "cases": now}, as_json=True, quiet=options.quiet)
    elif not options.quiet:
        print_cases(now, running.machine)
        print("wrote " + ", ".join(written))
    wrong = session.wrong_results(now)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    made = parser("run", __doc__)
    made.add_argument("--profile", choices=PROFILES, default="small")
    made.add_argument("--case", action="append", help="only these; * and ? match, repeatable")
    made.add_argument(
        "--against", choices=REGISTRIES, default="plain", help="PyTorch alone, or libraries too"
    )
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default: benches/results/MACHINE")
    made.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    made.add_argument(
        "--measure",
        choices=session.MEASURES,
        default="all",
        help="memory: adds it to the times that the folder holds already",
    )
    made.add_argument(
        "--growth", action="store_true", help="also how time and memory grow with N, C, D and K"
    )
    made.add_argument(
        "--charts", action=argparse.BooleanOptionalAction, default=True, help="draw at the end"
    )
    made.add_argument("--list", dest="list_cases", action="store_true", help="list the cases")
    return made
