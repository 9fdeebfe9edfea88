"""Second pass for few classes: every row's dot product with the mean gradient, one read of H.

    s_i = G h_i,     a_i = sum_c r_ic (s_ic + gb_c)      for each of K heads, G (K C, D), gb (K C)

Residuals are those that the first pass kept, or are made again from the same tile of features:
``z`` and ``s`` then share what is read, and no number of rows x classes is ever in memory::

      h (BLOCK_ROWS, BLOCK_DIM)  --  G^T  -->  s (BLOCK_ROWS, T)  --.
                 |                                                   sum over c of r (s + gb)
                 '--------------  W^T  -->  z (BLOCK_ROWS, T)  --> r

Tiles of rows run backwards: what the first pass read last may still lie in the L2 cache.

Operands rounded to bfloat16 lose part of a row's product with itself, the largest term of a
confident row, while its score subtracts the exact |g_i|^2: G holds r' = bf16(r) of it, so that
sum_c (r - r') r |h|^2 / N comes back in the epilogue.

Bytes: n D s + n K C 4 (residuals, if kept) + 9 n K. Flops: 2 n T D, twice that if residuals are
made again: 16 or 32 flops a byte at T = 16 and bfloat16 against a ridge of about 180 flops a
byte: memory bound. On an H200: 0.44 ms for 1.28 million rows of 512, read in 0.31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import as_operand
from .row_epilogue import class_columns, item_residuals, items_of
from .row_tuples import ItemInputs, Items, LossSettings, Report


@triton.jit
def few_classes_second_kernel(
    # Read.
    features,  # (n, D)
    weight,  # (K C, D) float32, contiguous; None: residuals are given
    bias,  # (K, C) float32 or None
    labels,  # (n,) integers, or (n, C) targets; None: residuals are given
    sample_weight,  # (n,) float32 or None
    residual,  # (n, K C) float32; None: make them
    mean_grad,  # (K C, D) float32, contiguous
    mean_bias_grad,  # (K, C) float32 or None
    counted,  # (n,) bool
    feature_sqnorm,  # (n,) float32
    count,  # () int64: N, where rounding takes from the self-term; or None
    # Written.
    alignment,  # (K, n) float32
    # Rows and strides.
    rows,  # n
    target_stride,
    residual_stride,
    head_stride,  # alignment
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
    BLOCK_DIM: tl.constexpr,
    # The loss, as in row_tuples.LossSettings.
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    # Operands.
    ROUND: tl.constexpr,  # bfloat16 operands, else PRECISION on float32 ones
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows under one tile of heads; see the head of this file."""
    TILE: tl.constexpr = HEADS_A_TILE * LANES
    GROUPS: tl.constexpr = (HEADS + HEADS_A_TILE - 1) // HEADS_A_TILE
    group = tl.program_id(0) % GROUPS
    backwards = tl.num_programs(0) // GROUPS - 1 - tl.program_id(0) // GROUPS
    at = backwards.to(tl.int64) * BLOCK_ROWS
    tile_row = at + tl.arange(0, BLOCK_ROWS)
    column, is_column = class_columns(group, HEADS, HEADS_A_TILE, CLASSES, LANES)
    lane_dim = tl.arange(0, BLOCK_DIM)
    start_of_row = features + tile_row[:, None] * FEATURE_STRIDE
    start_of_class = column.to(tl.int64)[:, None] * DIM

    s = tl.zeros([BLOCK_ROWS, TILE], tl.float32)
    z = tl.zeros([BLOCK_ROWS, TILE], tl.float32)
    for start in range(0, DIM, BLOCK_DIM):
        dim = start + lane_dim[None, :]
        inside = is_column[:, None] & (dim < DIM)
        h = tl.load(start_of_row + dim, mask=(tile_row < rows)[:, None] & (dim < DIM), other=0.0)
        h = as_operand(h, ROUND, UPCAST)
        g = tl.load(mean_grad + start_of_class + dim, mask=inside, other=0.0)
        g = as_operand(g, ROUND, UPCAST)
        s = tl.dot(h, tl.trans(g), s, input_precision=PRECISION)
        if residual is None:
            w = tl.load(weight + start_of_class + dim, mask=inside, other=0.0)
            w = as_operand(w, ROUND, UPCAST)
            z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)

    row, head, exists = items_of(at, rows, group, HEADS, HEADS_A_TILE, BLOCK_ROWS)
    counts = tl.load(counted + row, mask=exists, other=0).to(tl.int1)
    lane = tl.arange(0, LANES)[None, :]
    inside = (exists & counts)[:, None] & (lane < CLASSES)
    if residual is None:
        made = item_residuals(
            tl.reshape(z, [BLOCK_ROWS * HEADS_A_TILE, LANES]),
            Items(row, head, exists & counts),
            counts,
            ItemInputs(bias, labels, target_stride, sample_weight),
            LossSettings(LOSS, SMOOTH, False, ignore_index, smoothing),
            Report(None, 0),
            CLASSES,
        )
        r = made.residual
    else:
        address = residual + row[:, None] * residual_stride + head[:, None] * CLASSES + lane
        r = tl.load(address, mask=inside, other=0.0)
    s = tl.reshape(s, [BLOCK_ROWS * HEADS_A_TILE, LANES])
    if mean_bias_grad is not None:
        s += tl.load(mean_bias_grad + head[:, None] * CLASSES + lane, mask=inside, other=0.0)
    dot = tl.sum(r * s, axis=1)  # NaN where the features of a row that does not count are
    if count is not None:
        lost = tl.sum((r - r.to(tl.bfloat16).to(tl.float32)) * r, axis=1)
        sqnorm = tl.load(feature_sqnorm + row, mask=exists, other=0.0)
        dot += lost * sqnorm / tl.maximum(tl.load(count), 1).to(tl.float32)
    out = alignment + head.to(tl.int64) * head_stride + row
    tl.store(out, tl.where(counts, dot, 0.0), mask=exists)
