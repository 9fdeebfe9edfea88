"""The kernel of the first pass for one head whose logits fit a tile; row_tiles.py launches it.

    z_i = W h_i + b,   r_i = dloss/dz (row_losses.py),   |h_i|^2,   sum_i r_i

A program owns BLOCK_ROWS rows. It walks their features once, BLOCK_DIM columns at a time, for the
product and for the norm; then all C logits of a row lie in one line of its tile, and residuals and
statistics are made where they are. Nothing of the size of the logits is written but the residuals,
in the dtype in which the products that follow read them::

      h   | 0 | 1 | 2 | ..   x  W^T  ->  z (BLOCK_ROWS, LANES)  ->  r, loss, |r|^2, margin, ..
          columns of D

Bytes: n D s (features) + n COLUMNS s (residuals) + about 24 n; W stays in the L2 cache. Flops:
2 n LANES D. With bfloat16 that is LANES flops a byte of features: bound by memory up to 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import finite_elements, is_finite
from .operands import as_operand
from .row_epilogue import item_residuals, write_rows
from .row_tuples import ItemInputs, Items, LossSettings, OutputPointers, Report


@triton.jit
def row_tiles_kernel(
    # Read.
    features,  # (n, DIM)
    weight,  # (CLASSES, DIM) float32, or bfloat16 with ROUND; contiguous
    bias,  # (CLASSES,) float32 or None
    labels,  # (n,) integers, or (n, CLASSES) targets
    sample_weight,  # (n,) float32 or None
    # Written.
    loss,  # (n,) float32, as the next four
    residual_sqnorm,
    margin,
    entropy,
    feature_sqnorm,
    counted,  # (n,) bool
    residual,  # (n, COLUMNS) float32, or bfloat16 with ROUND; zeros behind CLASSES
    lost,  # (n,) float32: |r|^2 less that of the stored residual; None: not asked for
    bias_partials,  # (programs, CLASSES) float32
    status,  # (STATUS_SLOTS,) int64
    # Rows and strides.
    rows,  # n
    first_row,
    target_stride,
    # The loss; its kind follows among the constants.
    ignore_index,
    smoothing,
    # The problem.
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,  # a constant: the compiler sees which loads can be wide
    # The tile.
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    # The loss, as in row_tuples.LossSettings.
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    EXCLUDE: tl.constexpr,
    # Operands.
    ROUND: tl.constexpr,  # bfloat16 operands, else PRECISION on float32 ones
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows; see the head of this file."""
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    lane = tl.arange(0, LANES)
    d = tl.arange(0, BLOCK_DIM)
    feature_at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    weight_at = weight + lane[:, None] * DIM + d[None, :]
    z = tl.zeros([BLOCK_ROWS, LANES], tl.float32)
    # Norms: of tiles that the tensor cores of an H100 read in shared memory as the diagonal of
    # H H^T. What they read must not go to registers too (operands.as_operand); they have the time.
    GRAM: tl.constexpr = ROUND and BLOCK_ROWS >= 64
    if GRAM:
        gram = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    else:  # every element on its own: lanes meet once, after the walk
        squares = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, DIM, BLOCK_DIM):
        within = (start + d < DIM)[None, :]
        h = tl.load(feature_at + start, mask=exists[:, None] & within, other=0.0)
        w = tl.load(weight_at + start, mask=(lane < CLASSES)[:, None] & within, other=0.0)
        left = as_operand(h, ROUND, UPCAST)
        right = tl.trans(as_operand(w, ROUND, UPCAST))
        z = tl.dot(left, right, z, input_precision=PRECISION)
        if GRAM:
            gram = tl.dot(left, tl.trans(left), gram)
        else:
            wide = h.to(tl.float32)
            squares += wide * wide
    if GRAM:
        same = tl.arange(0, BLOCK_ROWS)[:, None] == tl.arange(0, BLOCK_ROWS)[None, :]
        sqnorm = tl.sum(tl.where(same, gram, 0.0), axis=1)
    else:
        sqnorm = tl.sum(squares, axis=1)
    finite = is_finite(sqnorm)
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        finite = finite_elements(feature_at, exists, d, DIM) > 0
        sqnorm = tl.where(finite, sqnorm, 0.0)

    items = Items(row, tl.zeros([BLOCK_ROWS], tl.int32), exists)
    report = Report(status, first_row)
    made = item_residuals(
        z,
        items,
        finite,
        ItemInputs(bias, labels, target_stride, sample_weight),
        LossSettings(LOSS, SMOOTH, EXCLUDE, ignore_index, smoothing),
        report,
        CLASSES,
    )
    # Residuals are written below, in another dtype.
    out = OutputPointers(
        loss, residual_sqnorm, margin, entropy, 0, feature_sqnorm, counted, None, 0
    )
    write_rows(made, items, sqnorm, out, report, CLASSES)
    r = made.residual
    address = residual + row[:, None] * COLUMNS + lane[None, :]
    stored = exists[:, None] & (lane < COLUMNS)[None, :]
    if ROUND:
        tl.store(address, r.to(tl.bfloat16), mask=stored)
        if lost is not None:
            rounded = r.to(tl.bfloat16).to(tl.float32)
            tl.store(lost + row, tl.sum((r - rounded) * (r + rounded), axis=1), mask=exists)
    else:
        tl.store(address, r, mask=stored)
    tl.store(bias_partials + program * CLASSES + lane, tl.sum(r, axis=0), mask=lane < CLASSES)
