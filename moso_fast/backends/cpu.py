"""C++ kernels for CPUs (csrc/cpu): features read once a pass, one code for every instruction set.

Results do not depend on the number of threads: the work is cut by the problem alone and sums are
taken in a fixed order. The kernels may run in a forked child; PyTorch's own parallel operations
hang there once the parent has used them, so call ``torch.set_num_threads(1)`` in such a child.
"""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.formulas import FORMULAS
from ..core.losses import SOFT_LABEL_TOLERANCE
from ..core.passes import FirstPass, Passes, Plan, Results, RowBuffers, Whole
from ..core.problem import Problem
from ..core.status import STATUS_SLOTS
from ..util.native import load_native
from .base import Availability, Backend

SIMD_VARIABLE = "MOSO_FAST_SIMD"

# As csrc/cpu/jobs.h numbers them.
_LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The mean gradient is made block by block from stored residuals where the heads have so many
# elements or the job so few rows: a partial sum for every slab of rows would cost a sweep over the
# heads, which weighs more where the products are fast, and few slabs are few threads' work.
_SPLIT_GRAD_ELEMENTS = {"float32": 2**19, "bfloat16": 2**17}
_SPLIT_GRAD_ROWS = 1024
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
        return _availability(native.module, os.environ.get(SIMD_VARIABLE))

    def supports(self, problem: Problem) -> str | None:
        """float32, bfloat16 and float16 features in main memory."""
        if problem.device.type != "cpu":
            return f"features are on {problem.device}; the C++ kernels read main memory"
        if problem.features.dtype not in _DTYPES:
            return "float64 features need float64 accumulators, which only torch has"
        if problem.loss not in _LOSSES:
            return f"the C++ kernels know {', '.join(_LOSSES)}"
        return None

    def prepare(self, problem: Problem, plan: Plan) -> CpuPasses:
        """See :class:`moso_fast.backends.base.Backend`."""
        return CpuPasses(problem, plan)


class CpuPasses(Passes):
    """Both passes of one problem by the kernels of one instruction set."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self._variant = _variant()
        module, dtype = _module(), _DTYPES[problem.features.dtype]
        rounding = _may_round(problem)
        most_classes = module.few_classes(self._variant, dtype, rounding)
        self._few_classes = (
            problem.loss == "cross_entropy"
            and not problem.soft_labels
            and problem.heads * problem.classes <= most_classes
        )
        self._bf16_products = rounding and not self._few_classes
        most = _SPLIT_GRAD_ELEMENTS["bfloat16" if self._bf16_products else "float32"]
        self._split_grad = not self._few_classes and (
            problem.weight.numel() >= most or problem.rows <= _SPLIT_GRAD_ROWS
        )
        self.chunk_rows = self._chunk_rows()
        self._contiguous: tuple[Tensor, Tensor | None] | None = None

    def _chunk_rows(self) -> int:
        """Every row at once, unless temporaries would grow with the rows."""
        problem = self.problem
        if problem.cu_seqlens is not None or not _unit_columns(problem.features):
            return _CHUNK_ROWS
        if not self.plan.keep_residual:
            return max(256, _CHUNK_BYTES // (4 * problem.heads * problem.classes))
        return max(1, problem.rows)

    def describe(self) -> str:
        """Which kernels run, on how many threads."""
        kernels = "classes in registers" if self._few_classes else "packed row tiles"
        if self._bf16_products:
            kernels += ", bfloat16 products"
        if self._split_grad:
            kernels += ", mean gradient in blocks from stored residuals"
        threads = _threads(self.problem, self.problem.rows)
        return f"cpu: {self._variant}, {kernels}, {threads} thread(s)"

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem, residual = self.problem, None
        if self.returns_residual or self._split_grad:
            residual = self._empty_residual(rows.stop - rows.start)
        grad_sum = torch.zeros(problem.weight.shape, dtype=torch.float64, device="cpu")
        bias_grad_sum = torch.zeros(problem.weight.shape[:2], dtype=torch.float64, device="cpu")
        inputs, job = self._job(rows)
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
        _module().first_pass(self._variant, job)
        del inputs  # the kernels are done with them
        return FirstPass(grad_sum, bias_grad_sum, residual if self.returns_residual else None)

    def begin_second(self, mean_grad: Tensor, mean_bias_grad: Tensor | None) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        bias = None if mean_bias_grad is None else mean_bias_grad.contiguous()
        super().begin_second(mean_grad.contiguous(), bias)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        inputs, job = self._job(rows)
        job.update(
            counted=out.counted[rows].data_ptr(),
            residual=_address(residual),
            mean_grad=self.mean_grad.data_ptr(),
            mean_bias_grad=_address(self.mean_bias_grad),
            self_term_scale=self._self_term_scale(out),
            alignment=alignment.data_ptr(),
            alignment_stride=alignment.stride(0),
        )
        _module().second_pass(self._variant, job)
        del inputs  # the kernels are done with them

    def whole(self, formula: str | None, scale: float, *, read: bool) -> Whole | None:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem, module = self.problem, _module()
        loss = torch.empty(problem.heads, problem.rows, dtype=torch.float32, device="cpu")
        results = Results(
            alignment=torch.empty_like(loss),
            grad_sqnorm=torch.empty_like(loss),
            loss=loss,
            el2n=torch.empty_like(loss),
            margin=torch.empty_like(loss),
            entropy=torch.empty_like(loss),
            mean_grad_sqnorm=torch.empty(problem.heads, dtype=torch.float64, device="cpu"),
            count=torch.empty((), dtype=torch.int64, device="cpu"),
            score=None if formula is None else torch.empty_like(loss),
        )
        counted = torch.empty(problem.rows, dtype=torch.bool, device="cpu")
        facts = torch.empty(
            STATUS_SLOTS + 1 + problem.heads * module.head_facts,
            dtype=torch.float64,
            device="cpu",
        )
        inputs, job = self._job(slice(0, problem.rows))
        job.update(
            loss_out=loss.data_ptr(),
            el2n=results.el2n.data_ptr(),
            margin=results.margin.data_ptr(),
            entropy=results.entropy.data_ptr(),
            alignment=results.alignment.data_ptr(),
            grad_sqnorm=results.grad_sqnorm.data_ptr(),
            mean_grad_sqnorm=results.mean_grad_sqnorm.data_ptr(),
            count=results.count.data_ptr(),
            score=_address(results.score),
            counted=counted.data_ptr(),
            facts=facts.data_ptr(),
            # A gradient in blocks is made of stored ones, so that they are there in any case.
            keep_residual=self.plan.keep_residual or self._split_grad,
            formula=FORMULAS.index(formula or "alignment"),
            scale=float(scale),
        )
        module.whole(self._variant, job)
        del inputs  # the kernels are done with them
        return Whole(results, counted, facts)

    def _self_term_scale(self, out: RowBuffers) -> float:
        """1 / N where the score's self term must be put right for rounded operands, else 0.

        A sequence's own term mixes its tokens; its norm is not made of theirs.
        """
        if not self._bf16_products or self.problem.cu_seqlens is not None:
            return 0.0
        return 1.0 / max(1, int(out.counted.sum()))

    def _empty_residual(self, rows: int) -> Tensor:
        """(rows, K, C), laid out as the kernels go through it: few classes lane by lane of rows."""
        heads, classes = self.problem.heads, self.problem.classes
        if self._few_classes:
            lanes = torch.empty(heads, classes, rows, dtype=torch.float32, device="cpu")
            return lanes.permute(2, 0, 1)
        return torch.empty(rows, heads, classes, dtype=torch.float32, device="cpu")

    def _heads(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the kernels read them."""
        if self._contiguous is None:
            weight, bias = self.problem.weight, self.problem.bias
            self._contiguous = weight.contiguous(), None if bias is None else bias.contiguous()
        return self._contiguous

    def _job(self, rows: slice) -> tuple[list[Tensor | None], dict[str, Any]]:
        """Tensors that must outlive the call, and the fields that both passes read."""
        problem = self.problem
        features, given, sample_weight = problem.features, problem.labels, problem.sample_weight
        if rows.stop - rows.start < problem.rows:
            features, given = features[rows], given[rows]
            sample_weight = None if sample_weight is None else sample_weight[rows]
        if not _unit_columns(features):
            features = features.contiguous()
        labels = targets = None
        if problem.soft_labels:
            targets = given.to(torch.float32).contiguous()
        else:
            labels = given.to(torch.int64).contiguous()
        if sample_weight is not None:
            sample_weight = sample_weight.contiguous()
        weight, bias = self._heads()
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
            "loss": _LOSSES.index(problem.loss),
            "label_smoothing": problem.label_smoothing,
            "target_tolerance": SOFT_LABEL_TOLERANCE,
            "ignore_index": problem.ignore_index,
            "exclude_nonfinite": problem.nonfinite == "exclude",
            "threads": _threads(problem, features.shape[0]),
            # A pool that a forked parent left behind would hang.
            "own_threads": multiprocessing.parent_process() is not None,
            "few_classes": self._few_classes,
            "bf16_products": self._bf16_products,
            "split_grad": self._split_grad,
        }
        return [features, labels, targets, sample_weight], job


@cache
def _availability(module: ModuleType, wanted: str | None) -> Availability:
    known = module.variants()
    if wanted and wanted not in known:
        return Availability(
            False,
            f"{SIMD_VARIABLE}={wanted} is not among what this processor runs",
            f"unset {SIMD_VARIABLE} or set it to one of {', '.join(known)}",
        )
    return Availability(True, f"C++ kernels, {wanted or known[0]}")


def _module() -> ModuleType:
    module = load_native("_cpu").module
    assert module is not None, "chosen only where it is available"
    return module


def _variant() -> str:
    return os.environ.get(SIMD_VARIABLE) or str(_module().variants()[0])


def _may_round(problem: Problem) -> bool:
    """Operands rounded to bfloat16: precision "medium", where that is faster than float32."""
    return problem.precision == "medium" and _module().prefers_bf16_products(_variant())


def _unit_columns(features: Tensor) -> bool:
    return features.stride(1) == 1 or features.shape[1] == 1


def _threads(problem: Problem, rows: int) -> int:
    if rows * problem.weight.numel() < _SINGLE_THREAD_WORK:
        return 1
    return torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
