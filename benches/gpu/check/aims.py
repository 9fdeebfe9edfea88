"""What the timings are held against: plain PyTorch of the same run, the floor, the aims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..table import Shape, floor_seconds
from .record import Result

# What plain PyTorch is called at each precision.
_PLAIN = {"highest": "fp32", "high": "tf32", "medium": "bf16"}
# Not ours: plain PyTorch, and other libraries' loss with its gradients.
PLAIN_NAMES = ("eager", "compile", "liger", "cut_cross_entropy")

# The package's aims, by (N, C, D) and dtype: per cent of the floor, ratios to plain PyTorch.
_MEMORY = (85.0, {"compile bf16": 1.3})
AIMS: dict[tuple[Shape, str], tuple[float, dict[str, float]]] = {
    ((1_280_000, 10, 512), "bfloat16"): _MEMORY,
    ((1_280_000, 10, 2048), "bfloat16"): _MEMORY,
    ((1_280_000, 100, 512), "bfloat16"): _MEMORY,
    ((1_280_000, 1000, 512), "bfloat16"): (80.0, {}),
    ((1_280_000, 1000, 2048), "bfloat16"): (80.0, {}),
    ((8192, 128_256, 4096), "bfloat16"): (75.0, {}),
    ((1_280_000, 10, 512), "float32"): (0.0, {"eager fp32": 2.5}),
    ((1_280_000, 10, 2048), "float32"): (0.0, {"eager fp32": 2.5}),
    ((1_280_000, 100, 512), "float32"): (0.0, {"eager fp32": 2.5}),
}
SMALL_JOB, SMALL_MILLISECONDS = (50_000, 10, 512), 0.1
_DEFAULT_PRECISION = {"bfloat16": "medium", "float32": "highest"}

Row = dict[str, Any]


def ceilings(results: Iterable[Result]) -> dict[str, float]:
    """Bytes/s and FLOP/s that were measured, by name."""
    return {
        name: value
        for result in results
        if result.done
        for name, value in result.data.items()
        if isinstance(value, float) and value > 0
    }


def rows(
    results: Iterable[Result], units: Mapping[str, Any], roof: Mapping[str, float]
) -> dict[str, Row]:
    """Return one row a job and contender that was done, by unit, with its floor and its ratios.

    ``units`` are the planned ones by key. Without all ceilings there is no floor.
    """
    by_unit = {
        result.unit: _row(result, units[result.unit], roof)
        for result in results
        if result.done and "milliseconds" in result.data and result.unit in units
    }
    found = by_unit.values()
    plain: dict[Shape, dict[str, float]] = {}
    for row in found:
        if row["contender"] in PLAIN_NAMES:
            name = f"{row['contender']} {_PLAIN[row['precision']]}"
            plain.setdefault(row["shape"], {})[name] = row["milliseconds"]
    for row in found:
        if row["contender"] not in PLAIN_NAMES:
            others = plain.get(row["shape"], {})
            row["times"] = {name: ms / row["milliseconds"] for name, ms in sorted(others.items())}
    return by_unit


def _row(result: Result, unit: Mapping[str, Any], roof: Mapping[str, float]) -> Row:
    shape: Shape = tuple(unit["shape"])
    floor = None
    if "item_bytes" in result.data and {"read", "copy", unit["precision"]} <= roof.keys():
        floor = 1e3 * floor_seconds(shape, result.data["item_bytes"], unit["precision"], roof)
    milliseconds = result.data["milliseconds"]
    return {
        "shape": shape,
        "dtype": unit["dtype"],
        "precision": unit["precision"],
        "contender": unit["contender"],
        "milliseconds": milliseconds,
        "graph_milliseconds": result.data.get("graph_milliseconds"),
        "floor_milliseconds": floor,
        "percent_of_floor": None if floor is None else 100 * floor / milliseconds,
    }


def aims(found: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield what each aim asks for and what the best of ours came to; None: not measured."""
    ours = [row for row in found if row["contender"] not in PLAIN_NAMES]
    for (shape, dtype), (percent, asked) in AIMS.items():
        best = _best(ours, shape, dtype, "milliseconds")
        for what, least in {**({"% of floor": percent} if percent else {}), **asked}.items():
            value = None
            if best is not None:
                value = {**best["times"], "% of floor": best["percent_of_floor"]}.get(what)
            met = None if value is None else value >= least
            yield _aim(shape, dtype, what, least, value, best, met)
    best = _best(ours, SMALL_JOB, "bfloat16", "graph_milliseconds")
    value = None if best is None else best["graph_milliseconds"]
    met = None if value is None else value < SMALL_MILLISECONDS
    what = "ms in a graph, at most"
    yield _aim(SMALL_JOB, "bfloat16", what, SMALL_MILLISECONDS, value, best, met)


def _best(ours: Iterable[Row], shape: Shape, dtype: str, key: str) -> Row | None:
    """Return the quickest of ours on a job, at the precision that the dtype has by default."""
    asked = (shape, dtype, _DEFAULT_PRECISION[dtype])
    found = [
        row
        for row in ours
        if (row["shape"], row["dtype"], row["precision"]) == asked and row[key] is not None
    ]
    return min(found, key=lambda row: row[key], default=None)


def _aim(
    shape: Shape,
    dtype: str,
    what: str,
    asked: float,
    value: float | None,
    best: Row | None,
    met: bool | None,
) -> dict[str, Any]:
    return {
        "row": f"{','.join(map(str, shape))} {dtype}",
        "what": what,
        "asked": asked,
        "found": value,
        "contender": None if best is None else best["contender"],
        "met": met,
    }
