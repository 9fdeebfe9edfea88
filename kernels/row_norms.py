"""What one walk along the rows, or down the columns, of large matrices gives; bound by memory.

    row_norms     |h_i|^2, and whether every number of row i is finite
    row_dots      <q_i, h_i>, and what else a row's alignment is made of, behind a product by cuBLAS
    column_sums   sum_i r_ic: one float32 partial a slab of rows, added in float64 in their order

A program owns BLOCK_ROWS rows and walks their columns (row_norms, row_dots), or a slab of rows of a
few columns. A norm may overflow although all elements of a row are finite: the rare tile with
such a norm is looked at element by element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moso_fast.core.status import STATUS_FEATURE

from .common import finite_elements, is_finite, note_first_row
from .operands import FLOAT_DTYPES, check_matrix, check_vector, describe
from .row_tuples import Report

_FEATURE = tl.constexpr(STATUS_FEATURE)
# Rows, columns. The quickest of six on an H200 at D = 512: 0.303 ms for 1.28 million rows of
# bfloat16, whose read alone takes 0.31 ms.
_NORM_TILE = (16, 256)
_SUM_TILE = (32, 128)
_SUM_ROWS = 2048  # of a slab


@triton.jit
def row_norms_kernel(
    features,  # (n, DIM)
    counted,  # (n,) bool: in, and with EXCLUDE out
    sqnorm,  # (n,) float32
    status,  # (STATUS_SLOTS,) int64
    dirty,  # (1,) int32 or None: set to 1 where a row, counted or not, is not finite
    rows,
    first_row,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,
    EXCLUDE: tl.constexpr,  # rows that are not finite do not count, else they are reported
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Norms of one tile of rows; 0 where a row is not finite."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    d = tl.arange(0, BLOCK_DIM)
    at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    squares = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, DIM, BLOCK_DIM):
        inside = exists[:, None] & (start + d < DIM)[None, :]
        h = tl.load(at + start, mask=inside, other=0.0).to(tl.float32)
        squares += h * h
    norm = tl.sum(squares, axis=1)
    finite = is_finite(norm)
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        sound = finite_elements(at, exists, d, DIM)
        finite = sound > 0
        norm = tl.where(finite, norm, 0.0)
        if dirty is not None:
            tl.store(dirty, 1, mask=tl.min(sound, axis=0) == 0)
    tl.store(sqnorm + row, norm, mask=exists)
    counts = tl.load(counted + row, mask=exists, other=0).to(tl.int1)
    if EXCLUDE:
        tl.store(counted + row, counts & finite, mask=exists)
    else:
        note_first_row(Report(status, first_row), _FEATURE, counts & (finite == 0), row)


def row_norms(
    features: Tensor,
    counted: Tensor,
    sqnorm: Tensor,
    status: Tensor,
    *,
    first_row: int = 0,
    exclude_nonfinite: bool = False,
    dirty: Tensor | None = None,
    tile: tuple[int, int] = _NORM_TILE,
) -> None:
    """Write |h_i|^2, 0 where a row is not finite; such rows are reported or no longer counted.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride.
    counted
        (n,) bool, contiguous: which rows count. With ``exclude_nonfinite`` cleared where a row is
        not finite; else the first of those that count goes to ``status``.
    sqnorm
        (n,) float32, contiguous.
    status, first_row
        As in ``residual.residual_rows``.
    dirty
        (1,) int32, set to 1 where any row, counted or not, is not finite.
    tile
        Rows and columns of a program, powers of two.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above.
    """
    check_matrix("features", features, (None, None), FLOAT_DTYPES, features.device)
    rows, dim = features.shape
    check_vector("counted", counted, rows, torch.bool, features.device)
    check_vector("sqnorm", sqnorm, rows, torch.float32, features.device)
    check_vector("dirty", dirty, 1, torch.int32, features.device)
    if rows == 0:
        return
    block_rows, block_dim = tile
    with torch.cuda.device_of(features):
        row_norms_kernel[(triton.cdiv(rows, block_rows),)](
            features,
            counted,
            sqnorm,
            status,
            dirty,
            rows=rows,
            first_row=first_row,
            DIM=dim,
            FEATURE_STRIDE=features.stride(0),
            EXCLUDE=exclude_nonfinite,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
            num_warps=4,
            num_stages=4,
            enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
        )


@triton.jit
def column_sums_kernel(
    matrix,  # (n, COLUMNS)
    partials,  # (slabs, COLUMNS) float32
    rows,
    slab_rows,  # a multiple of BLOCK_ROWS
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One slab, BLOCK_COLUMNS columns."""
    tiles = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    slab = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = slab * slab_rows
    lane = tl.arange(0, BLOCK_ROWS)
    length = tl.minimum(slab_rows, rows - first).to(tl.int32)
    at = matrix + (first + lane)[:, None] * STRIDE + column[None, :]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in range(0, length, BLOCK_ROWS):
        inside = (step + lane < length)[:, None] & (column < COLUMNS)[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += BLOCK_ROWS * STRIDE
    tl.store(partials + slab * COLUMNS + column, tl.sum(sums, axis=0), mask=column < COLUMNS)


@triton.jit
def row_dots_kernel(
    left,  # (n, COLUMNS) float32
    right,  # (n, COLUMNS), any float dtype
    shift,  # (COLUMNS,) float32, added to every row of left; None: nothing
    extra,  # (n, EXTRA) float32, added to the dots, row stride LEFT_STRIDE; None: nothing
    lost,  # (n,) float32: |r|^2 less that of the stored residual
    feature_sqnorm,  # (n,) float32
    counted,  # (n,) bool
    count,  # () int64
    out,  # (n,) float32
    rows,
    COLUMNS: tl.constexpr,
    LEFT_STRIDE: tl.constexpr,
    RIGHT_STRIDE: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Dots of one tile of rows; 0 where a row does not count."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    live = exists & tl.load(counted + row, mask=exists, other=0).to(tl.int1)
    column = tl.arange(0, BLOCK_COLUMNS)
    left_at = left + row[:, None] * LEFT_STRIDE + column[None, :]
    right_at = right + row[:, None] * RIGHT_STRIDE + column[None, :]
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        inside = live[:, None] & (start + column < COLUMNS)[None, :]
        x = tl.load(left_at + start, mask=inside, other=0.0)
        if shift is not None:
            x += tl.load(shift + start + column, mask=start + column < COLUMNS, other=0.0)[None, :]
        y = tl.load(right_at + start, mask=inside, other=0.0).to(tl.float32)
        products += x * y
    dot = tl.sum(products, axis=1)
    if extra is not None:
        for index in tl.static_range(EXTRA):
            dot += tl.load(extra + row * LEFT_STRIDE + index, mask=live, other=0.0)
    samples = tl.maximum(tl.load(count), 1).to(tl.float32)
    own = tl.load(feature_sqnorm + row, mask=live, other=0.0) / samples
    dot += own * tl.load(lost + row, mask=live, other=0.0)
    tl.store(out + row, dot, mask=exists)


class OwnTerm(NamedTuple):
    """What restores a row's product with itself, as in ``stored_alignment.SelfTerm``."""

    feature_sqnorm: Tensor
    count: Tensor
    lost: Tensor


def row_dots(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    counted: Tensor,
    own: OwnTerm,
    *,
    shift: Tensor | None = None,
    extra: Tensor | None = None,
) -> None:
    """Write <left_i + shift, right_i> + sum extra_i + lost_i |h_i|^2 / N, 0 for rows not counted.

    Parameters
    ----------
    left, right
        (n, M): float32, and any float dtype; unit column stride, any row stride. Anything may
        stand in rows that do not count.
    out
        (n,) float32, contiguous.
    counted
        (n,) bool, contiguous.
    own
        What rounding took from the product of a row with itself.
    shift
        (M,) float32, contiguous, or None.
    extra
        (n, E) float32, a few columns in the rows of ``left``: of its row stride.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above.
    """
    device = left.device
    check_matrix("left", left, (None, None), (torch.float32,), device)
    rows, columns = left.shape
    check_matrix("right", right, (rows, columns), FLOAT_DTYPES, device)
    check_vector("out", out, rows, torch.float32, device)
    check_vector("counted", counted, rows, torch.bool, device)
    check_vector("own.feature_sqnorm", own.feature_sqnorm, rows, torch.float32, device)
    check_vector("own.lost", own.lost, rows, torch.float32, device)
    if own.count.dim() or own.count.dtype != torch.int64:
        raise ValueError(f"own.count must be () int64; got {describe(own.count)}")
    check_vector("shift", shift, columns, torch.float32, device)
    if extra is not None:
        check_matrix("extra", extra, (rows, None), (torch.float32,), device)
        if rows > 1 and extra.stride(0) != left.stride(0):
            raise ValueError("extra must have the row stride of left")
    if rows == 0:
        return
    block_rows, block_columns = _NORM_TILE
    with torch.cuda.device_of(left):
        row_dots_kernel[(triton.cdiv(rows, block_rows),)](
            left,
            right,
            shift,
            extra,
            own.lost,
            own.feature_sqnorm,
            counted,
            own.count,
            out,
            rows=rows,
            COLUMNS=columns,
            LEFT_STRIDE=left.stride(0),
            RIGHT_STRIDE=right.stride(0),
            EXTRA=0 if extra is None else extra.shape[1],
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
            num_stages=4,
            enable_fp_fusion=True,
        )


def column_sums(matrix: Tensor) -> Tensor:
    """Sum of the columns of ``matrix`` (n, M), any float dtype, unit column stride: (M,) float64.

    Raises
    ------
    ValueError
        A shape, stride or dtype other than the above.
    """
    check_matrix("matrix", matrix, (None, None), FLOAT_DTYPES, matrix.device)
    rows, columns = matrix.shape
    block_rows, block_columns = _SUM_TILE
    slabs = triton.cdiv(rows, _SUM_ROWS)
    partials = torch.empty(slabs, columns, device=matrix.device)
    if rows:
        with torch.cuda.device_of(matrix):
            column_sums_kernel[(slabs * triton.cdiv(columns, block_columns),)](
                matrix,
                partials,
                rows=rows,
                slab_rows=_SUM_ROWS,
                COLUMNS=columns,
                STRIDE=matrix.stride(0),
                BLOCK_ROWS=block_rows,
                BLOCK_COLUMNS=block_columns,
                num_warps=4,
                num_stages=4,
                enable_fp_fusion=True,
            )
    return partials.sum(0, dtype=torch.float64)
