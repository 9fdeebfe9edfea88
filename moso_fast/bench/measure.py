"""Interleaved timing, the ceilings of the machine measured in the same run, and floors."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Case

__all__ = [
    "ceilings",
    "floor_seconds",
    "interleaved",
    "medians",
    "plan_rounds",
    "quartiles",
    "timed",
]

_MATRIX = 1536
_READ_BYTES = 256 * 2**20
_CEILING_ROUNDS = 5
_PROBE = 256  # side of the product that tells whether the processor has units for 16 bits


def timed(job: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds of one call, and what it returned; waits for the GPU at both ends."""
    gpu = device != "cpu"
    if gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = job()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def plan_rounds(first: float, budget: float, least: int, most: int) -> int:
    """Return the rounds for a job that takes ``first`` seconds, so that all fit ``budget``."""
    return max(least, min(most, int(budget / max(first, 1e-9))))


def interleaved(
    jobs: Mapping[str, Callable[[], Any]],
    rounds: Mapping[str, int] | int,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
    warm_up: bool = False,
) -> dict[str, dict[int, float]]:
    """Seconds of every job by round; each round runs the jobs in turn, in an order of its own.

    In turn, so that a machine that is slow for a while is slow for all of them. The order is drawn
    anew (the same in every run), because a job is slower behind one that has emptied the caches or
    left the threads asleep: in one order for all rounds it would always be the same job. Jobs with
    fewer rounds than the most are spread evenly over them. ``warm_up`` runs each once before.
    """
    if warm_up:
        for job in jobs.values():
            job()
    wanted = {name: rounds if isinstance(rounds, int) else rounds[name] for name in jobs}
    most = max(wanted.values(), default=0)
    times: dict[str, dict[int, float]] = {name: {} for name in jobs}
    for number in range(most):
        for name in random.Random(number).sample(list(jobs), len(jobs)):
            count = wanted[name]
            if (number + 1) * count // most > number * count // most:
                times[name][number] = timed(jobs[name], device)[0]
        tick()
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; ValueError for no values."""
    if not values:
        raise ValueError("quartiles need at least one value")
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Bytes/s of reading and FLOP/s of square products: the fastest that PyTorch can be made to.

    ``flops`` counts float32 products, and ``bf16_flops`` those of bfloat16 where ``dtype`` has 16
    bits. A processor without units for them takes a hundred times as long: there a small product
    tells the rate.

    On a CPU the products go through ``torch.mm`` and through oneDNN's inner product, which differ
    by a factor of two on some processors; the better one counts, and ``torch.mm`` is kept beside
    it as ``mm_flops``.
    """
    data = torch.ones(_READ_BYTES // 4, device=device)
    matrix, vector = data.view(-1, 1024), torch.ones(1024, device=device)
    reads: dict[str, Callable[[], Any]] = {
        "sum": data.sum,
        "dot": partial(torch.dot, data, data),
        "mv": partial(torch.mv, matrix, vector),
    }
    work = 2 * _MATRIX**3
    found = {"read_bytes": _READ_BYTES / min(_medians(reads, device).values())}
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device) for _ in range(2))
    jobs: dict[str, Callable[[], Any]] = {"mm": partial(torch.mm, a, b)}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        product = torch.ops.aten.mkldnn_linear
        jobs["onednn"] = partial(product, a.to_mkldnn(), b.to_mkldnn())
    seconds = _medians(jobs, device)
    found |= {"flops": work / min(seconds.values()), "mm_flops": work / seconds["mm"]}
    if dtype.itemsize == 2:
        found["bf16_flops"] = rate = _narrow_rate(a[:_PROBE, :_PROBE], b[:_PROBE, :_PROBE], device)
        if rate > found["flops"] / 4:
            found["bf16_flops"] = _narrow_rate(a, b, device)
    return found


def _narrow_rate(a: Tensor, b: Tensor, device: str) -> float:
    jobs = {"mm": partial(torch.mm, a.bfloat16(), b.bfloat16())}
    return 2 * len(a) ** 3 / _medians(jobs, device)["mm"]


def medians(times: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Median seconds of every job that :func:`interleaved` has timed."""
    return {name: statistics.median(by_round.values()) for name, by_round in times.items()}


def _medians(jobs: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    return medians(interleaved(jobs, _CEILING_ROUNDS, device, warm_up=True))


def floor_seconds(case: Case, rows: int, roof: Mapping[str, float]) -> float | None:
    """Least time that the ceilings allow; None where no count of the work is known (networks).

    Two passes, each the longer of one read of the features and its products: two in the first
    pass, one in the second.
    """
    if not case.flops_a_row:
        return None
    rate = roof["flops"]
    if case.dtype.itemsize == 2:  # widened to float32 where that is faster
        rate = max(rate, roof["bf16_flops"])
    product = rows * case.flops_a_row / 3 / rate
    read = rows * case.bytes_a_row / roof["read_bytes"]
    return max(read, 2 * product) + max(read, product)
