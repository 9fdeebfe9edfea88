"""Regime "stored": logits by cuBLAS, residuals in their place, products of our own after that.

First pass: a chunk's logits by cuBLAS, float32, overwritten by their residuals (one kernel, all
statistics), or written beside them, rounded, where the products take them so; then
sum r_i (outer) h_i. Second pass: the product with the mean gradient folded into one number a row
at once. No product writes a tensor of rows x classes but that of the logits.
"""

from __future__ import annotations

from torch import Tensor

from ....core.passes import FirstPass, RowBuffers
from ....core.problem import Problem
from ..products import (
    align_stored,
    alignment_tile,
    features_and_norms,
    kernel_features,
    sum_bytes,
    sum_gradients,
    sum_narrow_gradients,
    sum_tile,
)
from ..regime import Regime, operand_name
from .blas import (
    column_sums,
    narrow_ones,
    narrow_residuals,
    note_norms,
    residual_tile,
    residuals,
)


class StoredRegime(Regime):
    """cuBLAS logits, the in-place residual kernel, fused gradient sum and alignment."""

    name = "stored"
    feature_reads = 4  # norms, logits, gradient sum, alignments

    @classmethod
    def fits(cls, problem: Problem) -> str | None:
        """Return None: every problem of the backend."""
        return None

    def row_bytes(self) -> int:
        """Logits and copies, and rounded residuals where they do not lie in their place."""
        narrow = 2 * self.problem.classes if narrow_ones(self.problem) else 0
        return super().row_bytes() + narrow

    def fixed_bytes(self) -> int:
        """Gradient sums and what is added to them, in float64, and their float32 partials."""
        return sum_bytes(self.problem)

    def kernels(self) -> str:
        """Operands, tiles of the residual kernel and of the products."""
        problem = self.problem
        return (
            f"{operand_name(problem)} logits by cuBLAS, {residual_tile(problem)}, "
            f"{sum_tile(problem)}, {alignment_tile(problem)}"
        )

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem, kept = self.problem, None
        features = features_and_norms(problem, rows, out)
        if narrow_ones(problem):
            residual = narrow_residuals(self, rows, out, features)
            note_norms(problem, rows, out)
            grad = sum_narrow_gradients(self, rows, out, residual, features)
            kept = residual[:, None] if self.returns_residual else None
            return FirstPass(grad, column_sums(problem, residual), kept)
        residual = residuals(self, rows, out, features.to(self.operand))
        note_norms(problem, rows, out)
        sums = sum_gradients(self, rows, out, residual, features)
        if self.returns_residual:
            kept = residual.view(-1, problem.heads, problem.classes)
        return FirstPass(sums.grad, sums.bias, kept)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        if narrow_ones(problem):
            if residual is None:
                features = kernel_features(problem, rows)
                residual = narrow_residuals(self, rows, out, features)[:, None]
            flat = residual[:, 0, : problem.classes]
            align_stored(self, rows, out, flat, alignment, self.lost[rows])
            return
        if residual is None:
            features = kernel_features(problem, rows).to(self.operand)
            flat = residuals(self, rows, out, features)
        else:
            flat = residual.flatten(1)
        align_stored(self, rows, out, flat, alignment)
