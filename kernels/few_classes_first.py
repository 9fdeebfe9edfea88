"""First pass for few classes: one read of the features yields every row statistic and R^T H.

    z_i = W h_i + b,   r_i = dloss/dz (row_losses.py),   G = sum_i r_i (outer) h_i,   sum_i r_i

with W (K C, D), h_i (D,). The tile of features stays on the chip from the logits, through the
softmax, to the gradient: the operand of the second product is what the first one read::

      h (PARTS, BLOCK_ROWS, BLOCK_DIM)   --  W part  -->   z = sum of the parts (BLOCK_ROWS, T)
        |                                                    |  softmax, residual, statistics
        |                                                    v
        +---------------------------------- r^T ----->   g (PARTS, T, BLOCK_DIM) += r^T h

D is cut into as many PARTS as the program has warps, and both products are batched over them: a
warp forms the partial logits of its own columns and owns the gradient of the same columns, so no
warp repeats another one's work, whatever the few classes T = HEADS_A_TILE * LANES leave to share.

Rows are cut into slabs by the shapes alone, never by the GPU. A program owns one slab and one
tile of heads, keeps W and g on the chip and leaves one float32 partial sum; the partials are
added in float64 in the order of the slabs. No atomics on floats: the same bits on every run.

Bytes: n D s (features, once) + 8 S K C D (S partials, written and read again) + about 24 n K.
Flops: 4 n T D. At T = 16 and bfloat16 32 flops a byte against a ridge of about 180: memory bound;
three tf32 products for every float32 one ("tf32x3") come to 48 of about 55. |h|^2 and the test
for infinities ride on the same tile. So says the model; on an H200 it took 2.7 ms for 1.28 million
rows of 512 bfloat16 elements (T = 16) that are read in 0.31: one block a multiprocessor waits for
itself. row_tiles.py and gradient_sum.py together take 0.9, for one head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import is_finite
from .operands import as_operand
from .row_epilogue import class_columns, item_residuals, items_of, to_items, write_rows
from .row_tuples import ItemInputs, LossSettings, OutputPointers, Report


@triton.jit
def _features_of(
    features, at, stop, dim, in_dim, keep, FEATURE_STRIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Tile (PARTS, BLOCK_ROWS, BLOCK_DIM) from row ``at`` (int64) on, 0 beyond ``stop`` and D."""
    row = at + tl.arange(0, BLOCK_ROWS)
    address = features + row[None, :, None] * FEATURE_STRIDE + dim
    return tl.load(address, mask=((row < stop) & keep)[None, :, None] & in_dim, other=0.0)


@triton.jit
def _finite_rows(h):
    """Rows of a tile (PARTS, BLOCK_ROWS, BLOCK_DIM) that are finite: their norms, and which.

    Returns the tile too, 0 in the rows that are not.
    """
    wide = h.to(tl.float32)
    sqnorm = tl.sum(tl.sum(wide * wide, axis=2), axis=0)
    finite = is_finite(sqnorm)
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        # A norm may overflow although the row is finite: look at its elements.
        sound = is_finite(h.to(tl.float32)).to(tl.int32)
        finite = tl.min(tl.min(sound, axis=2), axis=0) > 0
        h = tl.where(finite[None, :, None], h, 0.0)
        sqnorm = tl.where(finite, sqnorm, 0.0)
    return h, sqnorm, finite


@triton.jit
def few_classes_first_kernel(
    # Read.
    features,  # (n, D)
    weight,  # (K C, D) float32, contiguous
    bias,  # (K, C) float32 or None
    labels,  # (n,) integers, or (n, C) targets
    sample_weight,  # (n,) float32 or None
    # Written.
    loss,  # (K, n) float32, as the next three
    residual_sqnorm,
    margin,
    entropy,
    feature_sqnorm,  # (n,) float32
    counted,  # (n,) bool
    residual,  # (n, K C) float32 or None
    status,  # (STATUS_SLOTS,) int64
    grad_partials,  # (S, K C, D) float32
    bias_partials,  # (S, K C) float32
    # Rows and strides.
    rows,  # n
    slab_rows,  # a multiple of BLOCK_ROWS
    first_row,
    target_stride,
    head_stride,
    residual_stride,
    # The loss; its kind follows among the constants.
    ignore_index,
    smoothing,
    # The problem.
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,  # a constant: the compiler sees which loads can be wide
    # The tile.
    BLOCK_ROWS: tl.constexpr,
    HEADS_A_TILE: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    # The loss, as in row_tuples.LossSettings.
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    EXCLUDE: tl.constexpr,
    # How features and operands are handled.
    PREFETCH: tl.constexpr,  # ask for the next tile of features before working on this one
    RELOAD: tl.constexpr,  # fetch the features again for the second product: from L1, or L2
    ROUND: tl.constexpr,  # bfloat16 operands, else PRECISION on float32 ones
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One slab, one tile of heads; see the head of this file."""
    TILE: tl.constexpr = HEADS_A_TILE * LANES
    GROUPS: tl.constexpr = (HEADS + HEADS_A_TILE - 1) // HEADS_A_TILE
    group = tl.program_id(0) % GROUPS  # neighbours share a slab, hence its features, through L2
    slab = (tl.program_id(0) // GROUPS).to(tl.int64)
    column, is_column = class_columns(group, HEADS, HEADS_A_TILE, CLASSES, LANES)
    part = tl.arange(0, PARTS)[:, None, None]
    dim = part * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, None, :]  # (PARTS, 1, BLOCK_DIM)
    in_dim = dim < DIM

    w = tl.load(
        weight + column.to(tl.int64)[None, :, None] * DIM + dim,
        mask=is_column[None, :, None] & in_dim,
        other=0.0,
    )
    w = tl.permute(as_operand(w, ROUND, UPCAST), (0, 2, 1))  # (PARTS, BLOCK_DIM, TILE)
    grad = tl.zeros([PARTS, TILE, BLOCK_DIM], tl.float32)
    bias_grad = tl.zeros([TILE], tl.float32)

    report = Report(status, first_row)
    out = OutputPointers(
        loss,
        residual_sqnorm,
        margin,
        entropy,
        head_stride,
        feature_sqnorm,
        counted,
        residual,
        residual_stride,
    )
    start = slab * slab_rows
    stop = tl.minimum(start + slab_rows, rows)
    if PREFETCH:
        ahead = _features_of(features, start, stop, dim, in_dim, True, FEATURE_STRIDE, BLOCK_ROWS)
    for step in range(0, (stop - start).to(tl.int32), BLOCK_ROWS):
        at = start + step
        if PREFETCH:
            h = ahead
            ahead = _features_of(
                features, at + BLOCK_ROWS, stop, dim, in_dim, True, FEATURE_STRIDE, BLOCK_ROWS
            )
        else:
            h = _features_of(features, at, stop, dim, in_dim, True, FEATURE_STRIDE, BLOCK_ROWS)
        if UPCAST or not ROUND:
            h = h.to(tl.float32)
        h, sqnorm, finite = _finite_rows(h)
        z = tl.sum(tl.dot(h, w, input_precision=PRECISION), axis=0)

        items = items_of(at, stop, group, HEADS, HEADS_A_TILE, BLOCK_ROWS)
        made = item_residuals(
            tl.reshape(z, [BLOCK_ROWS * HEADS_A_TILE, LANES]),
            items,
            to_items(finite, BLOCK_ROWS, HEADS_A_TILE),
            ItemInputs(bias, labels, target_stride, sample_weight),
            LossSettings(LOSS, SMOOTH, EXCLUDE, ignore_index, smoothing),
            report,
            CLASSES,
        )
        write_rows(made, items, to_items(sqnorm, BLOCK_ROWS, HEADS_A_TILE), out, report, CLASSES)
        r = tl.reshape(made.residual, [BLOCK_ROWS, TILE])
        bias_grad += tl.sum(r, axis=0)
        left = tl.trans(as_operand(r, ROUND, UPCAST))[None, :, :]
        left = tl.broadcast_to(left, [PARTS, TILE, BLOCK_ROWS])
        if RELOAD:
            h = _features_of(features, at, stop, dim, in_dim, finite, FEATURE_STRIDE, BLOCK_ROWS)
            if UPCAST or not ROUND:
                h = h.to(tl.float32)
        grad = tl.dot(left, h, grad, input_precision=PRECISION)

    base = slab * HEADS * CLASSES + column
    tl.store(bias_partials + base, bias_grad, mask=is_column)
    tl.store(
        grad_partials + base[None, :, None] * DIM + dim,
        grad,
        mask=is_column[None, :, None] & in_dim,
    )
