"""What the regimes share around the product kernels: operands, gradient sums, alignments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import RowBuffers
from ..problem import STATUS_FEATURE, Problem
from ._triton_autotune import kind, tile_for
from ._triton_regime import limits_of, operand_dtype, tile_shape
from .common import note


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


def features_and_norms(problem: Problem, rows: slice, out: RowBuffers) -> Tensor:
    """Features as they are; writes norms, counted rows and status, and never waits.

    Rows that are not finite stay: every product either touches their own results alone or skips
    rows that do not count.
    """
    features = kernel_features(problem, rows)
    counted = problem.counted(rows)
    # The largest magnitude: |h| may overflow although every number of the row is finite.
    largest = torch.linalg.vector_norm(features, float("inf"), dim=1)
    finite = torch.isfinite(largest)
    norm = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    if problem.nonfinite == "exclude":
        counted &= finite
    else:
        note(out.status, STATUS_FEATURE, counted & ~finite, rows)
    out.feature_sqnorm[rows] = torch.where(finite, norm.square(), 0)
    out.counted[rows] = counted
    return features


def sum_gradients(
    problem: Problem, rows: slice, out: RowBuffers, residual: Tensor, features: Tensor
) -> Sums:
    """Sum r_i (outer) h_i and r_i over the counted rows; ``residual`` is (n, K * C)."""
    from moso_fast.kernels import gradient_sum as kernel
    from moso_fast.kernels.operands import aligned

    counted, precision = out.counted[rows], problem.precision

    def launch(tile: Any) -> Any:
        return kernel.gradient_sum(
            residual, features, precision=precision, counted=counted, tile=tile
        )

    operands = (operand_dtype(problem) == torch.bfloat16, aligned(residual) and aligned(features))
    width, dim = residual.shape[1], problem.dim
    key = kind("gradient_sum", width, dim, features.dtype, precision, *operands)
    wanted = kernel.choose_tile(width, dim, *operands)
    sums = launch(pick_tile(problem, key, kernel.TILES, wanted, operands, launch))
    return Sums(sums.grad.view(problem.weight.shape), sums.bias.view(problem.weight.shape[:2]))


def align_stored(
    problem: Problem,
    rows: slice,
    out: RowBuffers,
    mean_grad: Tensor,
    mean_bias_grad: Tensor | None,
    residual: Tensor,
    alignment: Tensor,
) -> None:
    """Write <g_i, G> of the rows from their residuals (n, K * C)."""
    from moso_fast.kernels import stored_alignment as kernel
    from moso_fast.kernels.operands import aligned

    features = kernel_features(problem, rows)
    gradient, bias = operand_gradient(problem, mean_grad, mean_bias_grad)
    restored = self_term(problem, rows, out)

    def launch(tile: Any) -> None:
        kernel.stored_alignment(
            features,
            residual,
            gradient,
            alignment,
            mean_bias_grad=bias,
            counted=out.counted[rows],
            self_term=None if restored is None else kernel.SelfTerm(*restored),
            precision=problem.precision,
            tile=tile,
        )

    project = problem.classes <= problem.dim
    straight = all(aligned(matrix) for matrix in (features, residual, gradient))
    straight = straight and problem.classes * residual.element_size() % 16 == 0
    operands = (gradient.dtype == torch.bfloat16, straight)
    tiles = kernel.PROJECT_TILES if project else kernel.PULL_TILES
    labels = (problem.heads, features.dtype, problem.precision, project, *operands)
    key = kind("stored_alignment", problem.classes, problem.dim, *labels)
    major = limits_of(problem.device).major
    wanted = kernel.choose_tile(problem.classes, project, *operands, major)
    launch(pick_tile(problem, key, tiles, wanted, operands, launch))


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

    See ``lost_self_term`` in ``_triton_blas.py``, which does the same for products by cuBLAS.
    """
    if operand_dtype(problem) != torch.bfloat16 or problem.cu_seqlens is not None:
        return None
    return out.feature_sqnorm[rows], out.counted.sum()


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


def operand_gradient(
    problem: Problem, mean_grad: Tensor, mean_bias_grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """G (K * C, D) in the dtype of the operands, and its bias part (K * C,)."""
    gradient = mean_grad.reshape(-1, problem.dim).to(operand_dtype(problem)).contiguous()
    return gradient, None if mean_bias_grad is None else mean_bias_grad.reshape(-1).contiguous()
