"""How a job on a GPU is timed and checked: one contender, its inputs, the truth, a clock.

Conditions: the GPU warm; device events around each call, for kernels behind a pause in which the
host launches them, for whole calls with what the host takes; inputs rotate among copies larger
together than the L2 cache; medians. A result is compared with float64 first, and a wrong one gets
no number. Plain PyTorch is the closed form over all rows at once (``naive`` of
moso_fast/bench/providers/plain.py), eager and compiled.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moso_fast.backends import _PREFERENCE, backends, get
from moso_fast.backends.triton.choice import REGIME_VARIABLE, REGIMES
from moso_fast.backends.triton.regime import Regime
from moso_fast.bench.providers.plain import naive
from moso_fast.core.memory import make_plan
from moso_fast.core.problem import Problem
from moso_fast.functional import last_layer_stats

from ...outline import outline
from ...table import ITEM_BYTES, OURS, PLAIN, Shape
from ..worker import Skipped, Wrong

Scores = tuple[Tensor, Tensor, Tensor]  # loss, alignment, squared norms
Run = Callable[..., Scores]

PLAIN_NAMES = ("eager", "compile")
_FRACTION_OF_MEMORY = 0.8
GRAPH_MILLISECONDS = 5.0  # up to here launches and waits may be what a job takes
PAUSE_CYCLES = 5_000_000  # two to three milliseconds
_WARM_SECONDS = 0.2


def device() -> torch.device:
    """Return the GPU, or the CPU for a dry run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str) -> torch.dtype:
    """Return ``torch.bfloat16`` for "bfloat16" and so on."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


# --- contenders


def contenders(shape: Shape, dtype: str, precision: str, where: torch.device) -> Iterator[str]:
    """Names of the ways of ours that run this job: backends, and the regimes of Triton.

    "triton" is the regime that its table chooses; the others that fit follow as triton/NAME.
    """
    problem = outline(shape, dtype_of(dtype), precision, where)
    for name in _PREFERENCE[where.type]:
        if not backends()[name].available or get(name).supports(problem) is not None:
            continue
        yield name
        if name == "triton":
            chosen = chosen_regime(problem)
            yield from (
                f"triton/{r}" for r in REGIMES if r != chosen and REGIMES[r].fits(problem) is None
            )


def chosen_regime(problem: Problem) -> str:
    """Return the regime that the Triton backend takes for a problem."""
    passes = get("triton").prepare(problem, make_plan(problem, None))
    assert isinstance(passes, Regime)
    return passes.name


def sources(contender: str, shape: Shape, dtype: str, precision: str, where: torch.device) -> str:
    """Return what of sources.py stands for a contender: its regime, its backend, or "plain"."""
    if contender in PLAIN_NAMES:
        return "plain"
    if contender == "triton":
        regime = chosen_regime(outline(shape, dtype_of(dtype), precision, where))
        return f"triton/{regime}"
    return contender


@contextmanager
def forced(regime: str | None) -> Iterator[None]:
    """Force a regime of the Triton backend for a while; None: leave the choice to it."""
    before = os.environ.get(REGIME_VARIABLE)
    if regime:
        os.environ[REGIME_VARIABLE] = regime
    try:
        yield
    finally:
        if regime:
            os.environ.pop(REGIME_VARIABLE)
            if before is not None:
                os.environ[REGIME_VARIABLE] = before


def ours(contender: str, precision: str) -> Run:
    """Return the call of a backend, or of a regime of Triton ("triton/NAME")."""
    backend, _, regime = contender.partition("/")

    def run(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
        with forced(regime):
            stats = last_layer_stats(
                features, weight, labels, bias, backend=backend, precision=precision
            )
        return stats.loss, stats.alignment, stats.grad_sqnorm

    return run


def plain(contender: str) -> Run:
    """Return the closed form in plain PyTorch, eager or compiled."""
    if contender == "eager":
        return naive
    # Without a GPU the numbers mean nothing, and calling a C++ compiler for them takes a minute.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(naive, backend=backend)


class Graphed:
    """Runs as a CUDA graph, captured at the first call with each set of tensors."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Scores]] = {}

    def __call__(self, *data: Tensor) -> Scores:
        """Replay; the results of the call before on the same tensors are overwritten."""
        key = data[0].data_ptr()
        if key not in self._graphs:
            self._run(*data)  # compiles and loads the kernels, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self._run(*data)
            self._graphs[key] = graph, result
        graph, result = self._graphs[key]
        graph.replay()
        return result


# --- inputs and truth


def inputs(shape: Shape, dtype: torch.dtype, where: torch.device) -> list[Tensor]:
    """Features (N, D) with classes that a head can tell apart, the head, labels, bias."""
    n, c, d = shape
    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0] * _FRACTION_OF_MEMORY
        if 1.5 * n * d * dtype.itemsize > free:
            raise Skipped("the features do not fit in the memory of the device")
    g = torch.Generator(device=where).manual_seed(0)
    features = torch.empty(n, d, dtype=dtype, device=where)
    for part in features.split(2**16):
        part.copy_(torch.randn(part.shape, generator=g, device=where))
    weight = (torch.randn(c, d, generator=g, device=where) * (2.5 / d**0.5)).to(dtype)
    labels = torch.randint(c, (n,), generator=g, device=where)
    bias = torch.randn(c, generator=g, device=where).to(dtype)
    return [features, weight, labels, bias]


def rotating(data: list[Tensor]) -> list[list[Tensor]]:
    """Return copies of the inputs, together larger than the L2 cache."""
    copies = [data]
    if data[0].is_cuda:
        cache = 4 * torch.cuda.get_device_properties(data[0].device).L2_cache_size
        while len(copies) * data[0].nbytes < cache:
            copies.append([t.clone() for t in data])
    return copies


def exact(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Alignment and norms in float64, in chunks: independent of the package."""
    n, dim = h.shape
    w, b = w.double(), b.double()
    step = max(1, 2**26 // (w.shape[0] + dim))
    grad, bias_grad = torch.zeros_like(w), torch.zeros_like(b)
    alignment, norms = (torch.empty(n, dtype=torch.float64, device=h.device) for _ in range(2))

    def residual(rows: slice) -> tuple[Tensor, Tensor]:
        x = h[rows].double()
        z = F.linear(x, w, b)
        return x, z.softmax(1) - F.one_hot(y[rows], w.shape[0])

    chunks = [slice(at, at + step) for at in range(0, n, step)]
    for rows in chunks:
        x, r = residual(rows)
        grad += r.T @ x / n
        bias_grad += r.sum(0) / n
        norms[rows] = r.square().sum(1) * (x.square().sum(1) + 1)
    for rows in chunks:
        x, r = residual(rows)
        alignment[rows] = (r * F.linear(x, grad, bias_grad)).sum(1)
    return alignment, norms


def relative_error(result: Scores, truth: tuple[Tensor, Tensor]) -> float:
    """Largest relative Frobenius error; NaN, which no comparison passes, for a NaN result."""
    errors = [
        float((value.double() - expected).norm() / expected.norm())
        for value, expected in zip(result[1:], truth, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


def judge(name: str, precision: str, error: float) -> None:
    """Raise Wrong unless the error is within what this contender is held to."""
    limit = (PLAIN if name in PLAIN_NAMES else OURS)[precision]
    if not error <= limit:
        raise Wrong(f"relative error {error:.2g}, at most {limit:g} is right")


# --- the clock


class Clock:
    """Device events on a GPU, the wall clock on a CPU."""

    def __init__(self, where: torch.device) -> None:
        self.device = where

    def time(self, work: Callable[[], Any], ahead: bool = False) -> float:
        """Seconds of one call, its result thrown away.

        ``ahead``: the GPU pauses until the host has launched all, as long as that takes no more
        than ``PAUSE_CYCLES``, so that the host's time is not in the figure.
        """
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(PAUSE_CYCLES)
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def median(self, work: Callable[[], Any], rounds: int = 7, ahead: bool = False) -> float:
        """Median seconds after one call to warm up."""
        work()
        return statistics.median(self.time(work, ahead) for _ in range(rounds))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Float32 matmul precision for a while: "medium" is a matter of the operands' dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "medium" else name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def warm_up(where: torch.device) -> None:
    """Have the GPU raise its clocks: idle it runs at a fifth of them."""
    if where.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=where, dtype=torch.bfloat16)
    end = time.monotonic() + _WARM_SECONDS
    while time.monotonic() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


def clock_rate(where: torch.device) -> float | None:
    """Megahertz of the multiprocessors, now; None where nobody tells."""
    try:
        return float(torch.cuda.clock_rate(where)) if where.type == "cuda" else None
    except Exception:  # without NVML's Python package
        return None


def copy_rate(where: torch.device, clock: Clock) -> float:
    """Bytes/s of one large copy, now: a disturbed or throttled GPU shows in it."""
    data = torch.ones(2**28 if where.type == "cuda" else 2**20, dtype=torch.int8, device=where)
    other = torch.empty_like(data)
    return 2 * data.numel() / clock.median(lambda: other.copy_(data), 5)


def job_of(unit: Mapping[str, Any]) -> tuple[Shape, torch.dtype, str]:
    """Shape, dtype and precision of a unit."""
    n, c, d = unit["shape"]
    return (n, c, d), dtype_of(unit["dtype"]), unit["precision"]


def predictions(unit: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the plan says of a unit beforehand, in milliseconds, or why it says nothing."""
    found: dict[str, Any] = {}
    for name in ("predicted", "predicted_graph"):
        seconds = unit.get(name)
        if isinstance(seconds, Sequence):
            found[f"{name}_milliseconds"] = [1e3 * each for each in seconds]
        elif seconds is not None:
            found[f"{name}_milliseconds"] = 1e3 * seconds
    if "no_prediction" in unit:
        found["no_prediction"] = unit["no_prediction"]
    return found


def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one number of the features."""
    return ITEM_BYTES[str(dtype).removeprefix("torch.")]
