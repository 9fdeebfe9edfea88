"""Times the H200 table on a GPU: every backend beside plain PyTorch, with floor and peak memory.

Conditions: device events around each call; inputs rotate among copies larger together than the
L2 cache; all contenders of a row in turn, round after round; medians. A result is compared with
float64 first, and a wrong one gets no number. Ceilings are measured in the same run. Plain
PyTorch is the closed form over all rows at once (``naive`` of moso_fast/bench/providers/plain.py),
eager and compiled.

The floor of a row: each pass takes the longer of one read of the features and its products
(two in the first pass, one in the second) at the measured rates.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_model import outline, predicted_seconds
from gpu_roofline import Gpu, measured
from torch import Tensor

from moso_fast import engine
from moso_fast.backends import _PREFERENCE, backends, get
from moso_fast.backends._triton_choice import REGIME_VARIABLE, REGIMES, choose_regime
from moso_fast.bench.energy import gpu_energy_counter, joules_per_call
from moso_fast.bench.providers.plain import naive
from moso_fast.functional import last_layer_stats
from moso_fast.problem import Problem

# (N, C, D) of the H200 table; the rows of its last part take seconds each and are skipped by time.
TABLE = (
    (1_280_000, 10, 512),
    (1_280_000, 10, 2048),
    (1_280_000, 100, 512),
    (50_000, 10, 512),
    (50_000, 100, 512),
    (1_280_000, 1000, 512),
    (1_280_000, 100, 2048),
    (1_280_000, 1000, 2048),
    (50_000, 1000, 512),
    (8192, 32_000, 4096),
    (8192, 128_256, 4096),
    (1_000_000, 128_256, 4096),
    (1_000_000, 151_936, 2048),
    (1_000_000, 151_936, 8192),
)
DRY_TABLE = ((300, 10, 16), (60, 100, 24))

# Largest relative error of alignment and norms that still gets a number: ours are held to the
# contract, plain PyTorch only to being the same computation (bfloat16 logits cost it two digits).
OURS = {"highest": 1e-5, "high": 5e-3, "medium": 1e-2}
PLAIN = {"highest": 1e-3, "high": 5e-2, "medium": 1e-1}
# Rows up to which launches may take as long as kernels: also timed as CUDA graphs.
GRAPH_ROWS = 100_000
ENERGY_ROWS = TABLE[:3]  # half a second for each contender
LONGEST_JOB = 2.0  # seconds at the floor, above which a row is skipped
_FRACTION_OF_MEMORY = 0.8


@dataclass
class Contender:
    """One way to score a row of the table."""

    name: str
    precision: str
    dtype: torch.dtype
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    ours: bool
    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")
    peak_bytes: int | None = 0  # None for a graph, whose memory is its own
    problem: str = ""
    joules: float | None = None  # of one call


def contenders(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[Contender]:
    """Everything to be timed on features of this shape and dtype.

    "triton" is the regime that its table chooses; the others that fit follow as triton/NAME. Short
    jobs of "triton" and "cuda" are there a second time, as "(graph)": without the checks that
    wait for the GPU.
    """
    found = []
    precisions = ("highest", "high") if dtype == torch.float32 else ("medium",)
    for precision in precisions:
        problem = outline(shape, dtype, precision, device)
        for name in _PREFERENCE["cuda"]:
            if not backends()[name].available or get(name).supports(problem) is not None:
                continue
            found.append(Contender(name, precision, dtype, _ours(name, precision), True))
            if name in ("triton", "cuda") and problem.rows <= GRAPH_ROWS:
                graph = Graphed(_ours(name, precision))
                found.append(Contender(f"{name} (graph)", precision, dtype, graph, True))
            if name == "triton":
                found += [
                    Contender(f"triton/{r}", precision, dtype, _ours(name, precision, r), True)
                    for r in _other_regimes(problem)
                ]
        found.append(Contender("eager", precision, dtype, naive, False))
        if compiled:
            found.append(Contender("compile", precision, dtype, torch.compile(naive), False))
    return found


def _other_regimes(problem: Problem) -> list[str]:
    size = 4 * problem.rows * problem.classes
    kept = size <= engine.residual_budget(problem.device)
    chosen = choose_regime(problem, kept).regime.name
    return [r for r in REGIMES if r != chosen and REGIMES[r].fits(problem) is None]


@contextmanager
def forced(regime: str | None) -> Iterator[None]:
    """Force a regime of the Triton backend for a while; None: leave the choice to it."""
    before = os.environ.get(REGIME_VARIABLE)
    if regime is not None:
        os.environ[REGIME_VARIABLE] = regime
    try:
        yield
    finally:
        if regime is not None:
            os.environ.pop(REGIME_VARIABLE)
            if before is not None:
                os.environ[REGIME_VARIABLE] = before


def _ours(
    backend: str, precision: str, regime: str | None = None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Any:
        with forced(regime):
            stats = last_layer_stats(
                features, weight, labels, bias, backend=backend, precision=precision
            )
        return stats.loss, stats.alignment, stats.grad_sqnorm

    return run


class Graphed:
    """Runs as a CUDA graph, captured at the first call with each set of tensors."""

    def __init__(self, run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self._run = run
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor, Tensor]]] = {}

    def __call__(self, *data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _error(result: tuple[Tensor, Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Largest relative Frobenius error; NaN, which no comparison passes, for a NaN result."""
    errors = [
        float((value.double() - expected).norm() / expected.norm())
        for value, expected in zip(result[1:], truth, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


class Clock:
    """Device events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, work: Callable[[], Any]) -> float:
        """Seconds of one call, its result thrown away."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def median(self, work: Callable[[], Any], rounds: int = 7) -> float:
        """Median seconds after one call to warm up."""
        work()
        return statistics.median(self.time(work) for _ in range(rounds))


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """Bytes/s of reading and FLOP/s of large products, measured now."""
    gpu = device.type == "cuda"
    found = _bandwidth(torch.ones(2**30 if gpu else 2**22, device=device), clock)
    size = 8192 if gpu else 256
    for name in OURS:
        dtype = torch.bfloat16 if name == "medium" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with MatmulPrecision(name):
            found[name] = 2 * size**3 / clock.median(lambda a=a, b=b: a @ b)
    return found


def _bandwidth(data: Tensor, clock: Clock) -> dict[str, float]:
    other = torch.empty_like(data)
    return {
        "read": 4 * data.numel() / clock.median(data.sum),
        "copy": 8 * data.numel() / clock.median(lambda: other.copy_(data)),
    }


def floor_seconds(
    shape: tuple[int, int, int], contender: Contender, roof: dict[str, float]
) -> float:
    """No two-pass algorithm of these operands is faster; see the head of this file."""
    n, c, d = shape
    read = n * d * contender.dtype.itemsize / max(roof["read"], roof["copy"])
    flop = 2 * n * c * d / roof[contender.precision]
    return max(read, 2 * flop) + max(read, flop)


def prediction(shape: tuple[int, int, int], contender: Contender, gpu: Gpu | None) -> float | None:
    """Seconds that the model of gpu_model.py gives for a contender of ours; None for others."""
    if gpu is None or not contender.ours:
        return None
    return predicted_seconds(shape, contender.dtype, contender.precision, contender.name, gpu)


def ceilings_of_model(device: torch.device, roof: dict[str, float]) -> Gpu | None:
    """Return an H200's committed ceilings, else the measured ones; None without a GPU."""
    if device.type != "cuda":
        return None
    return measured(torch.cuda.get_device_name(device), roof, device)


class MatmulPrecision:
    """Float32 matmul precision for a while."""

    def __init__(self, name: str) -> None:
        self.name = "high" if name == "medium" else name

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.name)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Features (N, D) with classes that a head can tell apart, the head, labels."""
    n, c, d = shape
    g = torch.Generator(device=device).manual_seed(0)
    features = torch.empty(n, d, dtype=dtype, device=device)
    for part in features.split(2**16):
        part.copy_(torch.randn(part.shape, generator=g, device=device))
    weight = (torch.randn(c, d, generator=g, device=device) * (2.5 / d**0.5)).to(dtype)
    labels = torch.randint(c, (n,), generator=g, device=device)
    bias = torch.randn(c, generator=g, device=device).to(dtype)
    return [features, weight, labels, bias]


def time_row(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    roof: dict[str, float],
    deadline: float,
    compiled: bool,
    rounds: int,
) -> list[Contender] | str:
    """Time every contender on one row of the table, or say why it was skipped."""
    n, _, d = shape
    gpu = device.type == "cuda"
    if time.monotonic() > deadline:
        return "the time is up"
    item = torch.finfo(dtype).bits // 8
    if gpu:
        free = torch.cuda.mem_get_info(device)[0] * _FRACTION_OF_MEMORY
        if n * d * item * 1.5 > free:
            return "the features do not fit in the memory of the device"
    found = contenders(shape, device, dtype, compiled)
    quickest = min(floor_seconds(shape, c, roof) for c in found)
    if quickest > LONGEST_JOB:
        return f"one job takes at least {quickest:.1f} s"
    torch.compiler.reset()  # each row is a new shape, and compiled shapes are limited in number
    clock = Clock(device)
    data = inputs(shape, dtype, device)
    truth = exact(*data)
    copies = [data]
    if gpu:
        cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        while len(copies) * n * d * item < cache:
            copies.append([t.clone() for t in data])
    for contender in found:
        if time.monotonic() < deadline:
            _check(contender, copies[0], truth, gpu)
    running = [c for c in found if c.error == c.error and not c.problem]
    for c in running:
        for chosen in copies if isinstance(c.run, Graphed) else ():
            with MatmulPrecision(c.precision):
                c.run(*chosen)  # captures
    for index in range(rounds):
        for c in running:
            chosen = copies[index % len(copies)]
            with MatmulPrecision(c.precision):
                c.seconds.append(clock.time(lambda c=c, chosen=chosen: c.run(*chosen)))
        if time.monotonic() > deadline:
            break
    if gpu and shape in ENERGY_ROWS and dtype == torch.bfloat16:
        _energy(running, data, deadline)
    return found


def _energy(running: list[Contender], data: list[Tensor], deadline: float) -> None:
    """Energy of one call, where the GPU counts it; inputs may lie in the cache."""
    counter = gpu_energy_counter(str(data[0].device))
    for c in running if counter is not None else ():
        if time.monotonic() < deadline and not isinstance(c.run, Graphed):
            with MatmulPrecision(c.precision):
                c.joules = joules_per_call(
                    lambda c=c: c.run(*data), counter, torch.cuda.synchronize
                )


def _check(
    contender: Contender, data: list[Tensor], truth: tuple[Tensor, Tensor], gpu: bool
) -> None:
    """Run once untimed: warm up, measure the peak memory, compare with float64."""
    try:
        with MatmulPrecision(contender.precision):
            contender.run(*data)  # compiles, and grows pools that are not the job's
            if gpu:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            result = contender.run(*data)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        contender.problem = "out of memory"
        return
    except (ValueError, RuntimeError) as error:
        contender.problem = f"failed: {str(error).splitlines()[0][:200]}"
        return
    if gpu:
        torch.cuda.synchronize()
        graph = isinstance(contender.run, Graphed)
        contender.peak_bytes = None if graph else torch.cuda.max_memory_allocated() - before
    contender.error = _error(result, truth)
    limit = (OURS if contender.ours else PLAIN)[contender.precision]
    if not contender.error <= limit:
        contender.problem = f"wrong: relative error {contender.error:.2g} > {limit:g}"


# (N, C, D) of the rows whose features stay in main memory.
STREAMED = ((1_280_000, 10, 512), (1_280_000, 100, 512))


def time_streaming(device: torch.device, deadline: float, rounds: int) -> list[dict[str, Any]]:
    """Time scoring of page-locked bfloat16 features in main memory beside one copy of them.

    With all of them kept on the device for the second pass, and with none: the bus is crossed
    once or twice. The floor is that many copies at the rate measured here.
    """
    clock = Clock(device)
    run = _ours("triton", "medium")
    rows: list[dict[str, Any]] = []
    for shape in STREAMED:
        if time.monotonic() > deadline:
            rows.append({"row": str(shape), "why": "the time is up"})
            continue
        data = inputs(shape, torch.bfloat16, device)
        truth = exact(*data)
        host = data[0].cpu().pin_memory()
        copy = clock.median(lambda host=host, data=data: data[0].copy_(host, non_blocking=True))
        data[0] = host
        before = engine._resident_budget
        for crossings, budget in ((1, 2**62), (2, 0)):
            engine._resident_budget = lambda *given, budget=budget: budget
            try:
                error = _error(run(*data), truth)
                seconds = [clock.time(lambda data=data: run(*data)) for _ in range(rounds)]
            finally:
                engine._resident_budget = before
            median = statistics.median(seconds)
            wrong = not error <= OURS["medium"]
            rows.append(
                {
                    "n": shape[0],
                    "classes": shape[1],
                    "dim": shape[2],
                    "crossings": crossings,
                    "milliseconds": None if wrong else 1e3 * median,
                    "floor_milliseconds": 1e3 * crossings * copy,
                    "percent_of_floor": None if wrong else 100 * crossings * copy / median,
                    "gigabytes_per_second": host.nbytes / copy / 1e9,
                    "relative_error": error if error == error else None,
                    "problem": f"wrong: relative error {error:.2g}" if wrong else None,
                }
            )
    return rows
