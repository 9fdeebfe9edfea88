"""C++ kernels for CPUs (csrc/cpu): features read once a pass, one code for every instruction set.

Results do not depend on the number of threads: the work is cut by the problem alone and sums are
taken in a fixed order. The kernels may run in a forked child; PyTorch's own parallel operations
hang there once the parent has used them, so call ``torch.set_num_threads(1)`` in such a child.
"""

from __future__ import annotations

import multiprocessing
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.engine import FirstPass, RowBuffers, residual_budget
from ..core.losses import LOSSES, SOFT_LABEL_TOLERANCE
from ..core.problem import Problem
from ..util.native import load_native
from .base import Availability, Backend

SIMD_VARIABLE = "MOSO_FAST_SIMD"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# From this many numbers on, the mean gradient is made block by block from stored residuals: a
# partial sum for every slab of rows would cost a sweep over it, which weighs more where the
# products are fast.
_SPLIT_GRAD_NUMBERS = {"float32": 2**19, "bfloat16": 2**17}
# Multiply-adds under which starting threads costs more than they save.
_SINGLE_THREAD_WORK = 2**21
# Rows at a time where a whole-problem pass needs temporaries (strided columns, sequences), and
# bytes of residuals where they do not fit the budget.
_CHUNK_ROWS = 8192
_CHUNK_BYTES = 256 * 2**20


class CpuBackend(Backend):
    """Tiles of rows through hand-written kernels.

    Products are float32, but for many classes at precision "medium" on a processor that multiplies
    bfloat16 faster (AMX, AVX512-BF16 of AMD): there their operands are rounded to it and summed in
    float32.
    """

    name = "cpu"

    def availability(self) -> Availability:
        """Whether ``moso_fast._cpu`` is there, and which instruction set it uses."""
        native = load_native("_cpu")
        if native.module is None:
            return Availability(False, native.reason, native.how)
        known = native.module.variants()
        wanted = os.environ.get(SIMD_VARIABLE)
        if wanted and wanted not in known:
            return Availability(
                False,
                f"{SIMD_VARIABLE}={wanted} is not among what this processor runs",
                f"unset {SIMD_VARIABLE} or set it to one of {', '.join(known)}",
            )
        return Availability(True, f"C++ kernels, {wanted or known[0]}")

    def supports(self, problem: Problem) -> str | None:
        """float32, bfloat16 and float16 features in main memory."""
        if problem.device.type != "cpu":
            return f"features are on {problem.device}; the C++ kernels read main memory"
        if problem.features.dtype not in _DTYPES:
            return "float64 features need float64 accumulators, which only torch has"
        return None

    def chunk_rows(self, problem: Problem) -> int:
        """Every row at once, unless temporaries would grow with the rows."""
        if problem.cu_seqlens is not None or not _unit_columns(problem.features):
            return _CHUNK_ROWS
        a_row = 4 * problem.heads * problem.classes
        if problem.rows * a_row > residual_budget(problem.device):
            return max(256, _CHUNK_BYTES // a_row)
        return max(1, problem.rows)

    def describe(self, problem: Problem) -> str:
        """Which kernels would run, on how many threads."""
        few = _few_classes(problem)
        kernels = "classes in registers" if few else "packed row tiles"
        if _bf16_products(problem):
            kernels += ", bfloat16 products"
        if not few and _split_grad(problem):
            kernels += ", mean gradient in blocks from stored residuals"
        return f"cpu: {_variant()}, {kernels}, {_threads(problem, problem.rows)} thread(s)"

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        residual = None
        if keep_residual or _split_grad(problem):
            residual = _empty_residual(problem, rows.stop - rows.start)
        grad_sum = torch.zeros(problem.weight.shape, dtype=torch.float64)
        bias_grad_sum = torch.zeros(problem.weight.shape[:2], dtype=torch.float64)
        inputs, job = _job(problem, rows)
        job.update(
            loss_out=out.loss[:, rows].data_ptr(),
            residual_sqnorm=out.residual_sqnorm[:, rows].data_ptr(),
            margin=out.margin[:, rows].data_ptr(),
            entropy=out.entropy[:, rows].data_ptr(),
            stat_stride=out.loss.stride(0),
            feature_sqnorm=out.feature_sqnorm[rows].data_ptr(),
            counted=out.counted[rows].data_ptr(),
            status=out.status.data_ptr(),
            residual=_address(residual),
            grad_sum=grad_sum.data_ptr(),
            bias_grad_sum=bias_grad_sum.data_ptr(),
        )
        _module().first_pass(_variant(), job)
        del inputs  # the kernels are done with them
        return FirstPass(grad_sum, bias_grad_sum, residual if keep_residual else None)

    def second_pass(
        self,
        problem: Problem,
        rows: slice,
        out: RowBuffers,
        mean_grad: Tensor,
        mean_bias_grad: Tensor | None,
        residual: Tensor | None,
        alignment: Tensor,
    ) -> None:
        """See :class:`moso_fast.backends.base.Backend`."""
        inputs, job = _job(problem, rows)
        mean_grad = mean_grad.contiguous()
        mean_bias_grad = None if mean_bias_grad is None else mean_bias_grad.contiguous()
        job.update(
            counted=out.counted[rows].data_ptr(),
            residual=_address(residual),
            mean_grad=mean_grad.data_ptr(),
            mean_bias_grad=_address(mean_bias_grad),
            self_term_scale=_self_term_scale(problem, out),
            alignment=alignment.data_ptr(),
            alignment_stride=alignment.stride(0),
        )
        _module().second_pass(_variant(), job)
        del inputs  # the kernels are done with them


def _module() -> ModuleType:
    module = load_native("_cpu").module
    assert module is not None, "chosen only where it is available"
    return module


def _variant() -> str:
    return os.environ.get(SIMD_VARIABLE) or str(_module().variants()[0])


def _unit_columns(features: Tensor) -> bool:
    return features.stride(1) == 1 or features.shape[1] == 1


def _few_classes(problem: Problem) -> bool:
    width = problem.heads * problem.classes
    dtype = _DTYPES[problem.features.dtype]
    return (
        problem.loss == "cross_entropy"
        and not problem.soft_labels
        and width <= _module().few_classes(_variant(), dtype, _may_round(problem))
    )


def _may_round(problem: Problem) -> bool:
    """Operands rounded to bfloat16: precision "medium", where that is faster than float32."""
    return problem.precision == "medium" and _module().prefers_bf16_products(_variant())


def _bf16_products(problem: Problem) -> bool:
    return _may_round(problem) and not _few_classes(problem)


def _self_term_scale(problem: Problem, out: RowBuffers) -> float:
    """1 / N where the score's self term must be put right for rounded operands, else 0.

    A sequence's own term mixes its tokens; its norm is not made of theirs.
    """
    if not _bf16_products(problem) or problem.cu_seqlens is not None:
        return 0.0
    return 1.0 / max(1, int(out.counted.sum()))


def _split_grad(problem: Problem) -> bool:
    products = "bfloat16" if _bf16_products(problem) else "float32"
    return problem.weight.numel() >= _SPLIT_GRAD_NUMBERS[products] and not _few_classes(problem)


def _empty_residual(problem: Problem, rows: int) -> Tensor:
    """(rows, K, C), in memory as the kernels go through it: few classes lane by lane of rows."""
    heads, classes = problem.heads, problem.classes
    if _few_classes(problem):
        return torch.empty(heads, classes, rows, dtype=torch.float32).permute(2, 0, 1)
    return torch.empty(rows, heads, classes, dtype=torch.float32)


def _threads(problem: Problem, rows: int) -> int:
    if rows * problem.weight.numel() < _SINGLE_THREAD_WORK:
        return 1
    return torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _job(problem: Problem, rows: slice) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors that must outlive the call, and the fields that both passes read."""
    features = problem.features[rows]
    if not _unit_columns(features):
        features = features.contiguous()
    labels = targets = None
    if problem.soft_labels:
        targets = problem.labels[rows].to(torch.float32).contiguous()
    else:
        labels = problem.labels[rows].to(torch.int64).contiguous()
    weight = problem.weight.contiguous()
    bias = None if problem.bias is None else problem.bias.contiguous()
    sample_weight = problem.sample_weight
    if sample_weight is not None:
        sample_weight = sample_weight[rows].contiguous()
    job = {
        "features": features.data_ptr(),
        "dtype": _DTYPES[features.dtype],
        "row_stride": features.stride(0),
        "first_row": rows.start,
        "rows": features.shape[0],
        "dim": problem.dim,
        "heads": problem.heads,
        "classes": problem.classes,
        "weight": weight.data_ptr(),
        "bias": _address(bias),
        "labels": _address(labels),
        "targets": _address(targets),
        "sample_weight": _address(sample_weight),
        "loss": LOSSES.index(problem.loss),
        "label_smoothing": problem.label_smoothing,
        "target_tolerance": SOFT_LABEL_TOLERANCE,
        "ignore_index": problem.ignore_index,
        "exclude_nonfinite": problem.nonfinite == "exclude",
        "threads": _threads(problem, features.shape[0]),
        # A pool that a forked parent left behind would hang.
        "own_threads": multiprocessing.parent_process() is not None,
        "few_classes": _few_classes(problem),
        "bf16_products": _bf16_products(problem),
        "split_grad": _split_grad(problem),
    }
    return [features, labels, targets, weight, bias, sample_weight], job
