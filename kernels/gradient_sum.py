r"""Sum of the head gradients: R^T H and the column sums of R, from one read of both.

    grad[c, d] = sum_i r_ic h_id        bias[c] = sum_i r_ic

R (n, M) are residuals, M = K C (heads stacked), H (n, D) features. Rows are cut into slabs whose
length follows from the shapes alone, never from the GPU. Every slab yields one float32 partial
sum; the partials are added in float64 in the order of the slabs. There are no atomics, so the
result has the same bits on every run::

      slab 0   | R_0^T H_0 |  ->  partial 0 (M, D) \
      slab 1   | R_1^T H_1 |  ->  partial 1         >  float64 sum, in this order
       ..      |    ..     |                       /

One program owns one BLOCK_CLASSES x BLOCK_DIM tile of one partial and walks its slab in steps of
BLOCK_ROWS. Programs of one slab have neighbouring numbers: R and H come from memory once, and
from L2 for the other tiles. Work: 2 n M D flops. Traffic: R and H once, and 8 M D bytes a slab
(written here, read by the sum), so slabs are as long as rounding allows
(``operands.MOST_ROWS``), unless that leaves too few programs to fill a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import (
    FLOAT_DTYPES,
    MOST_ROWS,
    aligned,
    as_operand,
    check_matrix,
    check_vector,
    input_precision,
    interpreted,
)
from .tiles import Tile

# Shorter slabs cost more traffic for partials than they gain in programs.
_FEWEST_ROWS = 512
# Programs of a launch below which slabs are cut shorter: about four for every multiprocessor of
# the largest GPUs. A constant, so that the result does not depend on the GPU.
_ENOUGH_PROGRAMS = 512
# Bytes of partials in memory at a time: more slabs than fit go through another launch.
PARTIAL_BYTES = 2**28


class Choice(NamedTuple):
    """A tile and the operands it is for; see :func:`choose_tile`.

    ``narrow``: residuals are bfloat16 where they lie, and go to the tensor cores as they are.
    """

    rounded: bool
    aligned: bool
    tile: Tile
    narrow: bool = False
    majors: tuple[int, ...] = (8, 9, 10)  # compute capabilities: none spills there


# The largest that compile without spills on sm_80, sm_90 and sm_100. Numbers that must be fetched
# one by one, because rows are not aligned, take an address each: smaller tiles. Of the narrow ones
# the quickest on an H200 or within a few hundredths of it; the others were not timed.
TILES = (
    Choice(True, True, Tile(64, 64, 128, 8, 3, 224, 92160, "HGMMA")),
    Choice(True, True, Tile(32, 128, 128, 8, 3, 252, 66560, "HGMMA")),
    Choice(True, False, Tile(32, 64, 64, 8, 3, 152, 30720, "HGMMA")),
    Choice(False, True, Tile(16, 64, 128, 8, 3, 168, 40_968, "HGMMA")),
    Choice(False, False, Tile(32, 64, 32, 8, 3, 160, 34816, "HGMMA")),
    Choice(True, True, Tile(64, 64, 128, 4, 3, 255, 73_744, "HGMMA"), True),
    Choice(True, True, Tile(64, 128, 128, 8, 3, 188, 98_320, "HGMMA"), True),
    Choice(True, True, Tile(64, 64, 256, 8, 3, 208, 122_896, "HGMMA"), True),
    Choice(True, True, Tile(64, 128, 256, 8, 3, 238, 147_472, "HGMMA"), True, (9, 10)),
)


class GradientSum(NamedTuple):
    """Sums over the rows, float64: ``grad`` (M, D) and ``bias`` (M,), None if not asked for."""

    grad: Tensor
    bias: Tensor | None


def gradient_sum(
    residual: Tensor,
    features: Tensor,
    *,
    precision: str = "highest",
    counted: Tensor | None = None,
    bias: bool = True,
    tile: Tile | None = None,
) -> GradientSum:
    """Sum r_i (outer) h_i, and r_i, over the rows.

    Equals, but for rounding::

        features = torch.where(counted[:, None], features, 0)
        residual = torch.where(counted[:, None], residual, 0)
        GradientSum(residual.double().T @ features.double(), residual.double().sum(0))

    Allocates the result, (M, D + 1) float64, and float32 partial sums: at most
    ``PARTIAL_BYTES``, but room for one of M D elements in any case. Never synchronises.

    Parameters
    ----------
    residual
        (n, M) float32 or bfloat16, M = K C, unit column stride, any row stride. bfloat16 is for
        bfloat16 features at precision ``"medium"``.
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride. Anything at all
        may stand in rows that do not count, where ``counted`` says so.
    precision
        ``"highest"``, ``"high"``: float32-accurate products. ``"medium"``: bfloat16 features
        multiply bfloat16 residuals (rounded on the way in), others multiply as tf32. The bias
        sum takes the residuals as given, unrounded.
    counted
        (n,) bool, contiguous: rows to sum; None: all.
    bias
        Whether to sum the residuals too.
    tile
        One of ``TILES``, or None for ``choose_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above.
    """
    rounded = _check(residual, features, precision)
    check_vector("counted", counted, features.shape[0], torch.bool, features.device)
    rows, classes, dim = *residual.shape, features.shape[1]
    device = features.device
    if tile is None:
        is_aligned = aligned(residual) and aligned(features)
        tile = choose_tile(classes, dim, rounded, is_aligned, residual.dtype == torch.bfloat16)
    tiles = triton.cdiv(classes, tile.classes) * triton.cdiv(dim, tile.dim)
    length = slab_rows(rows, tiles, tile.rows, precision)
    slabs = triton.cdiv(rows, length)
    at_once = max(1, min(slabs, PARTIAL_BYTES // (4 * classes * dim)))
    if rows == 0:
        nothing = torch.zeros(classes, dim + 1, dtype=torch.float64, device=device)
        return GradientSum(nothing[:, :dim].contiguous(), nothing[:, dim] if bias else None)
    partial = torch.empty(at_once, classes, dim, device=device)
    bias_partial = torch.empty(at_once, classes, device=device) if bias else None
    total: GradientSum | None = None
    for first in range(0, slabs, at_once):
        here = min(at_once, slabs - first)
        out = PartialSums(partial[:here], None if bias_partial is None else bias_partial[:here])
        partial_sums(residual, features, counted, out, first, length, tile, precision)
        sums = (None if p is None else p.sum(0, dtype=torch.float64) for p in out)
        part = GradientSum(*sums)
        total = part if total is None else _add(total, part)
    assert total is not None
    return total


def _add(total: GradientSum, part: GradientSum) -> GradientSum:
    """Add ``part`` to ``total`` in its memory."""
    for sums, more in zip(total, part, strict=True):
        if sums is not None:
            sums.add_(more)
    return total


class PartialSums(NamedTuple):
    """One partial sum a slab, contiguous float32: ``grad`` (S, M, D) and ``bias`` (S, M)."""

    grad: Tensor
    bias: Tensor | None


def partial_sums(
    residual: Tensor,
    features: Tensor,
    counted: Tensor | None,
    out: PartialSums,
    first_slab: int,
    length: int,
    tile: Tile,
    precision: str,
) -> None:
    """Write the sums over S slabs of ``length`` rows, from slab ``first_slab`` on; checks nothing.

    ``length`` is a multiple of ``tile.rows``.
    """
    slabs, classes, dim = out.grad.shape
    tiles = triton.cdiv(classes, tile.classes) * triton.cdiv(dim, tile.dim)
    with torch.cuda.device_of(features):
        gradient_sum_kernel[(slabs * tiles,)](
            residual,
            features,
            counted,
            *out,
            rows=features.shape[0],
            first_slab=first_slab,
            slab_rows=length,
            CLASSES=classes,
            DIM=dim,
            RESIDUAL_STRIDE=residual.stride(0),
            FEATURE_STRIDE=features.stride(0),
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DIM=tile.dim,
            ROUND=features.dtype == torch.bfloat16 and precision == "medium",
            PRECISION=input_precision(precision),
            UPCAST=interpreted(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
        )


def choose_tile(
    classes: int, dim: int, rounded: bool, aligned: bool = True, narrow: bool = False
) -> Tile:
    """Return the tile for M = ``classes`` and D = ``dim``.

    ``rounded``: bfloat16 operands, else float32. ``aligned``: rows of both operands begin at
    multiples of 16 bytes and are so long. ``narrow``: residuals are bfloat16 already. Of the tiles
    for these, the first that holds all classes, else the last that every GPU can take.
    """
    wanted = rounded, aligned, narrow and aligned
    fitting = [
        t for t in TILES if (t.rounded, t.aligned, t.narrow) == wanted and len(t.majors) == 3
    ]
    holding = (t for t in fitting if classes <= t.tile.classes)
    return next(holding, fitting[-1]).tile


def slab_rows(rows: int, tiles: int, step: int, precision: str) -> int:
    """Rows of a slab: as many as rounding allows, fewer if the grid would be too small.

    ``tiles``: programs a slab; ``step``: rows that a program takes at a time.
    """
    length = MOST_ROWS[precision]
    while length > _FEWEST_ROWS and triton.cdiv(rows, length) * tiles < _ENOUGH_PROGRAMS:
        length //= 2
    return max(length, step)


@triton.jit
def gradient_sum_kernel(
    residual,  # (rows, CLASSES) float32 or bfloat16
    features,  # (rows, DIM) float32, bfloat16 or float16
    counted,  # (rows,) bool or None
    partial,  # (slabs of this launch, CLASSES, DIM) float32
    bias_partial,  # (slabs of this launch, CLASSES) float32 or None
    rows,
    first_slab,  # what slab 0 of this launch is in the whole
    slab_rows,  # a multiple of BLOCK_ROWS
    CLASSES: tl.constexpr,
    DIM: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,  # constants: the compiler sees which loads can be wide
    FEATURE_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 operands
    PRECISION: tl.constexpr,  # of float32 operands
    UPCAST: tl.constexpr,
):
    """One tile of one slab's partial sum; see the head of this file."""
    dim_tiles = tl.cdiv(DIM, BLOCK_DIM)
    tiles = tl.cdiv(CLASSES, BLOCK_CLASSES) * dim_tiles
    slab = (tl.program_id(0) // tiles).to(tl.int64)
    dim_tile = tl.program_id(0) % tiles % dim_tiles
    class_tile = tl.program_id(0) % tiles // dim_tiles
    column = class_tile * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    d = dim_tile * BLOCK_DIM + tl.arange(0, BLOCK_DIM)

    first = (first_slab + slab) * slab_rows
    length = tl.minimum(slab_rows, rows - first).to(tl.int32)
    lane = tl.arange(0, BLOCK_ROWS)
    row = first + lane
    residual_at = residual + row[:, None] * RESIDUAL_STRIDE + column[None, :]
    feature_at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    grad = tl.zeros([BLOCK_CLASSES, BLOCK_DIM], tl.float32)
    for step in range(0, length, BLOCK_ROWS):
        live = step + lane < length
        if counted is not None:
            live &= tl.load(counted + first + step + lane, mask=live, other=0).to(tl.int1)
        # 0 in both operands: a row that does not count may hold NaN, and 0 NaN is NaN.
        r = tl.load(residual_at, mask=live[:, None] & (column < CLASSES)[None, :], other=0.0)
        h = tl.load(feature_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        r = as_operand(r, ROUND, UPCAST)
        h = as_operand(h, ROUND, UPCAST)
        grad = tl.dot(tl.trans(r), h, grad, input_precision=PRECISION)
        residual_at += BLOCK_ROWS * RESIDUAL_STRIDE
        feature_at += BLOCK_ROWS * FEATURE_STRIDE

    if bias_partial is not None and dim_tile == 0:
        # A walk of its own: see operands.as_operand.
        residual_at = residual + row[:, None] * RESIDUAL_STRIDE + column[None, :]
        # Every element on its own: lanes meet once, after the walk.
        bias = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for step in range(0, length, BLOCK_ROWS):
            live = step + lane < length
            if counted is not None:
                live &= tl.load(counted + first + step + lane, mask=live, other=0).to(tl.int1)
            inside = live[:, None] & (column < CLASSES)[None, :]
            bias += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
            residual_at += BLOCK_ROWS * RESIDUAL_STRIDE
        bias_at = bias_partial + slab * CLASSES + column
        tl.store(bias_at, tl.sum(bias, axis=0), mask=column < CLASSES)

    out = slab * CLASSES + column
    inside = (column < CLASSES)[:, None] & (d < DIM)[None, :]
    tl.store(partial + out[:, None] * DIM + d[None, :], grad, mask=inside)


def _check(residual: Tensor, features: Tensor, precision: str) -> bool:
    """Return whether operands are bfloat16, or raise ValueError naming the argument."""
    input_precision(precision)
    check_matrix("features", features, (None, None), FLOAT_DTYPES, features.device)
    rounded = features.dtype == torch.bfloat16 and precision == "medium"
    dtypes = (torch.float32, torch.bfloat16) if rounded else (torch.float32,)
    check_matrix("residual", residual, (features.shape[0], None), dtypes, features.device)
    for name, value in (("residual", residual), ("features", features)):
        if value.shape[1] == 0:
            raise ValueError(f"{name} must have at least one column, got {tuple(value.shape)}")
    return rounded
