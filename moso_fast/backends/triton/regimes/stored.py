"""Regime "stored": logits by cuBLAS, residuals in their place, products of our own after that.

First pass: a chunk's logits by cuBLAS, float32, overwritten by their residuals (one kernel, all
statistics), or written beside them, rounded, where the products take them so; then
sum r_i (outer) h_i. Second pass: the product with the mean gradient folded into one number a row
at once. No product writes a tensor of rows x classes but that of the logits.
"""

from __future__ import annotations

from torch import Tensor

from ....core.engine import FirstPass, RowBuffers
from ....core.problem import Problem
from ..products import (
    align_stored,
    alignment_tile,
    features_and_norms,
    kernel_features,
    lost_of,
    sum_gradients,
    sum_narrow_gradients,
    sum_tile,
)
from .blas import (
    column_sums,
    narrow_ones,
    narrow_residuals,
    note_norms,
    residual_tile,
    residuals,
)
from .regime import Regime, operand_dtype, operand_name


class StoredRegime(Regime):
    """cuBLAS logits, the in-place residual kernel, fused gradient sum and alignment."""

    name = "stored"
    feature_reads = 4  # norms, logits, gradient sum, alignments

    def fits(self, problem: Problem) -> str | None:
        """Return None: every problem of the backend."""
        return None

    def row_bytes(self, problem: Problem) -> int:
        """Logits, and a copy of the features where cuBLAS cannot take them as they are."""
        a_row = 4 * problem.heads * problem.classes
        if narrow_ones(problem):
            a_row += 2 * problem.classes
        if operand_dtype(problem) != problem.features.dtype:
            a_row += 4 * problem.dim
        return a_row

    def fixed_bytes(self, problem: Problem) -> int:
        """Gradient sums and what is added to them, in float64, and their float32 partials."""
        from ....kernels.gradient_sum import PARTIAL_BYTES

        numbers = problem.weight.numel()
        return 16 * numbers + max(4 * numbers, PARTIAL_BYTES)

    def describe(self, problem: Problem) -> str:
        """Operands, tiles of the residual kernel and of the products."""
        return (
            f"{operand_name(problem)} logits by cuBLAS, {residual_tile(problem)}, "
            f"{sum_tile(problem)}, {alignment_tile(problem)}"
        )

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        features = features_and_norms(problem, rows, out)
        if narrow_ones(problem):
            residual = narrow_residuals(problem, rows, out, features)
            note_norms(problem, rows, out)
            grad = sum_narrow_gradients(problem, rows, out, residual, features)
            kept = residual[:, None] if keep_residual else None
            return FirstPass(grad, column_sums(problem, residual), kept)
        residual = residuals(problem, rows, out, features.to(operand_dtype(problem)))
        note_norms(problem, rows, out)
        sums = sum_gradients(problem, rows, out, residual, features)
        shaped = residual.view(-1, problem.heads, problem.classes)
        return FirstPass(sums.grad, sums.bias, shaped if keep_residual else None)

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
        if narrow_ones(problem):
            if residual is None:
                features = kernel_features(problem, rows)
                residual = narrow_residuals(problem, rows, out, features)[:, None]
            flat, lost = residual[:, 0, : problem.classes], lost_of(problem, out, rows)
            align_stored(problem, rows, out, mean_grad, mean_bias_grad, flat, alignment, lost)
            return
        if residual is None:
            features = kernel_features(problem, rows).to(operand_dtype(problem))
            flat = residuals(problem, rows, out, features)
        else:
            flat = residual.flatten(1)
        align_stored(problem, rows, out, mean_grad, mean_bias_grad, flat, alignment)
