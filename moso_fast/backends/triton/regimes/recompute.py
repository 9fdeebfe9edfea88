"""Regime "recompute": residuals that do not fit in memory are made again beside the alignment.

First pass: as in "stored", but all that stays of a row and head are three numbers of its softmax.
Second pass: one kernel multiplies a tile of features with the weights and the mean gradient at
once, turns the logits into residuals by those three numbers, and folds both into the alignment.
It writes one number a row: no tensor of rows x classes exists in the second pass.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ....core.passes import FirstPass, RowBuffers
from ....core.problem import Problem
from ..autotune import kind
from ..products import (
    features_and_norms,
    kernel_features,
    pick_tile,
    self_term,
    sum_bytes,
    sum_gradients,
    sum_tile,
)
from ..regime import (
    Regime,
    kernel_weights,
    limits_of,
    operand_name,
    tile_shape,
)
from .blas import note_norms, residual_tile, residuals


class RecomputeRegime(Regime):
    """cuBLAS logits in the first pass, logits and alignments in one kernel in the second."""

    name = "recompute"
    feature_reads = 4  # norms, logits, gradient sum, alignments
    stores_residuals = False

    @classmethod
    def fits(cls, problem: Problem) -> str | None:
        """Return why not: what other losses need besides the logits."""
        if problem.loss != "cross_entropy" or problem.soft_labels:
            return "it makes residuals again for cross-entropy with class ids alone"
        return None

    def fixed_bytes(self) -> int:
        """Gradient sums and what is added to them, in float64, and their float32 partials."""
        return sum_bytes(self.problem)

    def state_bytes(self) -> int:
        """Three numbers a row and head."""
        return 12 * self.problem.heads * self.problem.rows

    def kernels(self) -> str:
        """Operands and tiles."""
        from moso_fast.kernels import stacked_alignment

        problem = self.problem
        rounded = self.operand == torch.bfloat16
        major = limits_of(problem.device).major
        tile = stacked_alignment.choose_tile(problem.classes, rounded, True, major)
        return (
            f"{operand_name(problem)} logits by cuBLAS, {residual_tile(problem)}, "
            f"{sum_tile(problem)}, H [W; G]^T tile {tile_shape(tile)}"
        )

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        features = features_and_norms(problem, rows, out)
        residual = residuals(self, rows, out, features.to(self.operand), self._state(rows))
        note_norms(problem, rows, out)
        sums = sum_gradients(self, rows, out, residual, features)
        # The second pass has no use for residuals; the norms of sequences have.
        wanted = None
        if problem.cu_seqlens is not None:
            wanted = residual.view(-1, problem.heads, problem.classes)
        return FirstPass(sums.grad, sums.bias, wanted)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        from moso_fast.kernels import stacked_alignment as kernel
        from moso_fast.kernels.operands import aligned

        problem = self.problem
        features = kernel_features(problem, rows)
        (weight, bias), (gradient, bias_gradient) = self.heads, self.gradient
        restored = self_term(problem, rows, out)

        def launch(tile: Any) -> None:
            kernel.stacked_alignment(
                features,
                weight,
                gradient,
                problem.labels[rows].contiguous(),
                self._state(rows),
                alignment,
                bias=bias,
                mean_bias_grad=bias_gradient,
                label_smoothing=problem.label_smoothing,
                sample_weight=kernel_weights(problem, rows),
                self_term=None if restored is None else kernel.SelfTerm(*restored),
                precision=problem.precision,
                tile=tile,
            )

        def pick() -> Any:
            is_aligned = all(aligned(matrix) for matrix in (features, weight, gradient))
            operands = (gradient.dtype == torch.bfloat16, is_aligned)
            labels = (problem.heads, features.dtype, problem.precision, *operands)
            key = kind("stacked_alignment", problem.classes, problem.dim, *labels)
            major = limits_of(problem.device).major
            wanted = kernel.choose_tile(problem.classes, *operands, major)
            return pick_tile(problem, key, kernel.TILES, wanted, operands, launch)

        launch(self.tile("stacked_alignment", pick))

    @cached_property
    def _softmax(self) -> Any:
        """Three numbers of the softmax of every row and head, (K, rows) each."""
        from moso_fast.kernels.residual import SoftmaxState

        shape, device = (self.problem.heads, self.problem.rows), self.problem.device
        return SoftmaxState(*(torch.empty(shape, device=device) for _ in range(3)))

    def _state(self, rows: slice) -> Any:
        """Those of ``rows``."""
        return type(self._softmax)(*(value[:, rows] for value in self._softmax))
