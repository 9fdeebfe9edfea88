"""Kernels of the second pass with stored residuals: S = H G^T or Q = R G, folded at once.

A program of either order owns BLOCK_ROWS rows and yields one number for each: its part of
a_i = sum_c r_ic (G_c . h_i + gb_c). stored_alignment.py has the algorithm and the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import as_operand, halves


@triton.jit
def own_weight(feature_sqnorm, count, row, live):
    """|h_i|^2 / N: the weight of a row's product with itself in its alignment."""
    counted = tl.maximum(tl.load(count), 1).to(tl.float32)
    return tl.load(feature_sqnorm + row, mask=live, other=0.0) / counted


@triton.jit
def _fold(s, residual_at, grad_row, first, mean_bias_grad, own, live,
          CLASSES: tl.constexpr, LANES: tl.constexpr, SELF: tl.constexpr):  # fmt: skip
    """Sum over the classes from ``first`` on of r (s + gb), and the self-term that was lost."""
    column = first + tl.arange(0, LANES)
    inside = column < CLASSES
    r = tl.load(residual_at + column[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    if mean_bias_grad is not None:
        s += tl.load(mean_bias_grad + grad_row + column, mask=inside, other=0.0)[None, :]
    dot = tl.sum(r * s, axis=1)
    if SELF:
        rounded = r.to(tl.bfloat16).to(tl.float32)
        dot += own * tl.sum((r - rounded) * r, axis=1)
    return dot


@triton.jit
def projected_alignment_kernel(
    features,  # (rows, DIM) float32, bfloat16 or float16
    residual,  # (rows, HEADS * CLASSES) float32 or bfloat16
    mean_grad,  # (HEADS * CLASSES, DIM) float32, or bfloat16 with ROUND
    mean_bias_grad,  # (HEADS * CLASSES,) float32 or None
    counted,  # (rows,) bool or None
    feature_sqnorm,  # (rows,) float32 or None
    count,  # () int64 or None
    parts,  # (HEADS * SPLITS, rows) float32, row stride part_stride
    rows,
    part_stride,
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,  # constants: the compiler sees which loads can be wide
    RESIDUAL_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROUND: tl.constexpr,  # bfloat16 operands
    PRECISION: tl.constexpr,  # of float32 operands
    UPCAST: tl.constexpr,
    lost=None,  # (rows,) float32: |r|^2 less that of the stored residual, HEADS == 1
):
    """S = H G^T tile by tile, folded with R; one part of every row."""
    TILES: tl.constexpr = (CLASSES + BLOCK_CLASSES - 1) // BLOCK_CLASSES
    EACH: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    SELF: tl.constexpr = feature_sqnorm is not None and lost is None
    part = tl.program_id(0) % (HEADS * SPLITS)
    head = part // SPLITS
    split = part % SPLITS
    row_tile = tl.cdiv(rows, BLOCK_ROWS) - 1 - tl.program_id(0) // (HEADS * SPLITS)
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    if counted is not None:
        live &= tl.load(counted + row, mask=live, other=0).to(tl.int1)
    own = tl.zeros([BLOCK_ROWS], tl.float32)
    if SELF:
        own = own_weight(feature_sqnorm, count, row, live)

    d = tl.arange(0, BLOCK_DIM)
    grad_row = head.to(tl.int64) * CLASSES
    feature_at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    residual_at = residual + row[:, None] * RESIDUAL_STRIDE + grad_row
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    if lost is not None:
        once = live & (row < tl.where(split == 0, rows, 0))  # one part has it
        given_back = tl.load(lost + row, mask=once, other=0.0)
        dot += own_weight(feature_sqnorm, count, row, once) * given_back
    for tile in range(split * EACH, tl.minimum(split * EACH + EACH, TILES)):
        first = tile * BLOCK_CLASSES
        column = first + tl.arange(0, BLOCK_CLASSES)
        inside = (column < CLASSES)[:, None]
        grad_at = mean_grad + (grad_row + column)[:, None] * GRAD_STRIDE + d[None, :]
        s = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            within = (start + d < DIM)[None, :]
            h = tl.load(feature_at + start, mask=live[:, None] & within, other=0.0)
            g = tl.load(grad_at + start, mask=inside & within, other=0.0)
            h = as_operand(h, ROUND, UPCAST)
            g = as_operand(g, ROUND, UPCAST)
            s = tl.dot(h, tl.trans(g), s, input_precision=PRECISION)
        if BLOCK_CLASSES >= 128:
            HALF: tl.constexpr = BLOCK_CLASSES // 2
            left, right = halves(s, BLOCK_ROWS, BLOCK_CLASSES)
            dot += _fold(left, residual_at, grad_row, first, mean_bias_grad, own, live,
                         CLASSES, HALF, SELF)  # fmt: skip
            dot += _fold(right, residual_at, grad_row, first + HALF, mean_bias_grad, own, live,
                         CLASSES, HALF, SELF)  # fmt: skip
        else:
            dot += _fold(s, residual_at, grad_row, first, mean_bias_grad, own, live,
                         CLASSES, BLOCK_CLASSES, SELF)  # fmt: skip
    tl.store(parts + part.to(tl.int64) * part_stride + row, dot, mask=row < rows)


@triton.jit
def pulled_alignment_kernel(
    features,
    residual,
    mean_grad,
    mean_bias_grad,
    counted,
    feature_sqnorm,
    count,
    parts,
    rows,
    part_stride,
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,  # tiles of the width
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,  # classes that one step of the product takes
    BLOCK_DIM: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    lost=None,
):
    """One tile of Q = R G, folded with H; arguments as of projected_alignment_kernel."""
    part = tl.program_id(0) % (HEADS * SPLITS)
    head = part // SPLITS
    dim_tile = part % SPLITS
    row_tile = tl.cdiv(rows, BLOCK_ROWS) - 1 - tl.program_id(0) // (HEADS * SPLITS)
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    if counted is not None:
        live &= tl.load(counted + row, mask=live, other=0).to(tl.int1)
    # What no matrix product gives is added by the programs of the first tile of the width.
    extra = live & (row < tl.where(dim_tile == 0, rows, 0))
    if feature_sqnorm is not None:
        own = own_weight(feature_sqnorm, count, row, extra)

    lane = tl.arange(0, BLOCK_CLASSES)
    d = dim_tile * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    grad_row = head.to(tl.int64) * CLASSES
    residual_at = residual + row[:, None] * RESIDUAL_STRIDE + grad_row + lane[None, :]
    grad_at = mean_grad + (grad_row + lane)[:, None] * GRAD_STRIDE + d[None, :]
    q = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, CLASSES, BLOCK_CLASSES):
        inside = start + lane < CLASSES
        r = tl.load(residual_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        g = tl.load(grad_at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        r = as_operand(r, ROUND, UPCAST)
        g = as_operand(g, ROUND, UPCAST)
        q = tl.dot(r, g, q, input_precision=PRECISION)
        grad_at += BLOCK_CLASSES * GRAD_STRIDE
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    restores: tl.constexpr = feature_sqnorm is not None and lost is None
    if (mean_bias_grad is not None or restores) and dim_tile == 0:
        # A walk of its own: see operands.as_operand.
        rest = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for start in range(0, CLASSES, BLOCK_CLASSES):
            inside = start + lane < CLASSES
            exact = tl.load(
                residual_at + start, mask=live[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            if mean_bias_grad is not None:
                bias = tl.load(mean_bias_grad + grad_row + start + lane, mask=inside, other=0.0)
                rest += exact * bias[None, :]
            if restores:
                rounded = exact.to(tl.bfloat16).to(tl.float32)
                rest += (exact - rounded) * (exact + rounded) * own[:, None]
        dot += tl.sum(rest, axis=1)
    if lost is not None:
        dot += own * tl.load(lost + row, mask=extra, other=0.0)
    feature_at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    h = tl.load(feature_at, mask=live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    dot += tl.sum(q * h, axis=1)
    tl.store(parts + part.to(tl.int64) * part_stride + row, dot, mask=row < rows)
