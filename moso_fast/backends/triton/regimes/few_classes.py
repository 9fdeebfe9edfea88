"""Regime "few_classes": the features are read once a pass, everything else stays on the chip.

First pass: one kernel makes logits, residuals, all statistics and the gradient sum from one read
of a tile of features. Second pass: one kernel reads the features again, backwards, beside stored
residuals, or makes the residuals again from the same read where they are not kept. Every loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....core.engine import FirstPass, RowBuffers
from ....core.problem import Problem
from ..autotune import kind, tile_for
from ..products import kernel_features, row_outputs, self_term, straight_rows
from .regime import (
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

    def fits(self, problem: Problem) -> str | None:
        """Return why not: a C and D that no tile holds, or none without spills in this Triton."""
        if _default(problem, "first") and _default(problem, "second"):
            return None
        what = f"no tile holds C = {problem.classes} and D = {problem.dim}"
        if _default(problem, "first", version=_ANY) and _default(problem, "second", version=_ANY):
            return f"{what} without spills in Triton {'.'.join(map(str, triton_version()))}"
        return what

    def row_bytes(self, problem: Problem) -> int:
        """Its share of a partial sum, labels, and the features where they must be copied."""
        from ....kernels.operands import MOST_ROWS

        a_row = 16 + 4 * problem.weight.numel() // MOST_ROWS[problem.precision]
        if problem.features.stride(1) != 1:
            a_row += problem.dim * problem.features.dtype.itemsize
        return a_row

    def fixed_bytes(self, problem: Problem) -> int:
        """Gradient sums in float64, and one partial sum for each of the fewest slabs."""
        return (8 + 4 * 264) * problem.weight.numel()

    def describe(self, problem: Problem) -> str:
        """Products and tiles."""
        first, second = _default(problem, "first"), _default(problem, "second")
        return (
            f"{first.products} products, one kernel a pass, tiles {tile_shape(first.tile)} and "
            f"{tile_shape(second.tile)}"
        )

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        from ....kernels.few_classes import few_classes_first

        features = kernel_features(problem, rows)
        shape = (features.shape[0], problem.heads, problem.classes)
        residual = None
        if keep_residual:
            residual = torch.empty(shape, dtype=torch.float32, device=problem.device)
        weight, bias = _heads(problem)
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

        sums = launch(_choice(problem, "first", features, launch))
        return FirstPass(sums.grad, sums.bias, residual)  # overflows of norms: the kernel's work

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
        from ....kernels.few_classes import Recompute, few_classes_second

        features = kernel_features(problem, rows)
        source: Any = Recompute(
            *_heads(problem),
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
                mean_grad.contiguous(),
                None if mean_bias_grad is None else mean_bias_grad.contiguous(),
                counted=out.counted[rows],
                feature_sqnorm=out.feature_sqnorm[rows],
                out=alignment,
                count=None if restored is None else restored[1],
                precision=problem.precision,
                choice=choice,
            )

        launch(_choice(problem, "second", features, launch, residual is not None))


def _heads(problem: Problem) -> tuple[Tensor, Tensor | None]:
    bias = None if problem.bias is None else problem.bias.contiguous()
    return problem.weight.contiguous(), bias


def _version() -> tuple[int, ...]:
    """Version of the Triton that compiles; the interpreter runs every tile."""
    return _ANY if interpreted() else triton_version()


def _default(
    problem: Problem,
    which: str,
    straight: bool | None = None,
    version: tuple[int, ...] | None = None,
) -> Any:
    """Return the tile that the kernels' own table gives the first or second pass, or None."""
    from ....kernels import few_classes_tiles as tiles
    from ....kernels.operands import products_of

    straight = straight_rows(problem) if straight is None else straight
    products = products_of(problem.features.dtype, problem.precision)
    classes, heads = problem.classes, problem.heads
    limits = (limits_of(problem.device).shared_bytes, version or _version())
    if which == "second":
        return tiles.choose_second_tile(classes, heads, products, straight, *limits)
    return tiles.choose_first_tile(classes, heads, problem.dim, products, straight, *limits)


def _choice(problem: Problem, which: str, features: Tensor, launch: Any, *labels: object) -> Any:
    """Return the default tile, or the quickest of those that hold the problem."""
    from ....kernels import few_classes_tiles as tiles
    from ....kernels.operands import aligned

    straight = aligned(features)
    default = _default(problem, which, straight)
    shared = limits_of(problem.device).shared_bytes
    candidates = [
        c
        for c in (tiles.FIRST_TILES if which == "first" else tiles.SECOND_TILES)
        if (c.products, c.aligned) == (default.products, straight)
        and problem.classes <= c.tile.classes
        and (which == "second" or problem.dim <= c.tile.dim)
        and c.tile.shared_bytes <= shared
        and _version() >= c.since
    ]
    labels = (problem.heads, problem.loss, features.dtype, default.products, straight, *labels)
    key = kind(f"few_classes_{which}", problem.classes, problem.dim, *labels)
    return tile_for(problem.device, key, candidates, default, launch)
