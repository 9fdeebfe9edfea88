"""``moso-fast bench``: moso_fast beside plain PyTorch and other libraries on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._bench_output import print_cases, print_registry
from ._common import Json, Quiet, caption_bar, emit, print_table

_AGAINST = ("plain", "peers")
_MEASURES = ("all", "time", "memory")
_COMPARE_COLUMNS = ("case", "provider", "ratio A", "ratio B", "change", "spread in a run")


def bench(
    profile: Annotated[
        str, typer.Option(help="small: under three minutes on two cores; full: the whole sizes.")
    ] = "small",
    case: Annotated[
        list[str] | None, typer.Option(help="Only these cases; * and ? match, repeatable.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="plain: PyTorch alone; peers: also the libraries installed here.")
    ] = "plain",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for JSON, charts and page. [default: benches/results/MACHINE in a "
            "checkout, else moso_fast_bench/MACHINE]",
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
    growth: Annotated[
        bool, typer.Option("--growth", help="Also how time and memory grow with N, C, D and K.")
    ] = False,
    charts: Annotated[
        bool, typer.Option(help="Draw charts and page after measuring; --draw does it later.")
    ] = True,
    list_cases: Annotated[bool, typer.Option("--list", help="List cases and providers.")] = False,
    draw: Annotated[
        Path | None,
        typer.Option(help="Only draw the charts and the page of these results.", metavar="FILE"),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare the ratios of two results.", metavar="A.json B.json"),
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(
            help="Hold instruction counts and ratios against this file; exit code 1 if worse.",
            metavar="FILE",
        ),
    ] = None,
    write_gate: Annotated[
        bool, typer.Option("--write-gate", help="With --gate: measure and write the file.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time moso_fast beside plain PyTorch, check every result against float64, keep the numbers.

    Writes PROFILE.json, charts and PROFILE.html into the folder, adding to the cases that
    PROFILE.json holds already: several short runs fill one file. The exit code is 1 where a
    result of moso_fast was wrong.
    """
    from ..bench.cases import PROFILES

    if profile not in PROFILES:
        raise ValueError(f"--profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    if against not in _AGAINST:
        raise ValueError(f"--against must be one of {', '.join(_AGAINST)}; got {against!r}")
    if measure not in _MEASURES:
        raise ValueError(f"--measure must be one of {', '.join(_MEASURES)}; got {measure!r}")
    if write_gate and gate is None:
        raise ValueError("--write-gate needs --gate FILE")
    if list_cases:
        print_registry(profile)
    elif compare is not None:
        _compare(*compare, as_json=json, quiet=quiet)
    elif draw is not None:
        emit({"wrote": _draw(draw)}, as_json=json, quiet=quiet)
    elif gate is not None:
        _gate(gate, write_gate, json, quiet)
    else:
        _measure(
            profile,
            case,
            against == "peers",
            out,
            threads,
            device,
            measure,
            growth,
            charts,
            json,
            quiet,
        )


def _measure(
    profile: str,
    patterns: list[str] | None,
    peers: bool,
    out: Path | None,
    threads: int | None,
    device: str,
    measure: str,
    growth: bool,
    charts: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    import torch

    from ..bench import facts, store
    from ..bench.cases import select_cases
    from ..bench.growth import AXES, measure_growth
    from ..bench.runner import Settings, add_memory, measure_case

    _check_device(device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        cases = [] if growth and not patterns else select_cases(patterns)
        machine = facts.machine(device)
        path = (out or _folder(facts.machine_name(machine))) / f"{profile}.json"
        options: dict[str, Any] = {"memory_limit": 0.0} if measure == "time" else {}
        settings = Settings.of_profile(profile, device=device, peers=peers, **options)
        results: dict[str, Any] = {"schema": store.SCHEMA, "profile": profile, "machine": machine}
        total = len(cases) + len(AXES) * growth
        with caption_bar("benchmarks", total, shown=not quiet) as (tick, advance):
            for case in cases:
                if measure == "memory":
                    record = _timed_before(path, case.name)
                    add_memory(case, record, settings, tick)
                else:
                    record = measure_case(case, settings, tick=tick)
                _keep(results, {"cases": {case.name: record}}, path)
                advance()
            for axis in AXES if growth else ():
                sweep = measure_growth(axis, tick, settings.memory_limit)
                _keep(results, {"cases": {}, "growth": {axis: sweep}}, path)
                advance()
    finally:
        torch.set_num_threads(before)
    kept = store.load(path)
    # Growth alone has no case to draw yet; the run that adds cases draws both.
    written = [str(path), *(_draw(path) if charts and kept["cases"] else ())]
    now = {case.name: kept["cases"][case.name] for case in cases}
    if as_json:
        emit({"wrote": written, "cases": now}, as_json=True, quiet=quiet)
    elif not quiet:
        print_cases(now, machine)
        print("wrote " + ", ".join(written))
    wrong = [
        f"{name}, {row['provider']}: {row['problem']}"
        for name, record in now.items()
        for row in record["rows"]
        if row["family"] == "ours" and row["problem"]
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _keep(results: dict[str, Any], part: dict[str, Any], path: Path) -> None:
    """Add to the file at once: what was measured survives an interruption."""
    from ..bench import store

    old = store.load(path) if path.exists() else None
    store.save(store.merge(old, {**results, **part}, path), path)


def _timed_before(path: Path, case: str) -> dict[str, Any]:
    from ..bench import store

    record = store.load(path)["cases"].get(case) if path.exists() else None
    if record is None:
        raise ValueError(
            f"--measure memory: {path} has no times of {case}; measure all or time first"
        )
    return record


def _folder(machine: str) -> Path:
    checkout = Path("benches", "results")
    return (checkout if checkout.is_dir() else Path("moso_fast_bench")) / machine


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here")


def _draw(path: Path) -> list[str]:
    """Charts and page beside the results; without matplotlib the page alone."""
    from importlib.util import find_spec

    from ..bench import page, store

    results = store.load(path)
    charts: list[Path] = []
    if find_spec("matplotlib") is not None:
        from ..bench.charts import draw_all

        charts = draw_all(results, path.parent)
    html = page.write_page(results, charts, path.with_suffix(".html"))
    return [str(written) for written in (*charts, html)]


def _compare(a: Path, b: Path, *, as_json: bool, quiet: bool) -> None:
    from ..bench import store
    from ..bench.compare import compare, verdict

    rows = compare(store.load(a), store.load(b))
    agreed, text = verdict(rows)
    if as_json:
        emit({"agreed": agreed, "verdict": text, "rows": rows}, as_json=True, quiet=quiet)
        return
    if not quiet:
        print_table(
            _COMPARE_COLUMNS,
            [
                [
                    r["case"],
                    r["provider"],
                    r["a"],
                    r["b"],
                    f"{r['change']:+.0%}",
                    f"{r['noise']:.0%}",
                ]
                for r in rows
            ],
        )
    print(text)


def _gate(path: Path, write: bool, as_json: bool, quiet: bool) -> None:
    from ..bench import gate

    with caption_bar("gate", None, shown=not quiet) as (tick, _):
        if write:
            found = gate.measure(tick)
            gate.write(path, found)
            emit({"wrote": str(path), **found}, as_json=as_json, quiet=quiet)
            return
        findings, skipped = gate.check(path, tick)
    facts = {"passed": all(f.passed for f in findings), "skipped": skipped}
    if as_json:
        emit({**facts, "findings": [vars(f) for f in findings]}, as_json=True, quiet=quiet)
    elif not quiet:
        columns = ("number", "measured", "bound", "", "")
        rows = [
            [f.name, float(f.measured), float(f.bound), "ok" if f.passed else "WORSE", f.why]
            for f in findings
        ]
        print_table(columns, rows)
        for line in skipped:
            print(f"skipped {line}")
    if not facts["passed"]:
        raise typer.Exit(1)
