"""Regime "row_tiles": a tile of rows holds all classes, so logits never leave the chip.

First pass: one kernel reads the features and leaves residuals, in the dtype that the products
read, and every statistic, norms of the rows too; a second one makes the gradient sum of residuals
and features. Second pass: the product with the mean gradient, folded into one number a row. Three
reads of the features, none of the logits; one head, every loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....core.passes import FirstPass, RowBuffers
from ....core.problem import Problem
from ..autotune import kind, tile_for
from ..products import (
    align_stored,
    aligned_rows,
    alignment_tile,
    kernel_features,
    row_outputs,
    sum_bytes,
    sum_narrow_gradients,
)
from ..regime import (
    Regime,
    kernel_targets,
    kernel_weights,
    limits_of,
    tile_shape,
)


class RowTilesRegime(Regime):
    """Rows kernel, gradient sum, alignment from stored residuals."""

    name = "row_tiles"
    feature_reads = 3

    @classmethod
    def fits(cls, problem: Problem) -> str | None:
        """Return why not: several heads, sequences, or a C that no tile holds."""
        if problem.heads > 1:
            return "it takes one head, and they share the features"
        if problem.cu_seqlens is not None:
            return "samples of several rows need every residual in float32"
        if _tile(problem, aligned_rows(problem)) is None:
            return f"no tile holds C = {problem.classes} with these operands"
        return None

    def row_bytes(self) -> int:
        """Residuals as stored, labels, and the features where they must be copied."""
        problem = self.problem
        a_row = 16 + self.operand.itemsize * (problem.classes + 8)
        if problem.features.stride(1) != 1:
            a_row += problem.dim * problem.features.dtype.itemsize
        return a_row

    def fixed_bytes(self) -> int:
        """Gradient sums in float64 and their float32 partials."""
        return sum_bytes(self.problem)

    def state_bytes(self) -> int:
        """One number a row where residuals are rounded."""
        return 4 * self.problem.rows if self.operand.itemsize == 2 else 0

    def kernels(self) -> str:
        """Products and tiles."""
        from moso_fast.kernels import gradient_sum

        problem = self.problem
        rounded, is_aligned = self.operand.itemsize == 2, aligned_rows(problem)
        tile = _tile(problem, is_aligned)
        sums = gradient_sum.choose_tile(problem.classes, problem.dim, rounded, is_aligned, rounded)
        return (
            f"{_products(problem)} products, rows tile {tile_shape(tile)}, R^T H tile "
            f"{tile_shape(sums)}, {alignment_tile(problem)}"
        )

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        features = kernel_features(self.problem, rows)
        residual, bias = self._residuals(rows, out, features)
        grad = sum_narrow_gradients(self, rows, out, residual, features)
        kept = residual[:, None] if self.returns_residual else None
        return FirstPass(grad, bias.view(1, -1), kept)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        if residual is None:
            flat = self._residuals(rows, out, kernel_features(self.problem, rows))[0]
        else:
            flat = residual[:, 0]
        lost = self.lost[rows] if flat.dtype == torch.bfloat16 else None
        align_stored(self, rows, out, flat[:, : self.problem.classes], alignment, lost)

    def _residuals(self, rows: slice, out: RowBuffers, features: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (n, columns), their sum (C,); writes statistics, norms, status and ``lost``."""
        from moso_fast.kernels import row_tiles as kernel
        from moso_fast.kernels.operands import aligned

        problem = self.problem
        weight, bias = self.float_heads
        outputs = row_outputs(out, rows)

        def launch(tile: Any) -> Any:
            return kernel.row_tiles(
                features,
                weight,
                bias,
                kernel_targets(problem, rows),
                out=outputs,
                status=out.status,
                first_row=rows.start,
                loss=problem.loss,
                label_smoothing=problem.label_smoothing,
                ignore_index=problem.ignore_index,
                sample_weight=kernel_weights(problem, rows),
                exclude_nonfinite=problem.nonfinite == "exclude",
                precision=problem.precision,
                tile=tile,
            )

        def pick() -> Any:
            products, is_aligned = _products(problem), aligned(features)
            limits, default = limits_of(problem.device), _tile(problem, is_aligned)
            candidates = [
                choice.tile
                for choice in kernel.TILES
                if (choice.products, choice.aligned) == (products, is_aligned)
                and limits.major in choice.majors
                and _kind(problem) in choice.losses
                and problem.classes <= choice.tile.classes <= 2 * default.classes
                and choice.tile.shared_bytes <= limits.shared_bytes
            ]
            labels = (problem.loss, features.dtype, products, is_aligned)
            key = kind("row_tiles", problem.classes, problem.dim, *labels)
            return tile_for(problem.device, key, candidates, default, launch)

        made = launch(self.tile("row_tiles", pick))
        if made.lost is not None:
            self.lost[rows] = made.lost
        return made.residual, made.bias


def _products(problem: Problem) -> str:
    from moso_fast.kernels.operands import products_of

    return products_of(problem.features.dtype, problem.precision)


def _tile(problem: Problem, is_aligned: bool) -> Any:
    """Return the tile of the rows kernel for these operands, or None."""
    from moso_fast.kernels.row_tiles import choose_tile

    limits = limits_of(problem.device)
    return choose_tile(
        problem.classes,
        _products(problem),
        is_aligned,
        limits.shared_bytes,
        limits.major,
        _kind(problem),
    )


def _kind(problem: Problem) -> str:
    """Return what the kernels call the problem's loss and targets."""
    from moso_fast.kernels.row_arguments import kind_of

    return kind_of(problem.loss, problem.labels)
