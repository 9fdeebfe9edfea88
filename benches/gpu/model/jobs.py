"""Predicts the jobs of the Triton and CUDA C++ backends on a GPU, launch by launch.

No second choice is made here: regimes, tiles, slabs, splits and shared memory are asked of the
backends themselves (``backends.triton.choice``, the kernels' tables, ``moso_fast._cuda``'s plan).
steps.py and library_steps.py have the work of the Triton regimes, cuda_work.py that of the CUDA
C++ kernels, roofline.py the time that it takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch

from moso_fast.backends.cuda import backend as cuda
from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.cuda import jobs as cuda_jobs
from moso_fast.backends.triton.choice import choose_regime
from moso_fast.backends.triton.regime import (
    _CHUNK_SHARE,
    CHUNK_BYTES,
    SLAB_ROWS,
    triton_version,
)
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.core.engine import _LARGE_HEAD
from moso_fast.core.memory import _CUDA_RESIDUAL_SHARE
from moso_fast.core.passes import Plan
from moso_fast.core.problem import Problem
from moso_fast.util.native import load_native

from ..outline import outline
from .cuda_work import Kernel, first_phases, second_phase
from .occupancy import bytes_in_flight, last_wave
from .roofline import H200, RESULTS, Gpu, Prediction, Step, Sweep
from .steps import TritonSteps

COUNTS = RESULTS / "gpu_launches.json"


@contextmanager
def as_if_compiled_by(version: tuple[int, ...]) -> Iterator[None]:
    """Have the regimes' conditions see this Triton, and no interpreter, whatever is installed."""
    with (
        patch.object(triton_few_classes, "triton_version", lambda: version),
        patch.object(triton_few_classes, "interpreted", lambda: False),
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
        plan = Plan(None, kept, 4 * problem.rows * problem.classes, 0)
        chosen = choice.regime(problem, plan)
        described = f"{chosen.name}: {chosen.kernels()}"
        stored = kept and chosen.stores_residuals
        rows = max(1, _chunk_bytes(gpu) // max(1, chosen.row_bytes()))
        chunks = -(-problem.rows // rows)
        model = TritonSteps(problem, min(rows, problem.rows), stored, gpu, triton_version)
        single = chosen.name == "blas" and problem.rows <= SLAB_ROWS[precision]
        steps = [*getattr(model, chosen.name)(), _around(problem, chunks, single)]
    waits = launches(chosen.name, chunks)
    return Prediction("triton", described, tuple(steps), stored, chunks, waits)


def _chunk_bytes(gpu: Gpu) -> int:
    """As ``triton.regime.chunk_bytes`` has it on that GPU."""
    share = int(gpu.memory_bytes) // _CHUNK_SHARE
    return min(CHUNK_BYTES["cuda"], 1 << max(0, share.bit_length() - 1))


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
    plan = cuda_jobs.plan_of(problem, gpu.shared_bytes)
    chunk = cuda._SLABS * int(plan["slab_limit"])
    chunks = -(-problem.rows // chunk)
    exact = cuda_jobs.exact(problem)
    kernel = Kernel(plan, problem.classes, problem.dim, dtype.itemsize, exact)
    steps = [
        *_cuda_first(problem, kernel, min(chunk, problem.rows), gpu),
        _cuda_second(problem, kernel, gpu),
        _around(problem, chunks),
    ]
    tiles = f"tiles of {plan['tile_rows']} rows, {plan['stages']} staged"
    waits = launches("cuda", chunks)
    return Prediction("cuda", f"few classes, {tiles}", tuple(steps), True, chunks, waits)


def _cuda_first(problem: Problem, kernel: Kernel, chunk_rows: int, gpu: Gpu) -> tuple[Step, Step]:
    """First pass and the sum over its slabs."""
    module, plan = cuda_device.module(), kernel.plan
    n, c, d, item = problem.rows, problem.classes, problem.dim, kernel.item
    chunks = n / chunk_rows  # the last one is shorter
    slab = module.few_classes_slab_rows(chunk_rows, plan["slab_limit"])
    slabs, columns = -(-chunk_rows // slab), module.few_classes_partial_columns(d)
    partials = 4.0 * chunks * slabs * c * (columns + 1)
    parts, stages, together = int(plan["parts"]), int(plan["stages"]), int(plan["together"])
    blocks = min(slabs, together * gpu.multiprocessors // parts)
    features, weights, _ = _terms(problem, kernel)
    flops = 2.0 * n * d * _products(features, weights)
    # Logits by every part of the classes, then the gradient by the part that has them.
    logits, gradient = flops * parts * 8 * -(-c // 8), flops * 16 * -(-c // 16)
    turns = together * chunks * -(-slabs // blocks) * -(-slab // plan["tile_rows"])
    staged = float(together * max(1, stages - 1) * plan["tile_rows"] * item * d)
    first = Sweep(
        n * d * item + 4 * n * c + n * 29 + partials,
        first_phases(kernel, turns, gpu, logits, gradient),
        staged,
        blocks=together,
        staged=stages > 1,
    )
    note = (
        f"mma.sync, {plan['tile_rows']} rows x {stages} stages, {plan['first_bytes'] / 1024:.0f} "
        f"KiB shared, {bytes_in_flight(staged, gpu)}, {last_wave(slabs / blocks)}"
    )
    note += "" if kernel.counted else "; instructions of the products not counted"
    total = Sweep(partials + 8.0 * c * (d + 1) * chunks)
    return (
        Step("few classes, first pass", "first", (first,), 1, note, 1),
        Step("sum over slabs", "first", (total,), note="from L2 where the partials fit"),
    )


def _cuda_second(problem: Problem, kernel: Kernel, gpu: Gpu) -> Step:
    plan, n, c = kernel.plan, problem.rows, problem.classes
    # As many as registers (csrc/cuda/few_classes.h) and shared memory allow.
    together = 2 if plan["tiles"] <= 2 else 1
    together = min(together, (gpu.shared_bytes + 1024) // (plan["second_bytes"] + 1024))
    features, _, grad = _terms(problem, kernel)
    flops = 2.0 * n * 8 * -(-c // 8) * problem.dim * _products(features, grad)
    loads = 2 * (3 if kernel.exact and kernel.item == 4 else 4)  # of 16 bytes, ahead
    asked = float(together * 256 * loads * 16)
    size = n * problem.dim * kernel.item + 4 * n * c + 9 * n
    phase = second_phase(kernel, -(-n // 16) / gpu.multiprocessors, grad, flops)
    note = f"mma.sync, {plan['second_bytes'] / 1024:.0f} KiB shared, {bytes_in_flight(asked, gpu)}"
    sweep = Sweep(size, (phase,), asked)  # warps that never wait for each other
    return Step("few classes, second pass", "second", (sweep,), 1, note, together)


def _terms(problem: Problem, kernel: Kernel) -> tuple[int, int, int]:
    """As in csrc/cuda/operands.cuh: terms of features, of weights, of the mean gradient."""
    wide = 3 if kernel.exact else 2
    if kernel.item == 4:
        return wide, wide, wide
    features = 1 if problem.features.dtype == torch.bfloat16 else 2
    return features, 3 if kernel.exact else 1, wide


def predicted(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, contender: str, gpu: Gpu
) -> Prediction | None:
    """Prediction for a contender of the check by its name; None for what is not ours.

    Names are "triton", "triton/REGIME" and "cuda", each with " (graph)" behind it or without.
    """
    backend, _, regime = contender.partition(" ")[0].partition("/")
    if backend == "triton":
        version = triton_version()[:2]
        return predict_triton(
            shape, dtype, precision, regime=regime or None, triton_version=version, gpu=gpu
        )
    found = predict_cuda(shape, dtype, precision, gpu) if backend == "cuda" else ""
    return None if isinstance(found, str) else found


def predicted_seconds(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, contender: str, gpu: Gpu
) -> float | None:
    """Seconds of a call; in a graph where the contender's name says so."""
    found = predicted(shape, dtype, precision, contender, gpu)
    return None if found is None else found.seconds(gpu, graph=contender.endswith("(graph)"))


def pass_seconds(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str, contender: str, gpu: Gpu
) -> tuple[float, float] | None:
    """Seconds of what the first and the second pass run on the GPU.

    The kernels, the sum of their partials, and products by cuBLAS where the regime has them;
    neither launches nor what the engine does between and behind the passes.
    """
    found = predicted(shape, dtype, precision, contender, gpu)
    return None if found is None else found.pass_seconds(gpu)


def _products(a: int, b: int) -> int:
    """Products of terms i of a number and j of another that are not below its rounding."""
    return sum(i + j < max(a, b) for i in range(a) for j in range(b))


def _around(problem: Problem, chunks: int, single: bool = False) -> Step:
    """Estimate what the engine does beside the passes: PyTorch's operations on rows and sums.

    ``single``: the sum of an only chunk comes in float32.
    """
    elements = float(problem.weight.numel())
    # Sums of later chunks added, the mean, its norm, its float32 form. The float32 sum that cuBLAS
    # makes of an only chunk stays as it is where the head is large.
    sums = elements * (24 * (chunks - 1) + 16 + 8 + 12)
    if chunks == 1 and elements >= _LARGE_HEAD and single:
        sums = elements * (8 + 4)
    sweeps = (Sweep(60.0 * problem.rows), Sweep(sums))
    return Step("rows and mean gradient, by PyTorch", "around", sweeps)


@cache
def _counts() -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return found


def launches(regime: str, chunks: int) -> int:
    """Return a job's launches under graph capture, as ``predict --count`` found them."""
    once, each = _counts()["cuda whole" if (regime, chunks) == ("cuda", 1) else regime]
    return once + each * chunks
