"""How time and memory grow with N, C, D and K: four sweeps, and exponents fitted on log axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moso_fast.bench.cases import Case
from moso_fast.bench.inputs import make_inputs
from moso_fast.bench.measure import interleaved
from moso_fast.bench.memory import peak_bytes_in_child
from moso_fast.bench.providers import PROVIDERS
from moso_fast.bench.providers.ours import OURS

__all__ = ["AXES", "fit_exponent", "measure_growth"]

_BASE = Case("growth", "", "head", 100, 512, 0, 0)
_STACK = Case("growth", "", "heads", 10, 512, 0, 0)
# Axis -> (fixed sizes, rows, values). Eight times between the ends at least, so that the slope
# is that of the work and not of the fixed cost of a call.
AXES: dict[str, tuple[Case, int, tuple[int, ...]]] = {
    "N": (_BASE, 0, (1024, 2048, 4096, 8192, 16384, 32768)),
    "C": (_BASE, 4096, (2, 10, 50, 200, 1000, 4000)),
    "D": (_BASE, 8192, (64, 128, 256, 512, 1024, 2048)),
    "K": (_STACK, 8192, (1, 2, 4, 8, 16)),
}
_RIVAL = "chunks of 512"  # that takes every size of the sweeps
_ROUNDS = 7


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) against log(size), least squares.

    Raises
    ------
    ValueError
        Fewer than two different sizes, or a number that is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values):
        raise ValueError("an exponent needs values at two different sizes or more")
    if min(*sizes, *values) <= 0:
        raise ValueError("sizes and values must be positive to have logarithms")
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def measure_growth(
    axis: str,
    tick: Callable[[str], None] = lambda _: None,
    memory_limit: float = 20.0,
) -> dict[str, Any]:
    """Sweep one axis for our package and for plain PyTorch in chunks.

    Returns
    -------
    dict
        ``sizes``, and for each provider ``seconds``, ``peak_bytes`` and their exponents over the
        upper half of the sizes (memory: over those with more than a megabyte).
    """
    case, fixed_rows, sizes = AXES[axis]
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "peak_bytes": []} for name in (OURS, _RIVAL)
    }
    for size in sizes:
        tick(f"growth: {axis} = {size:,}")
        rows = size if axis == "N" else fixed_rows
        at = _at(case, axis, size)
        inputs = make_inputs(at, rows)
        jobs = {}
        for name in found:
            provider = next(p for p in PROVIDERS if p.name == name and p.takes(at))
            jobs[name] = provider.prepare(at, inputs)
            jobs[name]()
        times = interleaved(jobs, _ROUNDS)
        for name, entry in found.items():
            entry["seconds"].append(statistics.median(times[name].values()))
            if memory_limit:
                threads = torch.get_num_threads()
                peak, _ = peak_bytes_in_child(at, rows, name, threads, memory_limit)
                entry["peak_bytes"].append(peak)
    for entry in found.values():
        half = len(sizes) // 2
        entry["time_exponent"] = fit_exponent(sizes[half:], entry["seconds"][half:])
        large = [
            (s, p) for s, p in zip(sizes, entry["peak_bytes"], strict=False) if p and p > 2**20
        ]
        if len(large) > 2:
            entry["memory_exponent"] = fit_exponent(*zip(*large, strict=True))
    return {"sizes": list(sizes), "fixed": _fixed(case, axis, fixed_rows), "providers": found}


def _at(case: Case, axis: str, size: int) -> Case:
    if axis == "C":
        return replace(case, classes=size)
    if axis == "D":
        return replace(case, dim=size)
    if axis == "K":
        return replace(case, heads=size, kind="heads" if size > 1 else "head")
    return case


def _fixed(case: Case, axis: str, rows: int) -> dict[str, int]:
    sizes = {"N": rows, "C": case.classes, "D": case.dim, "K": case.heads}
    return {name: size for name, size in sizes.items() if name != axis}
