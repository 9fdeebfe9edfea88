"""``moso-fast bench``: moso_fast beside plain PyTorch on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import Json, Quiet
from .bench_output import caption_bar, emit, print_cases, print_registry

_AGAINST = ("plain", "peers")


def bench(
    profile: Annotated[
        str, typer.Option(help="small: under three minutes on two cores; full: the whole sizes.")
    ] = "small",
    case: Annotated[
        list[str] | None, typer.Option(help="Only these cases; * and ? match, repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results. [default: benches/results/MACHINE in a source tree, "
            "else moso_fast_bench/MACHINE]",
            metavar="FOLDER",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    measure: Annotated[
        str,
        typer.Option(
            help="all, time, or memory (adds it to the times that the folder holds already)."
        ),
    ] = "all",
    list_cases: Annotated[bool, typer.Option("--list", help="List cases and providers.")] = False,
    against: Annotated[str, typer.Option(hidden=True)] = "plain",
    growth: Annotated[bool, typer.Option("--growth", hidden=True)] = False,
    charts: Annotated[bool | None, typer.Option(hidden=True)] = None,
    draw: Annotated[Path | None, typer.Option(hidden=True)] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(hidden=True)] = None,
    gate: Annotated[Path | None, typer.Option(hidden=True)] = None,
    write_gate: Annotated[bool, typer.Option("--write-gate", hidden=True)] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time moso_fast beside plain PyTorch, check every result against float64, keep the numbers.

    Writes PROFILE.json into the folder, adding to the cases that it holds already: several short
    runs fill one file. The exit code is 1 where a result of moso_fast was wrong. In a source tree,
    `python -m benches --help` has more: other libraries, charts, comparisons, a gate.
    """
    from ..bench.cases import PROFILES
    from ..bench.session import MEASURES

    if profile not in PROFILES:
        raise ValueError(f"--profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    if against not in _AGAINST:
        raise ValueError(f"--against must be one of {', '.join(_AGAINST)}; got {against!r}")
    if measure not in MEASURES:
        raise ValueError(f"--measure must be one of {', '.join(MEASURES)}; got {measure!r}")
    moved = {
        "--against peers": (against == "peers", "run --against peers"),
        "--growth": (growth, "run --growth"),
        "--charts": (charts is True, "run"),
        "--draw": (draw is not None, f"page {draw}"),
        "--compare": (compare is not None, f"compare {' '.join(map(str, compare or ()))}"),
        "--write-gate": (write_gate, f"gate {gate or 'FILE'} --write"),
        "--gate": (gate is not None, f"gate {gate}"),
    }
    for option, (given, command) in moved.items():
        if given:
            raise ValueError(
                f"{option} is not in the installed package; in a source tree of moso_fast run: "
                f"python -m benches {command}"
            )
    if list_cases:
        print_registry(profile)
    else:
        _measure(profile, case, out, threads, device, measure, json, quiet)


def _measure(
    profile: str,
    patterns: list[str] | None,
    out: Path | None,
    threads: int | None,
    device: str,
    measure: str,
    as_json: bool,
    quiet: bool,
) -> None:
    from ..bench import session, store
    from ..bench.cases import select_cases

    session.check_device(device)
    cases = select_cases(patterns)
    with (
        session.given_threads(threads),
        caption_bar("benchmarks", len(cases), shown=not quiet) as (tick, advance),
    ):
        path = session.results_path(out, profile, device)
        running = session.Session(path, profile, device, measure, tick=tick)
        running.check(cases)
        for case in cases:
            running.measure(case)
            advance()
    kept = store.load(path)["cases"]
    now = {case.name: kept[case.name] for case in cases}
    if as_json:
        emit({"wrote": [str(path)], "cases": now}, as_json=True, quiet=quiet)
    elif not quiet:
        print_cases(now, running.machine)
        print(f"wrote {path}; charts and a page, in a source tree: python -m benches page {path}")
    wrong = session.wrong_results(now)
    if wrong:
        raise RuntimeError("; ".join(wrong))
