"""Regime "few_classes": the features are read once a pass, everything else stays on the chip.

First pass: one kernel makes logits, residuals, all statistics and the gradient sum from one read
of a tile of features. Second pass: one kernel reads the features again, backwards, beside stored
residuals, or makes the residuals again from the same read where they are not kept. Every loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....core.passes import FirstPass, RowBuffers
from ....core.problem import Problem
from ..autotune import kind, tile_for
from ..products import aligned_rows, kernel_features, row_outputs, self_term
from ..regime import (
    Regime,
    interpreted,
    kernel_targets,
    kernel_weights,
    limits_of,
    tile_shape,
    triton_version,
)

_ANY = (999,)  # newer than any Triton that a tile asks for


class FewClassesRegime(Regime):
    """One kernel a pass."""

    name = "few_classes"
    feature_reads = 2

    @classmethod
    def fits(cls, problem: Problem) -> str | None:
        """Return why not: a C and D that no tile holds, or none without spills in this Triton."""
        if _default(problem, "first") and _default(problem, "second"):
            return None
        what = f"no tile holds C = {problem.classes} and D = {problem.dim}"
        if _default(problem, "first", version=_ANY) and _default(problem, "second", version=_ANY):
            return f"{what} without spills in Triton {'.'.join(map(str, triton_version()))}"
        return what

    def row_bytes(self) -> int:
        """Its share of a partial sum, labels, and the features where they must be copied."""
        from moso_fast.kernels.operands import MOST_ROWS

        problem = self.problem
        a_row = 16 + 4 * problem.weight.numel() // MOST_ROWS[problem.precision]
        if problem.features.stride(1) != 1:
            a_row += problem.dim * problem.features.dtype.itemsize
        return a_row

    def fixed_bytes(self) -> int:
        """Gradient sums in float64, and one partial sum for each of the fewest slabs."""
        return (8 + 4 * 264) * self.problem.weight.numel()

    def kernels(self) -> str:
        """Products and tiles."""
        first, second = _default(self.problem, "first"), _default(self.problem, "second")
        return (
            f"{first.products} products, one kernel a pass, tiles {tile_shape(first.tile)} and "
            f"{tile_shape(second.tile)}"
        )

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        from moso_fast.kernels.few_classes import few_classes_first

        problem, residual = self.problem, None
        features = kernel_features(problem, rows)
        shape = (features.shape[0], problem.heads, problem.classes)
        if self.returns_residual:
            residual = torch.empty(shape, dtype=torch.float32, device=problem.device)
        weight, bias = self.float_heads
        outputs = row_outputs(out, rows)

        def launch(choice: Any) -> Any:
            return few_classes_first(
                features,
                weight,
                bias,
                kernel_targets(problem, rows),
                out=outputs,
                status=out.status,
                first_row=rows.start,
                residual=None if residual is None else residual.flatten(1),
                loss=problem.loss,
                label_smoothing=problem.label_smoothing,
                ignore_index=problem.ignore_index,
                sample_weight=kernel_weights(problem, rows),
                exclude_nonfinite=problem.nonfinite == "exclude",
                precision=problem.precision,
                choice=choice,
            )

        pick = partial(_choice, problem, "first", features, launch)
        sums = launch(self.tile("few_classes_first", pick))
        return FirstPass(sums.grad, sums.bias, residual)  # overflows of norms: the kernel's work

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        from moso_fast.kernels.few_classes import Recompute, few_classes_second

        problem = self.problem
        features = kernel_features(problem, rows)
        source: Any = Recompute(
            *self.float_heads,
            kernel_targets(problem, rows),
            problem.loss,
            problem.label_smoothing,
            problem.ignore_index,
            kernel_weights(problem, rows),
        )
        if residual is not None:
            source = residual.flatten(1)
        restored = self_term(problem, rows, out)

        def launch(choice: Any) -> None:
            few_classes_second(
                features,
                source,
                self.mean_grad,
                self.mean_bias_grad,
                counted=out.counted[rows],
                feature_sqnorm=out.feature_sqnorm[rows],
                out=alignment,
                count=None if restored is None else restored[1],
                precision=problem.precision,
                choice=choice,
            )

        pick = partial(_choice, problem, "second", features, launch, residual is not None)
        launch(self.tile("few_classes_second", pick))

    def begin_second(self, mean_grad: Tensor, mean_bias_grad: Tensor | None) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        # The kernels round or split G themselves.
        bias = None if mean_bias_grad is None else mean_bias_grad.contiguous()
        self.mean_grad, self.mean_bias_grad = mean_grad.contiguous(), bias


def _version() -> tuple[int, ...]:
    """Version of the Triton that compiles; the interpreter runs every tile."""
    return _ANY if interpreted() else triton_version()


def _default(
    problem: Problem,
    which: str,
    is_aligned: bool | None = None,
    version: tuple[int, ...] | None = None,
) -> Any:
    """Return the tile that the kernels' own table gives the first or second pass, or None."""
    from moso_fast.kernels import few_classes_tiles as tiles
    from moso_fast.kernels.operands import products_of

    is_aligned = aligned_rows(problem) if is_aligned is None else is_aligned
    products = products_of(problem.features.dtype, problem.precision)
    classes, heads = problem.classes, problem.heads
    limits = (limits_of(problem.device).shared_bytes, version or _version())
    if which == "second":
        return tiles.choose_second_tile(classes, heads, products, is_aligned, *limits)
    return tiles.choose_first_tile(classes, heads, problem.dim, products, is_aligned, *limits)


def _choice(problem: Problem, which: str, features: Tensor, launch: Any, *labels: object) -> Any:
    """Return the default tile, or the quickest of those that hold the problem."""
    from moso_fast.kernels import few_classes_tiles as tiles
    from moso_fast.kernels.operands import aligned

    is_aligned = aligned(features)
    default = _default(problem, which, is_aligned)
    shared = limits_of(problem.device).shared_bytes
    candidates = [
        c
        for c in (tiles.FIRST_TILES if which == "first" else tiles.SECOND_TILES)
        if (c.products, c.aligned) == (default.products, is_aligned)
        and problem.classes <= c.tile.classes
        and (which == "second" or problem.dim <= c.tile.dim)
        and c.tile.shared_bytes <= shared
        and _version() >= c.since
    ]
    labels = (problem.heads, problem.loss, features.dtype, default.products, is_aligned, *labels)
    key = kind(f"few_classes_{which}", problem.classes, problem.dim, *labels)
    return tile_for(problem.device, key, candidates, default, launch)
