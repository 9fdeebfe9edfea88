"""What every launch of a job must move and multiply on a GPU, and the time that follows from it.

No second choice is made here: regimes, tiles, slabs, splits and shared memory are asked of the
backends themselves (``_triton_choice``, the kernels' tables, ``moso_fast._cuda``'s plan). A step
takes the longer of its bytes at the memory's rate and its products at the tensor cores' rate;
a job the sum of its steps, and ``LAUNCH_SECONDS`` for each launch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moso_fast._native import load_native
from moso_fast.backends import _triton_few_classes, cuda
from moso_fast.backends._triton_choice import choose_regime
from moso_fast.backends._triton_regime import (
    CHUNK_BYTES,
    SLAB_ROWS,
    Regime,
    operand_name,
    triton_version,
)
from moso_fast.engine import _CUDA_RESIDUAL_SHARE
from moso_fast.problem import Problem, build_problem

RESULTS = Path(__file__).resolve().parent / "results"
COUNTS = RESULTS / "gpu_launches.json"

# Of a launch inside a CUDA graph behind the one before it, and of one from Python, which costs
# nothing while the GPU is still busy with those before: assumptions, to be measured.
LAUNCH_SECONDS = 2e-6
HOST_SECONDS = 5e-6
# Bytes that must be under way on a multiprocessor for the full rate: rate x some 600 ns (Little).
_LATENCY_SECONDS = 600e-9
_THREADS_A_MULTIPROCESSOR = 2048
_REGISTERS = 65536


@dataclass(frozen=True)
class Gpu:
    """Ceilings of a GPU; ``flops`` by what is multiplied. H200 figures are those of its users."""

    name: str
    read: float  # bytes/s that large copies reach
    flops: Mapping[str, float]
    multiprocessors: int
    shared_bytes: int  # a block may have; a multiprocessor has 1 KiB more
    l2_bytes: int
    memory_bytes: float


H200 = Gpu(
    "H200",
    read=4.3e12,
    flops={"bfloat16": 790e12, "tf32": 400e12, "float32": 67e12},
    multiprocessors=132,
    shared_bytes=232_448,
    l2_bytes=60 * 10**6,
    memory_bytes=139 * 2**30,
)


@dataclass(frozen=True)
class Step:
    """One kernel of ours, or one product by cuBLAS, or the operations of PyTorch around them."""

    name: str
    bytes: float  # from and to device memory
    flops: float = 0.0  # as executed: padded classes and extra products of terms count
    rate: str = "bfloat16"  # which of Gpu.flops
    feature_reads: float = 0.0  # how often the features pass by, for the check with the regime
    note: str = ""  # occupancy, tail: what would explain a miss

    def seconds(self, gpu: Gpu) -> float:
        """Return the longer of the two, without launches."""
        return max(self.bytes / gpu.read, self.flops / gpu.flops[self.rate])

    def bound(self, gpu: Gpu) -> str:
        """Which of the two it waits for."""
        return (
            "memory" if self.bytes / gpu.read >= self.flops / gpu.flops[self.rate] else "products"
        )


@dataclass(frozen=True)
class Prediction:
    """A job of one backend, step by step."""

    backend: str
    described: str
    steps: tuple[Step, ...]
    kept: bool  # residuals, between the passes
    chunks: int
    launches: int

    def seconds(self, gpu: Gpu, graph: bool = True) -> float:
        """Sum of the steps and of the launches in a graph; without one, no less than Python's."""
        found = sum(s.seconds(gpu) for s in self.steps) + LAUNCH_SECONDS * self.launches
        return found if graph else max(found, HOST_SECONDS * self.launches)


def outline(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
) -> Problem:
    """Describe a problem of this shape without its memory.

    On a CPU the backends answer for a GPU of compute capability 9.0.
    """
    n, c, d = shape
    row = torch.zeros(1, d, device=device)  # float32 heads are taken as they are: no copy
    labels = torch.zeros(1, dtype=torch.long, device=device).expand(n)
    features, bias = row.to(dtype).expand(n, d), row[0, :1].expand(c)
    return build_problem(features, row.expand(c, d), labels, bias, precision=precision)


@contextmanager
def as_if_compiled_by(version: tuple[int, ...]) -> Iterator[None]:
    """Have the regimes' conditions see this Triton, and no interpreter, whatever is installed."""
    with (
        patch.object(_triton_few_classes, "triton_version", lambda: version),
        patch.object(_triton_few_classes, "interpreted", lambda: False),
    ):
        yield


def predict_triton(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    precision: str,
    *,
    regime: str | None = None,
    triton_version: tuple[int, ...] = (3, 9),
    gpu: Gpu = H200,
) -> Prediction:
    """Predict what the Triton backend takes with the regime that it chooses, or with ``regime``.

    Raises
    ------
    ValueError
        The regime cannot run this problem.
    """
    problem = outline(shape, dtype, precision)
    free = gpu.memory_bytes - problem.rows * problem.dim * dtype.itemsize
    kept = 4 * problem.rows * problem.classes <= _CUDA_RESIDUAL_SHARE * free
    with as_if_compiled_by(triton_version):
        choice = choose_regime(problem, kept, regime)
        chosen: Regime = choice.regime
        described = f"{chosen.name}: {chosen.describe(problem)}"
    stored = kept and chosen.stores_residuals
    rows = max(1, CHUNK_BYTES["cuda"] // max(1, chosen.row_bytes(problem)))
    chunks = -(-problem.rows // rows)
    model = _TritonSteps(problem, min(rows, problem.rows), chunks, stored, gpu)
    steps = [*getattr(model, chosen.name)(), _around(problem)]
    waits = launches(chosen.name, chunks)
    return Prediction("triton", described, tuple(steps), stored, chunks, waits)


def predict_cuda(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, gpu: Gpu = H200
) -> Prediction | str:
    """Predict what the CUDA C++ kernels take, or say why they do not run this."""
    if load_native("_cuda").module is None:
        return "moso_fast._cuda is not built"
    problem = outline(shape, dtype, precision)
    reason = cuda._unknown(problem) or cuda._too_large(problem, gpu.shared_bytes)
    if reason is not None:
        return reason
    module, plan = cuda._module(), cuda._plan(problem, gpu.shared_bytes)
    n, c, d, item = problem.rows, problem.classes, problem.dim, dtype.itemsize
    # As in csrc/cuda/operands.cuh: terms of features, of weights, of the mean gradient.
    exact = cuda._exact(problem)
    wide = 3 if exact else 2
    features = {4: wide, 2: 1 if dtype == torch.bfloat16 else 2}[item]
    first, second = (wide, wide) if item == 4 else (3 if exact else 1, 3 if exact else 2)
    slab = module.few_classes_slab_rows(n, plan["slab_limit"])
    slabs, columns = -(-n // slab), module.few_classes_partial_columns(d)
    partials = 4 * slabs * c * (columns + 1)
    parts = plan["parts"]
    padded = 8 * -(-c // 8) * parts + 16 * -(-c // 16)  # logits by every part, then the gradient
    staged = (plan["stages"] - 1) * plan["tile_rows"] * item * d
    blocks = min(slabs, gpu.multiprocessors // parts)
    together = min(2, (gpu.shared_bytes + 1024) // (plan["second_bytes"] + 1024))
    steps = [
        Step(
            "few_classes first pass",
            n * d * item + 4 * n * c + n * 29 + partials,
            2 * n * padded * d * _products(features, first),
            feature_reads=1,
            note=f"mma.sync; {plan['tile_rows']} rows x {plan['stages']} stages, "
            f"{plan['first_bytes']} B shared, {_flight(staged, gpu)}; {slabs} slabs on {blocks} "
            f"blocks: {_tail(slabs / blocks)}",
        ),
        Step("sum over slabs", partials + 8 * c * (d + 1), note="from L2 where the partials fit"),
        Step(
            "few_classes second pass",
            n * d * item + 4 * n * c + 9 * n,
            2 * n * 8 * -(-c // 8) * d * _products(features, second),
            feature_reads=1,
            note=f"mma.sync; {together} blocks a multiprocessor, {plan['second_bytes']} B shared, "
            f"{_flight(together * 8 * 32 * 4 * 2 * 16, gpu)}",
        ),
    ]
    chunk = cuda._SLABS * int(plan["slab_limit"])
    chunks = -(-n // chunk)
    tiles = f"tiles of {plan['tile_rows']} rows, {plan['stages']} staged"
    waits = launches("cuda", chunks)
    return Prediction(
        "cuda", f"few classes, {tiles}", (*steps, _around(problem)), True, chunks, waits
    )


def predicted_seconds(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, contender: str, gpu: Gpu
) -> float | None:
    """Seconds of a contender of gpu_timing.py by its name; None for what is not ours to predict."""
    name, _, graph = contender.partition(" ")
    backend, _, regime = name.partition("/")
    if backend == "triton":
        version = triton_version()[:2]
        found: Prediction | str = predict_triton(
            shape, dtype, precision, regime=regime or None, triton_version=version, gpu=gpu
        )
    elif backend == "cuda":
        found = predict_cuda(shape, dtype, precision, gpu)
    else:
        return None
    return None if isinstance(found, str) else found.seconds(gpu, graph=bool(graph))


def measured(name: str, roof: Mapping[str, float], device: torch.device) -> Gpu:
    """Return the H200's ceilings on an H200, else those that were just measured."""
    if "H200" in name:
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name,
        max(roof["read"], roof["copy"]),
        {"bfloat16": roof["medium"], "tf32": roof["high"], "float32": roof["highest"]},
        properties.multi_processor_count,
        H200.shared_bytes,
        properties.L2_cache_size,
        properties.total_memory,
    )


def _products(a: int, b: int) -> int:
    """Products of terms i of a number and j of another that are not below its rounding."""
    return sum(i + j < max(a, b) for i in range(a) for j in range(b))


@dataclass(frozen=True)
class _TritonSteps:
    """Steps of each regime; the names of the methods are theirs."""

    problem: Problem
    chunk_rows: int
    chunks: int
    kept: bool
    gpu: Gpu

    @property
    def item(self) -> int:
        """Bytes of a number of the features."""
        return self.problem.features.dtype.itemsize

    @property
    def features(self) -> float:
        """Bytes of one read of the features."""
        return float(self.problem.rows) * self.problem.dim * self.item

    @property
    def logits(self) -> float:
        """Bytes of one float32 number for every row and class."""
        return 4.0 * self.problem.rows * self.problem.classes

    def gemm(self, factor: float = 1.0) -> float:
        """Multiplications and additions of one product."""
        p = self.problem
        return 2.0 * p.rows * p.classes * p.dim * factor

    @property
    def rate(self) -> tuple[str, int]:
        """What our kernels multiply, and how many of its products one float32 product takes."""
        from moso_fast.kernels.few_classes_tiles import products_of

        named = products_of(self.problem.features.dtype, self.problem.precision)
        return {"bf16": ("bfloat16", 1), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)}[named]

    def few_classes(self) -> list[Step]:
        """One kernel a pass."""
        from moso_fast.kernels.few_classes_tiles import slab_rows

        p, gpu = self.problem, self.gpu
        rate, times = self.rate
        first, second = (_triton_few_classes._default(p, which) for which in ("first", "second"))
        slab = slab_rows(self.chunk_rows, first.tile.rows, p.precision)
        slabs = self.chunks * -(-self.chunk_rows // slab)
        partials = 4.0 * slabs * p.classes * (p.dim + 1)
        residual = self.logits if self.kept else 0.0
        name = "bf16" if p.features.dtype == torch.bfloat16 else "fp32"
        ahead = first.tile.rows * p.dim * self.item * first.prefetch
        then = (second.tile.num_stages - 1) * second.tile.rows * second.tile.dim * self.item
        again = "; features fetched again from L1 or L2" if first.reload else ""
        cases = [
            f"{which}-{c.tile.rows}x{c.tile.classes}x{c.tile.dim}-{c.products}-{name}-full"
            for which, c in (("first", first), ("second", second))
        ]
        return [
            Step(
                "few_classes_first",
                self.features + residual + 29.0 * p.rows + partials,
                4.0 * p.rows * first.tile.classes * first.tile.dim * times,
                rate,
                1,
                occupancy(cases[0], first.tile, slabs / self.chunks, gpu, ahead) + again,
            ),
            Step("sum of partials", partials + 8.0 * p.weight.numel()),
            Step(
                "few_classes_second",
                self.features + residual + 9.0 * p.rows,
                2.0 * p.rows * second.tile.classes * p.dim * times * (1 if self.kept else 2),
                rate,
                1,
                occupancy(cases[1], second.tile, self.chunk_rows / second.tile.rows, gpu, then),
            ),
        ]

    def _logits(self) -> list[Step]:
        """Operand copy where cuBLAS needs one, H W^T, the residual kernel."""
        from moso_fast.kernels.residual import choose_config

        p = self.problem
        operand, steps = operand_name(p), []
        wide = 2 if operand == "bfloat16" else 4
        if wide != self.item:
            steps.append(Step("features to float32", self.features + 4.0 * p.rows * p.dim))
        bias = 2 * self.logits if operand == "bfloat16" else 0.0
        config = choose_config(p.classes)
        touches = 2 if config.block_classes >= p.classes else 3
        case = f"softmax_residual_kernel-C{config.max_classes or 'any'}-IDS-plain"
        programs = self.chunk_rows / config.block_rows
        return [
            *steps,
            Step(
                "H W^T by cuBLAS",
                p.rows * p.dim * wide + self.logits + bias,
                self.gemm(),
                operand,
                1,
                "the bias is added in a sweep of its own" if bias else "bias in its epilogue",
            ),
            Step(
                "softmax_residual",
                touches * self.logits + 24.0 * p.rows,
                note=occupancy(case, config, programs, self.gpu)
                + ("" if touches == 2 else "; second walk from L2 where rows in flight fit"),
            ),
        ]

    def _gradient(self) -> Step:
        from moso_fast.kernels import gradient_sum as kernel

        p = self.problem
        rate, times = self.rate
        rounded = rate == "bfloat16"
        tile = kernel.choose_tile(p.classes, p.dim, rounded, _aligned(p))
        tiles = -(-p.classes // tile.classes) * -(-p.dim // tile.dim)
        slab = kernel.slab_rows(self.chunk_rows, tiles, tile.rows, p.precision)
        slabs = -(-self.chunk_rows // slab)
        numbers = float(p.classes) * (p.dim + 1)
        at_once = max(1, min(slabs, kernel.PARTIAL_BYTES // (4 * p.classes * p.dim)))
        # float32 partials written and read; float64 sums read and written by every launch.
        rounds = self.chunks * -(-slabs // at_once)
        partials = 8.0 * numbers * slabs * self.chunks + 32.0 * numbers * rounds
        bk = (tile.num_stages - 1) * tile.rows * (4 * tile.classes + self.item * tile.dim)
        padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        padded *= tile.dim * -(-p.dim // tile.dim) / p.dim
        return Step(
            "gradient_sum",
            self.features + self.logits + partials,
            self.gemm(times * padded),
            rate,
            1,
            occupancy(
                _case("gradient_sum", tile, p), tile, min(slabs, at_once) * tiles, self.gpu, bk
            )
            + f"; {tiles} programs a slab share it through L2",
        )

    def _first(self) -> list[Step]:
        p = self.problem
        norms = Step(
            "two norms of every row", 2 * self.features + 40.0 * p.rows, 0.0, "bfloat16", 2,
            "two sweeps of PyTorch",
        )  # fmt: skip
        return [norms, *self._logits(), self._gradient()]

    def stored(self) -> list[Step]:
        """CuBLAS logits, residuals in place, gradient sum, alignment."""
        from moso_fast.kernels import stored_alignment as kernel

        p = self.problem
        rate, times = self.rate
        project = p.classes <= p.dim
        tile = kernel.choose_tile(p.classes, project, rate == "bfloat16", _aligned(p), 9)
        size = p.dim * self.item
        if project:
            splits = kernel.class_splits(self.chunk_rows, 1, p.classes, size, tile)
            padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        else:
            splits, padded = -(-p.dim // tile.dim), 1.0
        again = [] if self.kept else self._logits()
        parts = 8.0 * p.rows * splits if splits > 1 else 4.0 * p.rows
        programs = -(-self.chunk_rows // tile.rows) * splits
        k, order = (tile.dim, "projected") if project else (tile.classes, "pulled")
        flight = (tile.num_stages - 1) * tile.rows * k * self.item
        step = Step(
            "stored_alignment, " + ("H G^T" if project else "R G"),
            self.features + self.logits + parts + 9.0 * p.rows,
            self.gemm(times * padded),
            rate,
            1,
            occupancy(_case(order, tile, p), tile, programs, self.gpu, flight),
        )
        return [*self._first(), *again, step]

    def recompute(self) -> list[Step]:
        """As stored; the second pass makes the residuals again."""
        from moso_fast.kernels import stacked_alignment as kernel
        from moso_fast.kernels.stored_alignment import class_splits

        p = self.problem
        rate, times = self.rate
        tile = kernel.choose_tile(p.classes, rate == "bfloat16", _aligned(p), 9)
        splits = class_splits(self.chunk_rows, 1, p.classes, p.dim * self.item, tile)
        padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        programs = -(-self.chunk_rows // tile.rows) * splits
        flight = (tile.num_stages - 1) * tile.rows * tile.dim * self.item
        step = Step(
            "stacked_alignment",
            self.features + 29.0 * p.rows + (8.0 * p.rows * splits if splits > 1 else 0.0),
            self.gemm(2 * times * padded),
            rate,
            1,
            occupancy(_case("stacked", tile, p), tile, programs, self.gpu, flight),
        )
        return [*self._first(), step]

    def blas(self) -> list[Step]:
        """Every product by cuBLAS."""
        p = self.problem
        rounded = operand_name(p) == "bfloat16"
        wide, copied = (2, 1.5 * self.logits) if rounded else (4, 0.0)
        slabs = max(1, self.chunk_rows // SLAB_ROWS[p.precision]) * self.chunks
        numbers, rows = float(p.classes) * p.dim, float(p.rows)
        norm = Step("norm of every row", self.features + 24.0 * rows, feature_reads=1)
        # Where one look at the norms shows nothing bad, nothing is cleared.
        gradient = Step(
            "R^T H by cuBLAS",
            copied + wide * rows * (p.classes + p.dim) + 8.0 * numbers * slabs + 32.0 * numbers
            + self.logits,
            self.gemm(),
            operand_name(p),
            1,
            "residuals rounded in a sweep, their column sums in another" if rounded else "",
        )  # fmt: skip
        if p.classes <= p.dim:
            sweeps, name = 5 * self.logits, "H G^T by cuBLAS, folded by PyTorch"
        else:
            sweeps = copied + rows * p.dim * (16 + wide)
            name = "R G by cuBLAS, folded by PyTorch"
        bias = self.logits
        lost = (9 if p.classes > p.dim else 6) * self.logits if rounded else 0.0
        second = Step(
            name,
            wide * rows * p.dim + sweeps + bias + lost,
            self.gemm(),
            operand_name(p),
            1,
            "N x C sweeps for the self-term" if rounded else "",
        )
        again = [] if self.kept else self._logits()
        return [norm, *self._logits(), gradient, *again, second]


def _around(problem: Problem) -> Step:
    """Estimate what the engine does beside the kernels: short operations of PyTorch."""
    size = 60.0 * problem.rows + 40.0 * problem.weight.numel()
    return Step("rows and mean gradient, by PyTorch", size)


@cache
def _counts() -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return found


def launches(regime: str, chunks: int) -> int:
    """Return a job's launches under graph capture, as ``gpu_predictions.py --count`` found them."""
    once, each = _counts()[regime]
    return once + each * chunks


def _aligned(problem: Problem) -> bool:
    """Whether rows of features and residuals begin at multiples of 16 bytes."""
    return problem.dim * problem.features.dtype.itemsize % 16 == 0 and problem.classes % 4 == 0


def _case(kernel: str, tile: Any, problem: Problem) -> str:
    dtype = "bf16" if problem.features.dtype == torch.bfloat16 else "fp32"
    odd = "" if _aligned(problem) else "-unaligned"
    return f"{kernel}-{tile.rows}x{tile.classes}x{tile.dim}-{dtype}{odd}"


@cache
def _figures() -> dict[str, Any]:
    versions = json.loads((RESULTS / "triton_aot.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = versions[max(versions, key=lambda v: [int(x) for x in v.split(".")])]
    return found


def occupancy(case: str, tile: Any, programs: float, gpu: Gpu, staged: float | None = None) -> str:
    """Say how many blocks fit a multiprocessor, by the compiler's report, and in how many waves."""
    registers, _, shared, instruction = _figures()[case]["sm_90"]
    threads = 32 * tile.num_warps
    blocks = min(
        _REGISTERS // (8 * -(-registers // 8) * threads),
        (gpu.shared_bytes + 1024) // (shared + 1024),
        _THREADS_A_MULTIPROCESSOR // threads,
    )
    words = [
        f"{instruction}; {registers} registers x {threads} threads, {shared} B shared: {blocks} "
        f"block(s) a multiprocessor"
    ]
    if staged is not None:
        words.append(_flight(blocks * staged, gpu))
    words.append(_tail(programs / (blocks * gpu.multiprocessors)))
    return ", ".join(words)


def _flight(staged: float, gpu: Gpu) -> str:
    """Bytes under way on a multiprocessor, beside what the memory's latency asks for."""
    wanted = gpu.read * _LATENCY_SECONDS / gpu.multiprocessors
    return f"{staged / 1024:.0f} of {wanted / 1024:.0f} KiB in flight"


def _tail(waves: float) -> str:
    """How much of the last round of blocks is idle."""
    rounds = -(-waves // 1)
    idle = 0 if not rounds else 100 * (1 - waves / rounds)
    return f"{waves:.2f} waves, {idle:.0f}% idle"
