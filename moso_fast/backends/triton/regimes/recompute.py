"""Regime "recompute": residuals that do not fit in memory are made again beside the alignment.

First pass: as in "stored", but all that stays of a row and head are three numbers of its softmax.
Second pass: one kernel multiplies a tile of features with the weights and the mean gradient at
once, turns the logits into residuals by those three numbers, and folds both into the alignment.
It writes one number a row: no tensor of rows x classes exists in the second pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....core.engine import FirstPass, RowBuffers
from ....core.problem import Problem
from ..autotune import kind
from ..products import (
    features_and_norms,
    kernel_features,
    operand_gradient,
    pick_tile,
    self_term,
    sum_gradients,
    sum_tile,
)
from .blas import note_norms, residual_tile, residuals
from .regime import (
    Regime,
    kernel_weights,
    limits_of,
    operand_dtype,
    operand_name,
    tile_shape,
)

_STATE = "softmax"


class RecomputeRegime(Regime):
    """cuBLAS logits in the first pass, logits and alignments in one kernel in the second."""

    name = "recompute"
    feature_reads = 4  # norms, logits, gradient sum, alignments
    stores_residuals = False

    def fits(self, problem: Problem) -> str | None:
        """Return why not: what other losses need besides the logits."""
        if problem.loss != "cross_entropy" or problem.soft_labels:
            return "it makes residuals again for cross-entropy with class ids alone"
        return None

    def row_bytes(self, problem: Problem) -> int:
        """Logits, and a copy of the features where cuBLAS cannot take them as they are."""
        a_row = 4 * problem.heads * problem.classes
        if operand_dtype(problem) != problem.features.dtype:
            a_row += 4 * problem.dim
        return a_row

    def fixed_bytes(self, problem: Problem) -> int:
        """Gradient sums and what is added to them, in float64, and their float32 partials."""
        from ....kernels.gradient_sum import PARTIAL_BYTES

        numbers = problem.weight.numel()
        return 16 * numbers + max(4 * numbers, PARTIAL_BYTES)

    def state_bytes(self, problem: Problem) -> int:
        """Three numbers a row and head."""
        return 12 * problem.heads * problem.rows

    def describe(self, problem: Problem) -> str:
        """Operands and tiles."""
        from ....kernels import stacked_alignment

        rounded = operand_dtype(problem) == torch.bfloat16
        major = limits_of(problem.device).major
        tile = stacked_alignment.choose_tile(problem.classes, rounded, True, major)
        return (
            f"{operand_name(problem)} logits by cuBLAS, {residual_tile(problem)}, "
            f"{sum_tile(problem)}, H [W; G]^T tile {tile_shape(tile)}"
        )

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        features = features_and_norms(problem, rows, out)
        state = _state(out, rows)
        operands = features.to(operand_dtype(problem))
        residual = residuals(problem, rows, out, operands, state)
        note_norms(problem, rows, out)
        sums = sum_gradients(problem, rows, out, residual, features)
        # The second pass has no use for residuals; the norms of sequences have.
        shaped = residual.view(-1, problem.heads, problem.classes)
        wanted = keep_residual and problem.cu_seqlens is not None
        return FirstPass(sums.grad, sums.bias, shaped if wanted else None)

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
        from ....kernels import stacked_alignment as kernel
        from ....kernels.operands import aligned

        features = kernel_features(problem, rows)
        gradient, bias_gradient = operand_gradient(problem, mean_grad, mean_bias_grad)
        weight = problem.weight.reshape(-1, problem.dim).to(gradient.dtype)
        bias = None if problem.bias is None else problem.bias.reshape(-1).contiguous()
        restored = self_term(problem, rows, out)

        def launch(tile: Any) -> None:
            kernel.stacked_alignment(
                features,
                weight,
                gradient,
                problem.labels[rows].contiguous(),
                _state(out, rows),
                alignment,
                bias=bias,
                mean_bias_grad=bias_gradient,
                label_smoothing=problem.label_smoothing,
                sample_weight=kernel_weights(problem, rows),
                self_term=None if restored is None else kernel.SelfTerm(*restored),
                precision=problem.precision,
                tile=tile,
            )

        straight = all(aligned(matrix) for matrix in (features, weight, gradient))
        operands = (gradient.dtype == torch.bfloat16, straight)
        labels = (problem.heads, features.dtype, problem.precision, *operands)
        key = kind("stacked_alignment", problem.classes, problem.dim, *labels)
        major = limits_of(problem.device).major
        wanted = kernel.choose_tile(problem.classes, *operands, major)
        launch(pick_tile(problem, key, kernel.TILES, wanted, operands, launch))


def _state(out: RowBuffers, rows: slice) -> Any:
    """Three numbers of the softmax of every row and head: a ``SoftmaxState`` of these rows."""
    from ....kernels.residual import SoftmaxState

    if _STATE not in out.scratch:
        out.scratch[_STATE] = SoftmaxState(*(torch.empty_like(out.loss) for _ in range(3)))
    return SoftmaxState(*(value[:, rows] for value in out.scratch[_STATE]))
