"""What the regimes share around the product kernels: operands, gradient sums, alignments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...core.passes import RowBuffers
from ...core.problem import Problem
from .autotune import kind, tile_for
from .regime import Regime, limits_of, operand_dtype, tile_shape


class Sums(NamedTuple):
    """Sums over the rows, float64: ``grad`` (K, C, D) and ``bias`` (K, C)."""

    grad: Tensor
    bias: Tensor


def kernel_features(problem: Problem, rows: slice) -> Tensor:
    """Features of the rows as the kernels address them: any row stride, unit column stride."""
    features = problem.feature_rows(rows)
    if features.stride(1) != 1 and features.shape[1] > 1:
        return features.contiguous()
    return features


def aligned_rows(problem: Problem) -> bool:
    """Whether rows of the features, as the kernels get them, begin at multiples of 16 bytes."""
    from moso_fast.kernels.operands import aligned

    if problem.streamed or problem.features.stride(1) != 1:
        return problem.dim * problem.features.dtype.itemsize % 16 == 0
    return aligned(problem.features)


def row_outputs(out: RowBuffers, rows: slice) -> Any:
    """Return where a kernel that makes rows whole leaves what it finds: a ``RowOutputs``."""
    from moso_fast.kernels.row_arguments import RowOutputs

    return RowOutputs(
        out.loss[:, rows],
        out.residual_sqnorm[:, rows],
        out.margin[:, rows],
        out.entropy[:, rows],
        out.feature_sqnorm[rows],
        out.counted[rows],
    )


def features_and_norms(
    problem: Problem, rows: slice, out: RowBuffers, dirty: Tensor | None = None
) -> Tensor:
    """Features as they are; writes norms, counted rows and status, and never waits.

    Rows that are not finite stay: every product either touches their own results alone or skips
    rows that do not count. ``dirty`` (1,) int32 becomes 1 where there are any.
    """
    from moso_fast.kernels.row_norms import row_norms

    features = kernel_features(problem, rows)
    out.counted[rows] = problem.counted(rows)
    row_norms(
        features,
        out.counted[rows],
        out.feature_sqnorm[rows],
        out.status,
        first_row=rows.start,
        exclude_nonfinite=problem.nonfinite == "exclude",
        dirty=dirty,
    )
    return features


def sum_gradients(
    job: Regime, rows: slice, out: RowBuffers, residual: Tensor, features: Tensor
) -> Sums:
    """Sum r_i (outer) h_i and r_i over the counted rows; ``residual`` is (n, K * C)."""
    from moso_fast.kernels import gradient_sum as kernel
    from moso_fast.kernels.operands import aligned

    problem = job.problem
    counted, precision = out.counted[rows], problem.precision

    def launch(tile: Any) -> Any:
        return kernel.gradient_sum(
            residual, features, precision=precision, counted=counted, tile=tile
        )

    def pick() -> Any:
        operands = (job.operand == torch.bfloat16, aligned(residual) and aligned(features))
        width, dim = residual.shape[1], problem.dim
        key = kind("gradient_sum", width, dim, features.dtype, precision, *operands)
        wanted = kernel.choose_tile(width, dim, *operands)
        choices = [choice for choice in kernel.TILES if not choice.narrow]
        return pick_tile(problem, key, choices, wanted, operands, launch)

    sums = launch(job.tile("gradient_sum", pick))
    return Sums(sums.grad.view(problem.weight.shape), sums.bias.view(problem.weight.shape[:2]))


def sum_narrow_gradients(
    job: Regime, rows: slice, out: RowBuffers, residual: Tensor, features: Tensor
) -> Tensor:
    """Sum r_i (outer) h_i over the counted rows, (1, C, D); ``residual`` (n, M) as it is stored.

    Columns behind the C classes are zeros.
    """
    from moso_fast.kernels import gradient_sum as kernel
    from moso_fast.kernels.operands import aligned

    problem = job.problem
    counted, precision = out.counted[rows], problem.precision

    def launch(tile: Any) -> Any:
        return kernel.gradient_sum(
            residual, features, precision=precision, counted=counted, bias=False, tile=tile
        )

    def pick() -> Any:
        narrow = residual.dtype == torch.bfloat16
        is_aligned = aligned(residual) and aligned(features)
        operands = narrow, is_aligned
        width, dim = residual.shape[1], problem.dim
        key = kind("gradient_sum", width, dim, features.dtype, precision, *operands, "narrow")
        wanted = kernel.choose_tile(width, dim, *operands, narrow)
        choices = [choice for choice in kernel.TILES if choice.narrow == (narrow and is_aligned)]
        return pick_tile(problem, key, choices, wanted, operands, launch)

    grad = launch(job.tile("narrow_gradient_sum", pick)).grad
    return cast(Tensor, grad)[: problem.classes].view(problem.weight.shape)


def align_stored(
    job: Regime,
    rows: slice,
    out: RowBuffers,
    residual: Tensor,
    alignment: Tensor,
    lost: Tensor | None = None,
) -> None:
    """Write <g_i, G> of the rows from their residuals (n, K * C); G is ``job.gradient``.

    ``lost`` (n,): what rounding took from |r|^2, of residuals that are stored rounded.
    """
    from moso_fast.kernels import stored_alignment as kernel
    from moso_fast.kernels.operands import aligned

    problem = job.problem
    features = kernel_features(problem, rows)
    gradient, bias = job.gradient
    restored = self_term(problem, rows, out)

    def launch(tile: Any) -> None:
        kernel.stored_alignment(
            features,
            residual,
            gradient,
            alignment,
            mean_bias_grad=bias,
            counted=out.counted[rows],
            self_term=None if restored is None else kernel.SelfTerm(*restored, lost),
            precision=problem.precision,
            tile=tile,
        )

    def pick() -> Any:
        project = problem.classes <= problem.dim
        is_aligned = aligned(features) and aligned(gradient)
        if residual.dtype == torch.float32:  # narrow ones lie in rows of a length of their own
            is_aligned = is_aligned and aligned(residual)
            is_aligned = is_aligned and problem.classes * residual.element_size() % 16 == 0
        operands = (gradient.dtype == torch.bfloat16, is_aligned)
        tiles = kernel.PROJECT_TILES if project else kernel.PULL_TILES
        labels = (problem.heads, features.dtype, problem.precision, project, *operands)
        key = kind("stored_alignment", problem.classes, problem.dim, *labels, residual.dtype)
        major = limits_of(problem.device).major
        wanted = kernel.choose_tile(problem.classes, project, *operands, major)
        return pick_tile(problem, key, tiles, wanted, operands, launch)

    launch(job.tile("stored_alignment", pick))


def pick_tile(
    problem: Problem,
    key: str,
    choices: Iterable[Any],
    wanted: Any,
    operands: tuple[bool, bool],
    launch: Callable[[Any], object],
) -> Any:
    """Return the tile to launch a product kernel with.

    ``wanted``, what the kernel's own table gives for ``operands`` (rounded, aligned); another one
    where it needs more shared memory than this GPU has, or where a search finds a quicker one.
    """
    limits = limits_of(problem.device)

    def fitting(rounded: bool, aligned: bool) -> list[Any]:
        return [
            choice.tile
            for choice in choices
            if (choice.rounded, choice.aligned) == (rounded, aligned)
            and limits.major in getattr(choice, "majors", (limits.major,))
            and choice.tile.shared_bytes <= limits.shared_bytes
        ]

    # Tiles for rows that are not aligned are smaller, and serve aligned rows too.
    tiles = fitting(*operands) or fitting(operands[0], False)
    default = wanted if wanted in tiles or not tiles else tiles[0]
    return tile_for(problem.device, key, tiles, default, launch)


def self_term(problem: Problem, rows: slice, out: RowBuffers) -> tuple[Tensor, Tensor] | None:
    """|h_i|^2 and N where rounded operands lose part of a row's product with itself, else None.

    See ``lost_self_term`` in ``regimes/blas.py``, which does the same for products by cuBLAS.
    """
    if operand_dtype(problem) != torch.bfloat16 or problem.cu_seqlens is not None:
        return None
    return out.feature_sqnorm[rows], out.number_counted()


def sum_bytes(problem: Problem) -> int:
    """Bytes of gradient sums and what is added to them, in float64, and of float32 partials."""
    from moso_fast.kernels.gradient_sum import PARTIAL_BYTES

    elements = problem.weight.numel()
    return 16 * elements + max(4 * elements, PARTIAL_BYTES)


def sum_tile(problem: Problem) -> str:
    """Say which tile the gradient sum takes for aligned operands."""
    from moso_fast.kernels import gradient_sum

    rounded = operand_dtype(problem) == torch.bfloat16
    width = problem.heads * problem.classes
    return f"R^T H tile {tile_shape(gradient_sum.choose_tile(width, problem.dim, rounded))}"


def alignment_tile(problem: Problem) -> str:
    """Say which tile the alignment from residuals takes for aligned operands."""
    from moso_fast.kernels import stored_alignment

    rounded = operand_dtype(problem) == torch.bfloat16
    project = problem.classes <= problem.dim
    major = limits_of(problem.device).major
    tile = stored_alignment.choose_tile(problem.classes, project, rounded, True, major)
    return f"{'H G^T' if project else 'R G'} tile {tile_shape(tile)}"
