"""Interleaved timing, and the ceilings of the machine measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in each round; all run once before, then in turn each round.

    In turn, so that a machine that is slow for a while is slow for all of them.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of every list."""
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(size: int = 2048, rounds: int = 7, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square ``torch.mm`` on the CPU, median."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = medians(interleaved({"mm": lambda: a @ b}, rounds))["mm"]
    return 2 * size**3 / seconds


def read_bandwidth(megabytes: int = 256, rounds: int = 7) -> float:
    """Bytes/s of summing a float32 array larger than the caches, median."""
    data = torch.ones(megabytes * 2**18)
    seconds = medians(interleaved({"sum": data.sum}, rounds))["sum"]
    return data.numel() * 4 / seconds
