"""The kernels of a job without the call around them: each pass by events, each kernel by name.

The passes of the backend run on buffers made beforehand, as the engine runs them, so that nothing
of the host's time is in the figures. Both together also run as a CUDA graph.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moso_fast.backends import get
from moso_fast.core import engine
from moso_fast.core.memory import make_plan, rows_at_a_time
from moso_fast.core.precision import own_precision
from moso_fast.core.problem import Problem, build_problem

from ..worker import described
from .timing import (
    GRAPH_MILLISECONDS,
    Clock,
    clock_rate,
    copy_rate,
    device,
    exact,
    forced,
    inputs,
    item_bytes,
    job_of,
    judge,
    ours,
    predictions,
    relative_error,
    rotating,
    warm_up,
)

ROUNDS = 11


class Passes:
    """Both passes of one backend over one set of inputs; ``backend`` may be "triton/REGIME"."""

    def __init__(self, contender: str, precision: str, data: list[Tensor]) -> None:
        name, _, regime = contender.partition("/")
        features, weight, labels, bias = data
        self.problem: Problem = build_problem(features, weight, labels, bias, precision=precision)
        self.rows = slice(0, self.problem.rows)
        self.out = engine._allocate(self.problem)
        plan = make_plan(self.problem, None)
        with forced(regime or None):
            self.passes = get(name).prepare(self.problem, plan)
        step = rows_at_a_time(self.problem, plan, self.passes)
        self.chunks = [
            slice(at, min(at + step, self.problem.rows)) for at in range(0, self.problem.rows, step)
        ]
        self.residuals: list[Tensor | None] = []
        dtype = self.problem.compute_dtype
        self.grad = torch.zeros(self.problem.weight.shape, dtype=dtype, device=features.device)
        self.bias_grad = torch.zeros(self.grad.shape[:2], dtype=dtype, device=features.device)
        self.alignment = torch.empty_like(self.out.loss)

    def first(self) -> None:
        """Every chunk's first pass; its sums are the mean gradient that the second one takes."""
        self.residuals = []
        for chunk in self.chunks:
            with own_precision(self.problem):
                part = self.passes.first(chunk, self.out)
            self.residuals.append(part.residual)
            self.grad.copy_(part.grad_sum)
            self.bias_grad.copy_(part.bias_grad_sum)

    def second(self) -> None:
        """Every chunk's second pass."""
        with own_precision(self.problem):
            self.passes.begin_second(self.grad, self.bias_grad)
            for chunk, residual in zip(self.chunks, self.residuals, strict=True):
                self.passes.second(chunk, self.out, residual, self.alignment[:, chunk])


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Time both passes of one contender on one job."""
    shape, dtype, precision = job_of(unit)
    where, contender = device(), unit["contender"]
    data = inputs(shape, dtype, where)
    error = relative_error(ours(contender, precision)(*data), exact(*data))
    emit(relative_error=error, item_bytes=item_bytes(dtype))
    judge(contender, precision, error)
    emit(**predictions(unit))
    clock = Clock(where)
    warm_up(where)
    emit(copy_before=copy_rate(where, clock), megahertz_before=clock_rate(where))
    jobs = [Passes(contender, precision, copy) for copy in rotating(data)]
    for job in jobs:
        job.first()
        job.second()
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    for index in range(ROUNDS if where.type == "cuda" else 2):
        job = jobs[index % len(jobs)]
        seconds["first"].append(clock.time(job.first, ahead=True))
        seconds["second"].append(clock.time(job.second, ahead=True))
    medians = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    emit(
        **{f"{name}_milliseconds": value for name, value in medians.items()},
        all_milliseconds={name: [1e3 * s for s in each] for name, each in seconds.items()},
    )
    if where.type == "cuda":
        emit(megahertz_after=clock_rate(where), copy_after=copy_rate(where, clock))
        # Captured, plain cuBLAS takes another way: it cannot look at the norms first.
        short = sum(medians.values()) <= GRAPH_MILLISECONDS
        if short and "triton/blas" not in unit["sources"]:
            _also(emit, "graph_milliseconds", lambda: 1e3 * in_a_graph(jobs, clock))
    # The last thing: a profiler stays attached to the process. PyTorch's own operations fill it.
    if where.type != "cuda" or contender != "torch":
        _also(emit, "kernels", lambda: by_name(jobs[0]))


def _also(emit: Callable[..., None], name: str, find: Callable[[], Any]) -> None:
    """Emit what may be had beside the times, or why not: they stand without it."""
    try:
        found = {name: find()}
    except Exception as error:
        found = {f"no {name}": described(error)}
    emit(**found)


def in_a_graph(jobs: list[Passes], clock: Clock) -> float:
    """Median seconds of both passes as one graph: no launch waits for the host."""
    graphs = []
    for job in jobs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            job.first()
            job.second()
        graphs.append(graph)
    times = [clock.time(graphs[index % len(graphs)].replay) for index in range(ROUNDS)]
    return statistics.median(times)


def by_name(job: Passes) -> list[dict[str, Any]]:
    """Device time of every kernel (operation, on a CPU) of one run, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    gpu = job.problem.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        job.first()
        job.second()
        if gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [(e.key, e.count, float(getattr(e, field))) for e in found.key_averages()]
    events.sort(key=lambda e: -e[2])
    return [
        {"kernel": name[:120], "launches": count, "microseconds": round(us, 1)}
        for name, count, us in events[:20]
        if us > 0
    ]
