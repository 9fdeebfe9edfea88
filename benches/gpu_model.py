"""Predicts the jobs of the Triton and CUDA C++ backends on a GPU, launch by launch.

No second choice is made here: regimes, tiles, slabs, splits and shared memory are asked of the
backends themselves (``_triton_choice``, the kernels' tables, ``moso_fast._cuda``'s plan).
gpu_steps.py has the work of the Triton regimes, gpu_roofline.py the time that it takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from gpu_roofline import H200, RESULTS, Gpu, Prediction, Step
from gpu_steps import TritonSteps, bytes_in_flight, last_wave

from moso_fast._native import load_native
from moso_fast.backends import _triton_few_classes, cuda
from moso_fast.backends._triton_choice import choose_regime
from moso_fast.backends._triton_regime import CHUNK_BYTES, Regime, triton_version
from moso_fast.engine import _CUDA_RESIDUAL_SHARE
from moso_fast.problem import Problem, build_problem

COUNTS = RESULTS / "gpu_launches.json"


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
    model = TritonSteps(problem, min(rows, problem.rows), chunks, stored, gpu)
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
            f"{plan['first_bytes']} B shared, {bytes_in_flight(staged, gpu)}; {slabs} slabs on "
            f"{blocks} blocks: {last_wave(slabs / blocks)}",
        ),
        Step("sum over slabs", partials + 8 * c * (d + 1), note="from L2 where the partials fit"),
        Step(
            "few_classes second pass",
            n * d * item + 4 * n * c + 9 * n,
            2 * n * 8 * -(-c // 8) * d * _products(features, second),
            feature_reads=1,
            note=f"mma.sync; {together} blocks a multiprocessor, {plan['second_bytes']} B shared, "
            f"{bytes_in_flight(together * 8 * 32 * 4 * 2 * 16, gpu)}",
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


def _products(a: int, b: int) -> int:
    """Products of terms i of a number and j of another that are not below its rounding."""
    return sum(i + j < max(a, b) for i in range(a) for j in range(b))


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
