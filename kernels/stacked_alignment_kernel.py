"""The kernel of the second pass that computes residuals again; stacked_alignment.py launches it.

Its formulas, and why it goes about them this way, stand at the head of that file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .operands import as_operand, halves
from .residual import SoftmaxState
from .stored_alignment_kernels import own_weight


class _Rows(NamedTuple):
    """Rows of a program, under the head that it works on."""

    row: tl.tensor  # (BLOCK_ROWS,)
    state: tl.tensor  # (BLOCK_ROWS,): where what the first pass left of them lies
    live: tl.tensor  # (BLOCK_ROWS,)
    grad_row: tl.tensor  # (): the head's first class among those of all heads


class _Residuals(NamedTuple):
    """What residuals are made from again, besides the products; arguments of the kernel."""

    bias: Any
    labels: Any
    softmax: SoftmaxState  # here: of pointers
    sample_weight: Any
    smoothing_share: tl.tensor


@triton.jit
def _fold(z, s, first, rows, made_from, mean_bias_grad, feature_sqnorm, count,
          CLASSES: tl.constexpr):  # fmt: skip
    """Sum over the classes from ``first`` on of r (s + gb), and the self-term that was lost.

    What a row needs is loaded here, and again for the next tile, rather than held in registers
    through the products.
    """
    column = first + tl.arange(0, z.shape[1])
    inside = column < CLASSES
    live = rows.live
    if made_from.bias is not None:
        z += tl.load(made_from.bias + rows.grad_row + column, mask=inside, other=0.0)[None, :]
    if mean_bias_grad is not None:
        s += tl.load(mean_bias_grad + rows.grad_row + column, mask=inside, other=0.0)[None, :]
    z -= tl.load(made_from.softmax.top + rows.state, mask=live, other=0.0)[:, None]
    z -= tl.load(made_from.softmax.log_sum + rows.state, mask=live, other=0.0)[:, None]
    r = tl.exp(z) - made_from.smoothing_share
    if made_from.sample_weight is not None:
        r *= tl.load(made_from.sample_weight + rows.row, mask=live, other=0.0)[:, None]
    label = tl.load(made_from.labels + rows.row, mask=live, other=0).to(tl.int32)
    r_label = tl.load(made_from.softmax.label_residual + rows.state, mask=live, other=0.0)
    r = tl.where(column[None, :] == label[:, None], r_label[:, None], r)
    r = tl.where(inside[None, :] & live[:, None], r, 0.0)
    dot = tl.sum(r * s, axis=1)
    if feature_sqnorm is not None:
        rounded = r.to(tl.bfloat16).to(tl.float32)
        own = own_weight(feature_sqnorm, count, rows.row, live)
        dot += own * tl.sum((r - rounded) * r, axis=1)
    return dot


@triton.jit
def stacked_alignment_kernel(
    # Read.
    features,  # (rows, DIM) float32, bfloat16 or float16
    weight,  # (HEADS * CLASSES, DIM) float32, or bfloat16 with ROUND
    mean_grad,  # as weight
    bias,  # (HEADS * CLASSES,) float32 or None
    mean_bias_grad,  # (HEADS * CLASSES,) float32 or None
    labels,  # (rows,) integers
    top,  # (HEADS, rows) float32, head stride state_stride, as the next two
    log_sum,
    label_residual,
    sample_weight,  # (rows,) float32 or None
    feature_sqnorm,  # (rows,) float32 or None
    count,  # () int64 or None
    # Written.
    parts,  # (HEADS * SPLITS, rows) float32, row stride part_stride
    # Rows and strides; the loss.
    rows,
    part_stride,
    state_stride,
    smoothing_share,  # label smoothing / CLASSES
    # The problem.
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    DIM: tl.constexpr,
    FEATURE_STRIDE: tl.constexpr,  # constants: the compiler sees which loads can be wide
    WEIGHT_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    # The tile.
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    # Operands.
    ROUND: tl.constexpr,  # bfloat16 operands
    PRECISION: tl.constexpr,  # of float32 operands
    UPCAST: tl.constexpr,
):
    """Residuals again and their product with H G^T, tile by tile; see the head of this file."""
    TILES: tl.constexpr = (CLASSES + BLOCK_CLASSES - 1) // BLOCK_CLASSES
    EACH: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    part = tl.program_id(0) % (HEADS * SPLITS)
    head = (part // SPLITS).to(tl.int64)
    split = part % SPLITS
    row_tile = tl.cdiv(rows, BLOCK_ROWS) - 1 - tl.program_id(0) // (HEADS * SPLITS)
    row = row_tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    state = head * state_stride + row
    mark = tl.load(top + state, mask=row < rows, other=float("nan"))
    live = mark == mark  # no NaN

    d = tl.arange(0, BLOCK_DIM)
    grad_row = head * CLASSES
    own_rows = _Rows(row, state, live, grad_row)
    softmax = SoftmaxState(top, log_sum, label_residual)
    made_from = _Residuals(bias, labels, softmax, sample_weight, smoothing_share)
    feature_at = features + row[:, None] * FEATURE_STRIDE + d[None, :]
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    for tile in range(split * EACH, tl.minimum(split * EACH + EACH, TILES)):
        first = tile * BLOCK_CLASSES
        column = first + tl.arange(0, BLOCK_CLASSES)
        inside = (column < CLASSES)[:, None]
        weight_at = weight + (grad_row + column)[:, None] * WEIGHT_STRIDE + d[None, :]
        grad_at = mean_grad + (grad_row + column)[:, None] * GRAD_STRIDE + d[None, :]
        z = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        s = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            within = (start + d < DIM)[None, :]
            h = tl.load(feature_at + start, mask=live[:, None] & within, other=0.0)
            w = tl.load(weight_at + start, mask=inside & within, other=0.0)
            g = tl.load(grad_at + start, mask=inside & within, other=0.0)
            h = as_operand(h, ROUND, UPCAST)
            w = as_operand(w, ROUND, UPCAST)
            g = as_operand(g, ROUND, UPCAST)
            z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
            s = tl.dot(h, tl.trans(g), s, input_precision=PRECISION)
        if BLOCK_CLASSES >= 128:
            z_left, z_right = halves(z, BLOCK_ROWS, BLOCK_CLASSES)
            s_left, s_right = halves(s, BLOCK_ROWS, BLOCK_CLASSES)
            dot += _fold(z_left, s_left, first, own_rows, made_from, mean_bias_grad,
                         feature_sqnorm, count, CLASSES)  # fmt: skip
            dot += _fold(z_right, s_right, first + BLOCK_CLASSES // 2, own_rows, made_from,
                         mean_bias_grad, feature_sqnorm, count, CLASSES)  # fmt: skip
        else:
            dot += _fold(z, s, first, own_rows, made_from, mean_bias_grad,
                         feature_sqnorm, count, CLASSES)  # fmt: skip
    tl.store(parts + part.to(tl.int64) * part_stride + row, dot, mask=row < rows)
