"""Whole calls, as a user makes them: events around the call, the host's time, memory, energy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moso_fast.bench.energy import gpu_energy_counter, joules_per_call
from moso_fast.core import memory

from ...table import OURS
from ..worker import Skipped, Wrong
from .timing import (
    GRAPH_MILLISECONDS,
    PLAIN_NAMES,
    Clock,
    Graphed,
    Run,
    clock_rate,
    copy_rate,
    device,
    exact,
    inputs,
    item_bytes,
    job_of,
    judge,
    matmul_precision,
    ours,
    plain,
    predictions,
    relative_error,
    rotating,
    warm_up,
)

ROUNDS, DRY_ROUNDS = 9, 2
STREAMED = "streamed"
GRAPHED = ("triton", "cuda")  # contenders that are timed in a CUDA graph too


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Time one contender on one job."""
    if unit["contender"] == STREAMED:
        streamed(unit, emit)
        return
    shape, dtype, precision = job_of(unit)
    where, name = device(), unit["contender"]
    call: Run = plain(name) if name in PLAIN_NAMES else ours(name, precision)
    clock, gpu = Clock(where), where.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()  # what the process has kept of its last unit
    data = inputs(shape, dtype, where)
    emit(item_bytes=item_bytes(dtype))
    emit(**predictions(unit))
    with matmul_precision(precision):
        error, peak = _checked(call, data, gpu)
        emit(relative_error=error, peak_bytes=peak)
        judge(name, precision, error)
        warm_up(where)
        emit(copy_before=copy_rate(where, clock), megahertz_before=clock_rate(where))
        copies = rotating(data)
        seconds = [
            clock.time(lambda i=i: call(*copies[i % len(copies)]))
            for i in range(ROUNDS if gpu else DRY_ROUNDS)
        ]
        milliseconds = 1e3 * statistics.median(seconds)
        emit(milliseconds=milliseconds, all_milliseconds=[1e3 * s for s in seconds])
        emit(host_milliseconds=1e3 * _host_seconds(call, data, gpu))
        if not gpu:
            return
        emit(copy_after=copy_rate(where, clock), megahertz_after=clock_rate(where))
        if name in GRAPHED and milliseconds <= GRAPH_MILLISECONDS:
            graph = Graphed(call)
            for copy in copies:
                graph(*copy)  # captures
            judge(name, precision, relative_error(graph(*data), exact(*data)))
            times = [clock.time(lambda i=i: graph(*copies[i % len(copies)])) for i in range(ROUNDS)]
            emit(graph_milliseconds=1e3 * statistics.median(times))
        if unit.get("energy"):
            _energy(call, data, emit)


def _checked(call: Run, data: list[Tensor], gpu: bool) -> tuple[float, int | None]:
    """Compile, then run once for the peak of memory and the comparison with float64."""
    call(*data)
    if not gpu:
        return relative_error(call(*data), exact(*data)), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(*data)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return relative_error(result, exact(*data)), peak


def _host_seconds(call: Run, data: list[Tensor], gpu: bool) -> float:
    """Median wall-clock seconds of a call to its last result, as the caller waits for it."""
    seconds = []
    for _ in range(ROUNDS if gpu else DRY_ROUNDS):
        start = time.perf_counter()
        call(*data)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _energy(call: Run, data: list[Tensor], emit: Callable[..., None]) -> None:
    """Energy of one call, where the GPU counts it; inputs may lie in the cache."""
    counter = gpu_energy_counter(str(data[0].device))
    if counter is not None:
        emit(joules=joules_per_call(lambda: call(*data), counter, torch.cuda.synchronize))


def streamed(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Time scoring of page-locked features in main memory beside one copy of them.

    With all of them kept on the device for the second pass, or with none: the bus is crossed once
    or twice. The floor is that many copies at the rate measured here.
    """
    where = device()
    if where.type != "cuda":
        raise Skipped("no CUDA device")
    shape, dtype, precision = job_of(unit)
    clock, call = Clock(where), ours("triton", precision)
    data = inputs(shape, dtype, where)
    truth = exact(*data)
    host = data[0].cpu().pin_memory()
    copy = clock.median(lambda: data[0].copy_(host, non_blocking=True))
    emit(bus_bytes_a_second=host.nbytes / copy)
    data = [host, *data[1:]]
    crossings = unit["crossings"]
    budget = 2**62 if crossings == 1 else 0
    before = memory.resident_budget
    memory.resident_budget = lambda *given: budget
    try:
        error = relative_error(call(*data), truth)
        emit(relative_error=error)
        if not error <= OURS[precision]:
            raise Wrong(f"relative error {error:.2g}")
        seconds = [clock.time(lambda: call(*data)) for _ in range(ROUNDS)]
    finally:
        memory.resident_budget = before
    emit(
        milliseconds=1e3 * statistics.median(seconds),
        floor_milliseconds=1e3 * crossings * copy,
        all_milliseconds=[1e3 * s for s in seconds],
    )
