"""Regime "blas": products by cuBLAS, everything between them in one kernel that works in place.

The logits of a chunk, float32, become its residuals where they lie, and the same launch writes
every row statistic: no second tensor of rows x classes, no softmax, no one-hot. Every loss, any
number of heads and classes. Where the products round residuals to bfloat16 anyway, for one head,
the kernel writes them so ("narrow"): half the memory, and no copy.

bfloat16 features at precision "medium" stay bfloat16 as operands, and weights, residuals and the
mean gradient are rounded to it for the products alone. float16 cannot hold residuals (1e-8 is
below its smallest number): such features are expanded to float32 and multiplied in tf32, whose
ten digits hold them exactly. The same goes for float32 features at "high" and "medium".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....core.passes import FirstPass, RowBuffers
from ....core.problem import Problem
from ....core.status import STATUS_FEATURE, STATUS_LOGITS
from ...common import alignments, gradient_sum, logits_of, note, product, safe_features
from ..products import features_and_norms, kernel_features, sum_narrow_gradients
from ..regime import (
    SLAB_ROWS,
    Regime,
    capturing,
    kernel_targets,
    kernel_weights,
    operand_dtype,
    operand_name,
    padded,
)

# Numbers of a block of residuals whose lost self-terms are summed at a time, and the bytes that
# the sum takes for each.
BLOCK_ELEMENTS = 2**24
_BLOCK_BYTES = 16
# Bytes of partial gradient sums that share a launch.
_BATCH_BYTES = 2**28


class BlasRegime(Regime):
    """cuBLAS around the in-place residual kernel; residuals stored, or made again from logits."""

    name = "blas"
    feature_reads = 4  # norms, logits, gradient sum, alignments

    @classmethod
    def fits(cls, problem: Problem) -> str | None:
        """Return None: every problem of the backend."""
        return None

    def row_bytes(self) -> int:
        """Logits, a product of the same size, operand copies."""
        problem = self.problem
        if narrow_ones(problem):  # logits, and residuals or the product behind them
            product_bytes = 4 * (min(problem.classes, problem.dim) + 16)
            return 4 * problem.classes + max(product_bytes, 2 * problem.classes)
        a_row = 8 * problem.heads * problem.classes
        if self.operand.itemsize == 2:
            a_row += 2 * problem.heads * problem.classes
        if self.operand != problem.features.dtype:
            a_row += self.operand.itemsize * problem.dim
        if problem.classes > problem.dim:
            a_row += 4 * problem.heads * problem.dim
        return a_row

    def fixed_bytes(self) -> int:
        """Gradient sums and what is added to them, in float64; float32 sums of slabs; a block."""
        problem = self.problem
        rows = min(problem.rows, self.chunk_rows)
        elements = problem.weight.numel()
        slabs = min(rows // SLAB_ROWS[problem.precision], _BATCH_BYTES // (4 * elements))
        partial = 4 * max(1, slabs) * elements
        block = 0
        if self.operand.itemsize == 2 and not narrow_ones(problem):
            block = _BLOCK_BYTES * min(rows * problem.heads * problem.classes, BLOCK_ELEMENTS)
        return 16 * elements + partial + block

    def kernels(self) -> str:
        """Operands of the products and the tile of the kernel."""
        return f"{operand_name(self.problem)} products by cuBLAS, {residual_tile(self.problem)}"

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        if narrow_ones(problem):
            return self._narrow_first(rows, out)
        features = cleared_features(problem, rows, out)
        residual = residuals(self, rows, out, features)
        note_norms(problem, rows, out)
        slab_rows = SLAB_ROWS[problem.precision]
        grad_sum = gradient_sum(
            residual.to(features.dtype), features, slab_rows, batch_bytes=_BATCH_BYTES
        )
        shape = (-1, problem.heads, problem.classes)
        return FirstPass(
            grad_sum.reshape(problem.weight.shape),
            residual.sum(0, dtype=torch.float64).reshape(shape[1:]),
            residual.reshape(shape) if self.returns_residual else None,
        )

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        # Rows that do not count may hold anything; each touches its own result alone.
        if narrow_ones(problem):
            features = kernel_features(problem, rows)
            if residual is None:
                residual = narrow_residuals(self, rows, out, features)[:, None]
            self._align_narrow(rows, out, features, residual[:, 0], alignment)
            return
        features = problem.feature_rows(rows).to(self.operand)
        if residual is None:
            flat = residuals(self, rows, out, features)
            residual = flat.reshape(-1, problem.heads, problem.classes)
        gradient = self.gradient[0].view(problem.weight.shape)
        dots = alignments(features, residual, gradient, self.mean_bias_grad)
        if features.dtype.itemsize == 2 and problem.cu_seqlens is None:
            dots = dots + lost_self_term(out, rows, residual, problem.classes > problem.dim)
        alignment.copy_(torch.where(out.counted[rows], dots, 0))

    def _narrow_first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """First pass with residuals as the products take them.

        cuBLAS multiplies the features of rows that do not count with residuals of 0, and 0 NaN is
        NaN: whether there are any that are not finite is asked for, which waits for the norms
        alone. Where there are, or nobody may wait, a kernel that skips such rows makes the sum.
        """
        problem = self.problem
        dirty = torch.zeros(1, dtype=torch.int32, device=problem.device)
        features = features_and_norms(problem, rows, out, dirty)
        skip = capturing(problem) or bool(dirty)
        residual = narrow_residuals(self, rows, out, features)
        note_norms(problem, rows, out)
        if skip:
            grad_sum = sum_narrow_gradients(self, rows, out, residual, features)
        else:
            slab_rows = SLAB_ROWS[problem.precision]
            total = gradient_sum(residual, features, slab_rows, batch_bytes=_BATCH_BYTES)
            grad_sum = total[None, : problem.classes]
        kept = residual[:, None] if self.returns_residual else None
        return FirstPass(grad_sum, column_sums(problem, residual), kept)

    def begin_second(self, mean_grad: Tensor, mean_bias_grad: Tensor | None) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        super().begin_second(mean_grad, mean_bias_grad)
        if narrow_ones(self.problem):
            self._narrow_gradient = _narrow_gradient(self.problem, *self.gradient)

    def _align_narrow(
        self, rows: slice, out: RowBuffers, features: Tensor, residual: Tensor, alignment: Tensor
    ) -> None:
        """Write <g_i, G> of the rows from narrow residuals, by cuBLAS and one kernel behind it."""
        from moso_fast.kernels.row_norms import OwnTerm, row_dots

        own = OwnTerm(out.feature_sqnorm[rows], out.number_counted(), self.lost[rows])
        dim, counted = self.problem.dim, out.counted[rows]
        gradient, shift = self._narrow_gradient
        if self.problem.classes <= dim:
            projected = product(features, gradient.T)
            row_dots(projected, residual, alignment[0], counted, own, shift=shift)
            return
        pulled, extra = product(residual, gradient), None
        if self.mean_bias_grad is not None:
            pulled, extra = pulled[:, :dim], pulled[:, dim : dim + 2]
        row_dots(pulled, features, alignment[0], counted, own, extra=extra)


def _narrow_gradient(
    problem: Problem, gradient: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """G as the products with narrow residuals and features take it, and a shift or None.

    As many rows as narrow residuals have columns. Where residuals are the operand (C > D), the
    bias part stands in two columns more, high and low digits: <r, gb> comes with the product.
    """
    gradient = padded(gradient)
    if bias is None:
        return gradient, None
    missing = gradient.shape[0] - problem.classes
    if problem.classes <= problem.dim:
        return gradient, torch.nn.functional.pad(bias, (0, missing))
    high = bias.to(gradient.dtype)
    low = (bias - high.float()).to(gradient.dtype)
    wider = gradient.new_zeros(gradient.shape[0], problem.dim + 8)
    wider[:, : problem.dim] = gradient
    wider[: problem.classes, problem.dim] = high
    wider[: problem.classes, problem.dim + 1] = low
    return wider, None


def residual_tile(problem: Problem) -> str:
    """Say which tile the residual kernel takes."""
    from moso_fast.kernels.residual import choose_config  # imports Triton

    narrow = narrow_ones(problem)
    config = choose_config(
        problem.classes, loss=problem.loss, soft=problem.soft_labels, narrow=narrow
    )
    return (
        f"residuals {'rounded beside the logits' if narrow else 'in place'}, tile "
        f"{config.block_rows} x {config.block_classes}, {config.num_warps} warps"
    )


def cleared_features(problem: Problem, rows: slice, out: RowBuffers) -> Tensor:
    """Operand features with non-finite rows cleared; writes norms, counted rows and status."""
    counted = problem.counted(rows)
    features, finite, sqnorm = safe_features(
        problem, rows, operand_dtype(problem), look_first=not capturing(problem)
    )
    if problem.nonfinite == "exclude":
        counted &= finite
    else:
        note(out.status, STATUS_FEATURE, counted & ~finite, rows)
    out.feature_sqnorm[rows] = sqnorm
    out.counted[rows] = counted
    return features


def note_norms(problem: Problem, rows: slice, out: RowBuffers) -> None:
    """Report rows whose |g|^2 = |r|^2 |h|^2 overflows; the kernels report their own overflows."""
    norms = out.residual_sqnorm[:, rows] * out.feature_sqnorm[rows]
    bad = out.counted[rows] & ~torch.isfinite(norms).all(0)
    note(out.status, STATUS_LOGITS, bad, rows)


def residuals(
    job: Regime, rows: slice, out: RowBuffers, features: Tensor, softmax: Any = None
) -> Tensor:
    """Residuals (n, K * C) in the memory of the logits; writes the statistics of the rows.

    ``softmax``: where to leave what residuals can be computed from again, or None.
    """
    logits = logits_of(features, *job.heads)
    _launch(job.problem, rows, out, logits, softmax=softmax)
    return logits


def _launch(problem: Problem, rows: slice, out: RowBuffers, logits: Tensor, **options: Any) -> None:
    """Make residuals of logits and write the statistics of the rows."""
    from moso_fast.kernels.residual import RowOutputs, residual_rows  # imports Triton

    residual_rows(
        logits,
        kernel_targets(problem, rows),
        classes=problem.classes,
        out=RowOutputs(
            out.loss[:, rows],
            out.residual_sqnorm[:, rows],
            out.margin[:, rows],
            out.entropy[:, rows],
        ),
        status=out.status,
        first_row=rows.start,
        loss=problem.loss,
        label_smoothing=problem.label_smoothing,
        ignore_index=problem.ignore_index,
        sample_weight=kernel_weights(problem, rows),
        counted=out.counted[rows],
        **options,
    )


def narrow_ones(problem: Problem) -> bool:
    """Whether residuals are written rounded, in rows of a multiple of 16 bytes.

    The norms of sequences need them as they are, and four columns and fewer are not worth a tile.
    """
    rounded = operand_dtype(problem) == torch.bfloat16 and problem.loss == "cross_entropy"
    return rounded and problem.heads == 1 and problem.cu_seqlens is None and problem.classes > 4


def narrow_residuals(job: Regime, rows: slice, out: RowBuffers, features: Tensor) -> Tensor:
    """Residuals (n, M) bfloat16, zeros behind the classes; writes statistics and ``job.lost``."""
    from moso_fast.kernels.residual import NarrowResiduals  # imports Triton

    problem, (weight, bias) = job.problem, job.narrow_heads
    residual = torch.empty(
        features.shape[0], weight.shape[0], dtype=torch.bfloat16, device=problem.device
    )
    narrow = NarrowResiduals(residual, job.lost[rows])
    logits = product(features, weight.T)[:, : problem.classes]
    _launch(problem, rows, out, logits, bias=bias, narrow=narrow)
    return residual


def column_sums(problem: Problem, residual: Tensor) -> Tensor:
    """Sum of narrow residuals over the rows, (1, C) float64."""
    from moso_fast.kernels.row_norms import column_sums as kernel

    return kernel(residual)[None, : problem.classes]


def lost_self_term(out: RowBuffers, rows: slice, residual: Tensor, both_rounded: bool) -> Tensor:
    """Return what rounding residuals took from each row's dot product with itself, (K, n).

    Scores are N a - q with the exact q: what a holds of the row's own gradient must be as exact,
    or the rounding of the largest term of a confident row would decide its score. A block of rows
    at a time: the terms of a whole chunk would take several times the memory of its logits.
    """
    rows_a_block = max(1, BLOCK_ELEMENTS // residual.shape[1:].numel())
    blocks = residual.split(rows_a_block)
    lost = torch.cat([_lost_products(block, both_rounded) for block in blocks]).T
    return lost * out.feature_sqnorm[rows] / out.number_counted().clamp_min(1)


def _lost_products(residual: Tensor, both_rounded: bool) -> Tensor:
    """Return |r|^2 less the product that the operands gave, (n, K)."""
    rounded = residual.to(torch.bfloat16).float()
    other = residual + rounded if both_rounded else residual
    return ((residual - rounded) * other).sum(-1)
