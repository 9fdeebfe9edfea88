"""Regime "blas": products by cuBLAS, everything between them in one kernel that works in place.

The logits of a chunk, float32, become its residuals where they lie, and the same launch writes
every row statistic: no second tensor of rows x classes, no softmax, no one-hot. Every loss, any
number of heads and classes.

bfloat16 features at precision "medium" stay bfloat16 as operands, and weights, residuals and the
mean gradient are rounded to it for the products alone. float16 cannot hold residuals (1e-8 is
below its smallest number): such features are expanded to float32 and multiplied in tf32, whose
ten digits hold them exactly. The same goes for float32 features at "high" and "medium".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine import FirstPass, RowBuffers
from ..problem import STATUS_FEATURE, STATUS_LOGITS, Problem
from ._triton_regime import (
    SLAB_ROWS,
    Regime,
    capturing,
    kernel_targets,
    kernel_weights,
    operand_dtype,
    operand_name,
)
from .common import alignments, gradient_sum, logits_of, note, safe_features

# Numbers of a block of residuals whose lost self-terms are summed at a time, and the bytes that
# the sum takes for each.
BLOCK_NUMBERS = 2**24
_BLOCK_BYTES = 16
# Bytes of partial gradient sums that share a launch. Larger ones take one slab at a time: then a
# slab is work enough for a launch of its own.
_BATCH_BYTES = 2**28


class BlasRegime(Regime):
    """cuBLAS around the in-place residual kernel; residuals stored, or made again from logits."""

    name = "blas"
    feature_reads = 4  # norms, logits, gradient sum, alignments

    def fits(self, problem: Problem) -> str | None:
        """Return None: every problem of the backend."""
        return None

    def row_bytes(self, problem: Problem) -> int:
        """Logits, a product of the same size, operand copies."""
        a_row = 8 * problem.heads * problem.classes
        operand = operand_dtype(problem)
        if operand.itemsize == 2:
            a_row += 2 * problem.heads * problem.classes
        if operand != problem.features.dtype:
            a_row += operand.itemsize * problem.dim
        if problem.classes > problem.dim:
            a_row += 4 * problem.heads * problem.dim
        return a_row

    def fixed_bytes(self, problem: Problem) -> int:
        """Gradient sums and what is added to them, in float64; float32 sums of slabs; a block."""
        rows = min(problem.rows, self.chunk_rows(problem))
        numbers = problem.weight.numel()
        partial = 4 * max(1, rows // SLAB_ROWS[problem.precision]) * numbers
        if partial > _BATCH_BYTES:
            partial = 4 * numbers
        block = 0
        if operand_dtype(problem).itemsize == 2:
            block = _BLOCK_BYTES * min(rows * problem.heads * problem.classes, BLOCK_NUMBERS)
        return 16 * numbers + partial + block

    def describe(self, problem: Problem) -> str:
        """Operands of the products and the tile of the kernel."""
        return f"{operand_name(problem)} products by cuBLAS, {residual_tile(problem)}"

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        features = features_and_norms(problem, rows, out)
        residual = residuals(problem, rows, out, features)
        note_norms(problem, rows, out)
        slab_rows = SLAB_ROWS[problem.precision]
        grad_sum = gradient_sum(
            residual.to(features.dtype), features, slab_rows, batch_bytes=_BATCH_BYTES
        )
        shape = (-1, problem.heads, problem.classes)
        return FirstPass(
            grad_sum.reshape(problem.weight.shape),
            residual.sum(0, dtype=torch.float64).reshape(shape[1:]),
            residual.reshape(shape) if keep_residual else None,
        )

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
        # Rows that do not count may hold anything; each touches its own result alone.
        features = problem.feature_rows(rows).to(operand_dtype(problem))
        if residual is None:
            flat = residuals(problem, rows, out, features)
            residual = flat.reshape(-1, problem.heads, problem.classes)
        dots = alignments(features, residual, mean_grad, mean_bias_grad)
        if features.dtype.itemsize == 2 and problem.cu_seqlens is None:
            dots = dots + lost_self_term(out, rows, residual, problem.classes > problem.dim)
        alignment.copy_(torch.where(out.counted[rows], dots, 0))


def residual_tile(problem: Problem) -> str:
    """Say which tile the residual kernel takes."""
    from moso_fast.kernels.residual import choose_config  # imports Triton

    config = choose_config(problem.classes, loss=problem.loss, soft=problem.soft_labels)
    return (
        f"residuals in place, tile {config.block_rows} x {config.block_classes}, "
        f"{config.num_warps} warps"
    )


def features_and_norms(problem: Problem, rows: slice, out: RowBuffers) -> Tensor:
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
    problem: Problem, rows: slice, out: RowBuffers, features: Tensor, softmax: Any = None
) -> Tensor:
    """Residuals (n, K * C) in the memory of the logits; writes the statistics of the rows.

    ``softmax``: where to leave what residuals can be computed from again, or None.
    """
    from moso_fast.kernels.residual import RowOutputs, residual_rows  # imports Triton

    logits = logits_of(problem, features)
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
        softmax=softmax,
    )
    return logits


def lost_self_term(out: RowBuffers, rows: slice, residual: Tensor, both_rounded: bool) -> Tensor:
    """Return what rounding residuals took from each row's dot product with itself, (K, n).

    Scores are N a - q with the exact q: what a holds of the row's own gradient must be as exact,
    or the rounding of the largest term of a confident row would decide its score. A block of rows
    at a time: the terms of a whole chunk would take several times the memory of its logits.
    """
    rows_a_block = max(1, BLOCK_NUMBERS // residual.shape[1:].numel())
    blocks = residual.split(rows_a_block)
    lost = torch.cat([_lost_products(block, both_rounded) for block in blocks]).T
    return lost * out.feature_sqnorm[rows] / out.counted.sum().clamp_min(1)


def _lost_products(residual: Tensor, both_rounded: bool) -> Tensor:
    """Return |r|^2 less the product that the operands gave, (n, K)."""
    rounded = residual.to(torch.bfloat16).float()
    other = residual + rounded if both_rounded else residual
    return ((residual - rounded) * other).sum(-1)
