"""What gpu_check.py says of its timings: rows for JSON, ratios, aims, and the table it prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gpu_timing
from gpu_roofline import Gpu
from gpu_timing import Contender

# What plain PyTorch is called at each precision.
_PLAIN = {"highest": "fp32", "high": "tf32", "medium": "bf16"}
# The package's aims, by (N, C, D) and dtype: per cent of the floor, ratios to plain PyTorch.
_MEMORY = (85.0, {"compile bf16": 1.3})
AIMS: dict[tuple[tuple[int, int, int], str], tuple[float, dict[str, float]]] = {
    ((1_280_000, 10, 512), "bfloat16"): _MEMORY,
    ((1_280_000, 10, 2048), "bfloat16"): _MEMORY,
    ((1_280_000, 100, 512), "bfloat16"): _MEMORY,
    ((1_280_000, 1000, 512), "bfloat16"): (80.0, {}),
    ((1_280_000, 1000, 2048), "bfloat16"): (80.0, {}),
    ((1_280_000, 10, 512), "float32"): (0.0, {"eager fp32": 2.5}),
    ((1_280_000, 10, 2048), "float32"): (0.0, {"eager fp32": 2.5}),
    ((1_280_000, 100, 512), "float32"): (0.0, {"eager fp32": 2.5}),
}
SMALL_JOB, SMALL_MILLISECONDS = (50_000, 10, 512), 0.1


def summary(
    shape: tuple[int, int, int],
    found: Sequence[Contender],
    roof: Mapping[str, float],
    model: Gpu | None,
) -> list[dict[str, Any]]:
    """Median, prediction, share of the floor, ratio to plain PyTorch of the same precision."""
    medians = {(c.name, c.precision): statistics.median(c.seconds) for c in found if c.seconds}
    rows = []
    for c in found:
        median = medians.get((c.name, c.precision))
        plain = [
            medians[name, c.precision]
            for name in ("eager", "compile")
            if (name, c.precision) in medians
        ]
        floor = gpu_timing.floor_seconds(shape, c, dict(roof))
        expected = gpu_timing.prediction(shape, c, model)
        rows.append(
            {
                "n": shape[0],
                "classes": shape[1],
                "dim": shape[2],
                "dtype": str(c.dtype).removeprefix("torch."),
                "precision": c.precision,
                "contender": c.name,
                "milliseconds": None if median is None else 1e3 * median,
                "all_milliseconds": [1e3 * s for s in c.seconds],
                "predicted_milliseconds": None if expected is None else 1e3 * expected,
                "times_predicted": median / expected if median and expected else None,
                "floor_milliseconds": 1e3 * floor,
                "percent_of_floor": None if median is None else 100 * floor / median,
                "times_best_plain": min(plain) / median if c.ours and median and plain else None,
                "peak_mib": None if c.peak_bytes is None else c.peak_bytes / 2**20,
                "relative_error": c.error if c.error == c.error else None,
                "joules": c.joules,
                "problem": c.problem or None,
            }
        )
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Write into every row of ours how many times as fast it is as each plain PyTorch."""
    plain: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["contender"] in ("eager", "compile") and row["milliseconds"] is not None:
            name = f"{row['contender']} {_PLAIN[row['precision']]}"
            plain.setdefault(_shape(row), {})[name] = row["milliseconds"]
    for row in rows:
        if row["contender"] not in ("eager", "compile") and row["milliseconds"] is not None:
            found = plain.get(_shape(row), {})
            row["times"] = {name: ms / row["milliseconds"] for name, ms in sorted(found.items())}


def _shape(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["n"], row["classes"], row["dim"]


def _ours(rows: Sequence[Mapping[str, Any]], shape: tuple[int, int, int], dtype: str) -> Any:
    """Rows of ours with a number, at the precision that the dtype has by default."""
    precision = "medium" if dtype == "bfloat16" else "highest"
    return [
        row
        for row in rows
        if _shape(row) == shape
        and (row["dtype"], row["precision"]) == (dtype, precision)
        and row["contender"] not in ("eager", "compile")
        and row["milliseconds"] is not None
    ]


def aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what each aim asks for and what the best of ours came to; None: not measured."""
    for (shape, dtype), (percent, asked) in AIMS.items():
        ours = _ours(rows, shape, dtype)
        best = min(ours, key=lambda row: row["milliseconds"], default=None)
        for what, least in {**({"% of floor": percent} if percent else {}), **asked}.items():
            found = None
            if best is not None:
                every = {**best.get("times", {}), "% of floor": best["percent_of_floor"]}
                found = every.get(what)
            yield _aim(
                shape, dtype, what, least, found, best, None if found is None else found >= least
            )
    graphs = [row for row in _ours(rows, SMALL_JOB, "bfloat16") if "graph" in row["contender"]]
    best = min(graphs, key=lambda row: row["milliseconds"], default=None)
    found = None if best is None else best["milliseconds"]
    met = None if found is None else found < SMALL_MILLISECONDS
    yield _aim(
        SMALL_JOB, "bfloat16", "ms in a graph, at most", SMALL_MILLISECONDS, found, best, met
    )


def _aim(
    shape: tuple[int, int, int],
    dtype: str,
    what: str,
    asked: float,
    found: float | None,
    best: Mapping[str, Any] | None,
    met: bool | None,
) -> dict[str, Any]:
    return {
        "row": f"{shape[0]},{shape[1]},{shape[2]} {dtype}",
        "what": what,
        "asked": asked,
        "found": found,
        "contender": None if best is None else best["contender"],
        "met": met,
    }


def print_aims(found: Sequence[Mapping[str, Any]]) -> None:
    """One line an aim."""
    for aim in found:
        value = "not measured" if aim["found"] is None else f"{aim['found']:.3g}"
        verdict = "" if aim["met"] is None else f", {'met' if aim['met'] else 'MISSED'}"
        who = f" ({aim['contender']})" if aim["contender"] else ""
        print(f"aim {aim['row']}: {aim['what']} {aim['asked']:g}: {value}{who}{verdict}")


def print_table(measured: dict[str, Any]) -> None:
    """One line a contender; a wrong result shows its error in place of a number."""
    roof = measured["ceilings"]
    tera = "  ".join(f"{name} {roof[name] / 1e12:.3g} TFLOP/s" for name in gpu_timing.OURS)
    print(f"\nceilings: read {roof['read'] / 1e9:.4g} GB/s  copy {roof['copy'] / 1e9:.4g}  {tera}")
    head = ("N, C, D", "dtype", "precision", "contender", "ms", "predicted", "x pred.", "% floor",
            "x best", "peak MiB", "J")  # fmt: skip
    print("{:>22} {:>9} {:>9} {:>18} {:>9} {:>9} {:>7} {:>8} {:>7} {:>9} {:>7}".format(*head))
    for row in measured["rows"]:
        line = (
            f"{row['n']},{row['classes']},{row['dim']}".rjust(22)
            + f" {row['dtype']:>9} {row['precision']:>9} {row['contender']:>18}"
        )
        if row["problem"]:
            print(f"{line}  {row['problem']}")
            continue
        if row["milliseconds"] is None:
            print(f"{line}  not timed: the time was up")
            continue
        print(
            f"{line} {row['milliseconds']:9.3f} {_cell(row['predicted_milliseconds'], 3):>9} "
            f"{_cell(row['times_predicted'], 2):>7} {row['percent_of_floor']:8.1f} "
            f"{_cell(row['times_best_plain'], 2):>7} {_cell(row['peak_mib'], 1):>9} "
            f"{_cell(row['joules'], 3):>7}"
        )


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_streamed(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each shape and number of crossings of the bus."""
    for row in rows:
        if "why" in row:
            print(f"features in main memory, {row['row']}: skipped, {row['why']}")
            continue
        what = f"{row['n']},{row['classes']},{row['dim']}, {row['crossings']} crossing(s)"
        shown = row["problem"] or (
            f"{row['milliseconds']:.2f} ms, {row['percent_of_floor']:.0f}% of a copy at "
            f"{row['gigabytes_per_second']:.1f} GB/s"
        )
        print(f"features in main memory, {what}: {shown}")
