"""Second pass with stored residuals: every row's dot product with the mean gradient.

    a_i = sum_c r_ic (G_c . h_i + gb_c)  =  sum_d (R G)_id h_id + sum_c r_ic gb_c

for each of K heads. Two orders of the same product, whichever is smaller:

    project   S = H G^T (n, C), then sum over c of R (S + gb);   for C <= D
    pull      Q = R G   (n, D), then sum over d of Q H, and R gb; for C >  D

Neither S nor Q exists in memory: a program multiplies a tile of it and folds it at once into one
number a row. Programs of the project order own BLOCK_ROWS rows and walk the class tiles::

      row tile   h | G_0^T | G_1^T | G_2^T | ..     h is read again for every class tile: from L2
                     x R_0   x R_1   x R_2          as long as the rows in flight fit there

so the classes are split among SPLITS programs where the row tiles alone would not fill a GPU or
not fit its L2; the parts are added in a fixed order. Rows run backwards: the last ones of the
first pass are still in cache. Work 2 n M D flops, M = K C; traffic H and R once.

Operands rounded to bfloat16 lose part of a row's product with itself, the largest term of a
confident row, while the score subtracts the exact |g_i|^2. The project order multiplies r with
what the mean gradient holds of it, r' = bf16(r): (r - r') r |h|^2 / N is missing. The pull order
rounds both: (r - r') (r + r') |h|^2 / N. Both come back in the same epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .operands import (
    FLOAT_DTYPES,
    aligned,
    capability_major,
    check_matrix,
    check_vector,
    describe,
    input_precision,
    interpreted,
)
from .stored_alignment_kernels import projected_alignment_kernel, pulled_alignment_kernel
from .tiles import Tile

_BF16 = torch.bfloat16
# Programs of a launch below which classes are split, and bytes of features that the row tiles in
# flight on 132 multiprocessors may cover. Constants: results do not depend on the GPU.
_ENOUGH_PROGRAMS = 512
_IN_FLIGHT = 132
_CACHE_BYTES = 24 * 2**20


class Choice(NamedTuple):
    """A tile and the operands it is for: rounded to bfloat16, in rows aligned to 16 bytes."""

    rounded: bool
    aligned: bool
    tile: Tile
    majors: tuple[int, ...] = (8, 9, 10)  # compute capabilities: none spills there


# Of those that spill on none of sm_80, sm_90 and sm_100: the quickest on an H200 where rows
# are rounded and aligned, elsewhere the largest.
PROJECT_TILES = (
    Choice(True, True, Tile(128, 16, 64, 4, 4, 255, 73_744, "HGMMA"), (8, 9)),
    Choice(True, True, Tile(128, 64, 64, 8, 3, 192, 75776, "HGMMA")),
    Choice(True, True, Tile(64, 128, 64, 4, 4, 255, 98_320, "HGMMA"), (9, 10)),
    Choice(True, True, Tile(128, 128, 64, 8, 3, 255, 100352, "HGMMA")),
    Choice(True, False, Tile(64, 64, 32, 8, 3, 255, 18432, "HGMMA")),
    Choice(False, True, Tile(64, 64, 32, 8, 3, 255, 51200, "HGMMA")),
    Choice(False, True, Tile(128, 64, 32, 8, 3, 255, 67584, "HGMMA"), (9, 10)),
    Choice(False, False, Tile(64, 32, 32, 8, 3, 248, 34816, "HGMMA")),
)
PULL_TILES = (
    Choice(True, True, Tile(64, 64, 128, 8, 3, 255, 81_936, "HGMMA")),
    Choice(True, False, Tile(64, 32, 64, 8, 3, 208, 26624, "HGMMA")),
    Choice(False, True, Tile(64, 32, 128, 8, 3, 248, 83968, "HGMMA")),
    Choice(False, False, Tile(64, 32, 32, 8, 3, 192, 36_880, "HGMMA")),
)


class SelfTerm(NamedTuple):
    """What restores a row's product with itself: |h_i|^2, (n,) float32, and N, () int64.

    ``lost`` (n,) float32: |r_i|^2 less that of residuals stored in bfloat16, which tell no more
    what rounding took; of one head. None: the residuals are what they were.
    """

    feature_sqnorm: Tensor
    count: Tensor
    lost: Tensor | None = None


def stored_alignment(
    features: Tensor,
    residual: Tensor,
    mean_grad: Tensor,
    out: Tensor,
    *,
    mean_bias_grad: Tensor | None = None,
    counted: Tensor | None = None,
    self_term: SelfTerm | None = None,
    precision: str = "highest",
    order: str | None = None,
    tile: Tile | None = None,
) -> None:
    """Write <g_i, G> of every row and head to ``out``, from stored residuals.

    Equals, but for rounding, with K = out.shape[0] and C = M / K::

        projected = (features @ mean_grad.T + mean_bias_grad).view(n, K, C)
        dots = (residual.view(n, K, C) * projected).sum(-1).T
        out.copy_(torch.where(counted, dots, 0))

    Allocates (K, S, n) float32 where S > 1 programs share the classes (``class_splits``) or, in
    the pull order, the width. Never synchronises.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride. Anything at all
        may stand in rows that do not count.
    residual
        (n, M) float32 or bfloat16, M = K C, unit column stride, any row stride. In rows that do
        not count it is not looked at where ``counted`` says so.
    mean_grad
        (M, D), unit column stride: bfloat16, for bfloat16 features, has the products take
        bfloat16 operands; float32, float32 operands in ``precision``.
    out
        (K, n) float32, unit stride along the rows, any head stride; overwritten.
    mean_bias_grad
        (M,) float32, contiguous; None: no bias.
    counted
        (n,) bool, contiguous: rows that count, 0 is written for the others; None: all count.
    self_term
        With bfloat16 operands: add what the rounding of the residuals took from each row's
        product with itself. Not for rows that are parts of a longer sample.
    precision
        Of float32 operands: ``"highest"`` and ``"high"`` float32-accurate, ``"medium"`` tf32.
    order
        ``"project"``, ``"pull"``, or None: project if C <= D.
    tile
        One of ``PROJECT_TILES`` or ``PULL_TILES``, or None for ``choose_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above.
    """
    rounded = check_operands(features, mean_grad, out, precision, self_term)
    rows, dim, heads = *features.shape, out.shape[0]
    device = features.device
    check_matrix("residual", residual, (rows, mean_grad.shape[0]), (torch.float32, _BF16), device)
    check_vector("mean_bias_grad", mean_bias_grad, mean_grad.shape[0], torch.float32, device)
    check_vector("counted", counted, rows, torch.bool, device)
    if order not in (None, "project", "pull"):
        raise ValueError(f"order must be project, pull or None; got {order!r}")
    if rows == 0:
        return
    classes = mean_grad.shape[0] // heads
    project = order == "project" or (order is None and classes <= dim)
    lost = None if self_term is None else self_term.lost
    if lost is not None and heads > 1:
        raise ValueError(f"self_term.lost is of one head; got {heads}")
    check_vector("self_term.lost", lost, rows, torch.float32, device)
    if tile is None:
        is_aligned = all(aligned(matrix) for matrix in (features, residual, mean_grad))
        is_aligned = is_aligned and classes * residual.element_size() % 16 == 0
        tile = choose_tile(classes, project, rounded, is_aligned, capability_major(device))
    if project:
        splits = class_splits(rows, heads, classes, dim * features.element_size(), tile)
    else:
        splits = triton.cdiv(dim, tile.dim)
    kernel = projected_alignment_kernel if project else pulled_alignment_kernel
    parts = out if splits == 1 else torch.empty(heads * splits, rows, device=device)
    with torch.cuda.device_of(features):
        kernel[(triton.cdiv(rows, tile.rows) * heads * splits,)](
            features,
            residual,
            mean_grad,
            mean_bias_grad,
            counted,
            *(self_term[:2] if self_term else (None, None)),
            parts,
            rows=rows,
            part_stride=parts.stride(0),
            HEADS=heads,
            CLASSES=classes,
            DIM=dim,
            FEATURE_STRIDE=features.stride(0),
            RESIDUAL_STRIDE=residual.stride(0),
            GRAD_STRIDE=mean_grad.stride(0),
            SPLITS=splits,
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DIM=tile.dim,
            ROUND=rounded,
            PRECISION=input_precision(precision),
            UPCAST=interpreted(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
            lost=lost,
        )
    add_parts(parts, out, splits)


def choose_tile(
    classes: int, project: bool, rounded: bool, aligned: bool = True, major: int = 8
) -> Tile:
    """Return the tile for C = ``classes``: the smallest that holds all, else the largest.

    ``project``: order of the product; ``rounded``: bfloat16 operands, else float32; ``aligned``:
    rows of all operands begin at multiples of 16 bytes; ``major``: compute capability.
    """
    choices = PROJECT_TILES if project else PULL_TILES
    return fitting_tile(choices, classes, rounded, aligned, major)


def fitting_tile(
    choices: tuple[Choice, ...], classes: int, rounded: bool, aligned: bool, major: int
) -> Tile:
    """Return the first tile for these operands that holds all classes, else the last one."""
    fitting = [
        choice.tile
        for choice in choices
        if (choice.rounded, choice.aligned) == (rounded, aligned) and major in choice.majors
    ]
    return next((tile for tile in fitting if classes <= tile.classes), fitting[-1])


def class_splits(rows: int, heads: int, classes: int, row_bytes: int, tile: Tile) -> int:
    """Return how many programs share the classes of one head and row tile.

    Enough to fill a GPU, and so many that the features of all row tiles in flight, ``row_bytes``
    a row, fit the L2 cache; at most one a class tile.
    """
    programs = triton.cdiv(rows, tile.rows) * heads
    to_fill = triton.cdiv(_ENOUGH_PROGRAMS, max(1, programs))
    in_flight = min(programs, _IN_FLIGHT) * tile.rows * row_bytes
    to_fit = triton.cdiv(in_flight, heads * _CACHE_BYTES)
    return min(max(to_fill, to_fit, 1), triton.cdiv(classes, tile.classes))


def add_parts(parts: Tensor, out: Tensor, splits: int) -> None:
    """Add the ``splits`` parts of every row and head, in their order."""
    if splits > 1:
        out.copy_(parts.view(out.shape[0], splits, -1).sum(1, dtype=torch.float64))


def check_operands(
    features: Tensor,
    mean_grad: Tensor,
    out: Tensor,
    precision: str,
    self_term: SelfTerm | None,
) -> bool:
    """Return whether operands are bfloat16, or raise ValueError naming the argument."""
    device = features.device
    input_precision(precision)
    check_matrix("features", features, (None, None), FLOAT_DTYPES, device)
    rows, dim = features.shape
    dtypes = (torch.float32, _BF16) if features.dtype == _BF16 else (torch.float32,)
    check_matrix("mean_grad", mean_grad, (None, dim), dtypes, device)
    heads = out.shape[0] if out.dim() == 2 else 0
    if heads < 1 or out.shape[1] != rows or out.dtype != torch.float32:
        raise ValueError(f"out must be (K, {rows}) float32 with K >= 1; got {describe(out)}")
    if out.shape[1] > 1 and (out.stride(1) != 1 or (heads > 1 and out.stride(0) < rows)):
        raise ValueError(
            f"out must have unit row stride and heads apart, got strides {out.stride()}"
        )
    if out.device != device:
        raise ValueError(f"out must be on {device} with features, got {out.device}")
    if dim == 0 or mean_grad.shape[0] == 0 or mean_grad.shape[0] % heads:
        raise ValueError(
            f"mean_grad must be (K * C, D) with K = {heads}, C and D at least 1; "
            f"got {describe(mean_grad)}"
        )
    rounded = mean_grad.dtype == _BF16
    if self_term is not None:
        if not rounded:
            raise ValueError("self_term goes with bfloat16 operands; mean_grad is float32")
        check_vector("feature_sqnorm", self_term.feature_sqnorm, rows, torch.float32, device)
        count = self_term.count
        if count.dim() or count.dtype != torch.int64 or count.device != device:
            raise ValueError(f"count must be () int64 on {device}; got {describe(count)}")
    return rounded
