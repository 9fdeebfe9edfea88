"""Softmax cross-entropy: logits become residuals, and every row yields its statistics.

Residuals take the place of the logits, or go to a matrix of their own, in bfloat16 and in rows of
a multiple of 16 bytes, as matrix products want them. The bias can be added on the way in.

For logits z of one (row, head) with label y, C classes, smoothing eps and sample weight w::

    S    = sum_c e^(z_c - m),  m = max_c z_c,  p_c = e^(z_c - m) / S
    loss = w [(1 - eps) (log S + m - z_y) + eps (log S + mean_c(m - z_c))]
    r_c  = w (p_c - eps / C)                           c != y
    r_y  = w (-(sum_{c != y} e^(z_c - m)) / S + eps - eps / C)

and |r|^2, the margin z_y - max_{c != y} z_c and the entropy log S + sum_c p_c (m - z_c). Soft
labels t (n, C) become t' = (1 - eps) t + eps / C, T = sum t', and
r_c = w [p_c (T - t'_c) - t'_c (1 - p_c)], loss = w sum_c t'_c (log S + m - z_c).

Nothing that is small is computed as a difference of things that are not: 1 - p_y is a sum over
the other classes, log S is log1p of S without one of its largest terms. A loss of 1e-8 has six
right digits (the error left is that of the hardware's exp, (1 + |z_c - m|) 2^-23).

Shapes: logits (n, K * C) float32, one *item* per (row, head): items = n * K. A program owns
BLOCK_ROWS items and walks their classes in tiles of BLOCK_CLASSES lanes::

      classes ->  |  tile 0  |  tile 1  | .. masked |
      item 0      |          |          |           |   every lane keeps its own running (max,
      item 1      |          |          |           |   sum): lanes meet once, after the walk

Rows that fit one tile are read once and stay in registers: 8 bytes of traffic a logit, the
floor. Longer rows are walked twice, 12 bytes; the second walk runs backwards, to meet in cache
what the first one read last. Work is about 20 (one tile) or 35 flops a logit against a ridge of
more than 10 flops a byte: memory bound, so the arithmetic that keeps digits is free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moso_fast.core.status import STATUS_LOGITS

from .common import INF, is_finite, note_first_row
from .logit_rows import logit_rows
from .row_losses import soft_residual, softmax_sums
from .row_tuples import ItemInputs, Report
from .softmax_walk import load_logits, merge_lanes, read_labels, walk_rivals

_LOGITS = tl.constexpr(STATUS_LOGITS)


@triton.jit
def _tile_residual(
    z,  # (rows, lanes) logits, as all that is not said to be of another shape
    column,  # (1, lanes)
    inside,
    rows,  # LogitRows
    inputs,  # ItemInputs
    known,  # Labels
    sums,  # SoftmaxSums
    smoothing,
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Residuals of weight 1; what a class adds to the cost; e^(z - top); top - z.

    The costs sum to that of _loss_of; without SOFT and SMOOTH they mean nothing.
    """
    below = tl.where(inside, sums.top[:, None] - z, 0.0)
    e = tl.where(inside, tl.exp(-below), 0.0)
    p = e * sums.inverse[:, None]
    is_label = column == known.label[:, None]
    if SOFT:
        address = inputs.labels + rows.row[:, None] * inputs.target_stride + column
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            t = tl.where(inside, (1.0 - smoothing) * t + smoothing / CLASSES, 0.0)
        r = soft_residual(p, t, is_label, sums.not_label, known.target_sum)
        cost = tl.where(t == 0.0, 0.0, t * below)  # 0 * inf is no cost
    else:
        r = tl.where(is_label, -sums.not_label[:, None], p)
        if SMOOTH:
            r += tl.where(is_label, smoothing - smoothing / CLASSES, -smoothing / CLASSES)
        cost = below
    return r, cost, e, below


@triton.jit
def _store_narrow(narrow, r, rows, column, COLUMNS: tl.constexpr):
    """Store residuals (rows, lanes) in bfloat16; return what that takes from their squares."""
    rounded = r.to(tl.bfloat16)
    padded = (column < COLUMNS) & rows.exists[:, None]
    tl.store(narrow + rows.row[:, None] * COLUMNS + column, rounded, mask=padded)
    return (r - rounded.to(tl.float32)) * (r + rounded.to(tl.float32))


@triton.jit
def _loss_of(
    sums,  # SoftmaxSums
    z_label,  # (rows,)
    target_sum,  # (rows,)
    cost,  # (rows, lanes): sums of t (top - z), or of top - z with SMOOTH class ids
    smoothing,
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Loss of every row, of weight 1."""
    if SOFT:
        return target_sum * sums.log_sum + tl.sum(cost, axis=1)
    else:
        value = sums.log_sum + (sums.top - z_label)
        if SMOOTH:
            mean_cost = tl.sum(cost, axis=1) / CLASSES
            value = (1.0 - smoothing) * value + smoothing * (sums.log_sum + mean_cost)
        return value


@triton.jit
def softmax_residual_kernel(
    # Read; logits are written too.
    logits,  # (n, K * C) float32: logits in, residuals out
    labels,  # (n,) integers; SOFT: (n, C) floats
    sample_weight,  # (n,) float32 or None
    counted,  # (n,) bool or None
    # Written.
    loss,  # (K, n) float32, as the next three
    residual_sqnorm,
    margin,
    entropy,
    status,  # (STATUS_SLOTS,) int64
    # Rows and strides.
    items,  # n * K
    first_row,  # what row 0 of this chunk is called in status
    row_stride,  # logits
    target_stride,  # soft labels
    head_stride,  # loss, residual_sqnorm, margin, entropy
    # The loss; its kind follows among the constants.
    ignore_index,
    smoothing,
    # The problem, and the tile.
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # row_stride == K * C, known when compiling: wider loads
    # The loss: soft labels, label smoothing.
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    # What not every caller wants.
    softmax_top=None,  # (K, n) float32 or None, as the next two; see residual.SoftmaxState
    softmax_log_sum=None,
    label_residual=None,
    bias=None,  # (K * C,) float32, added to the logits; None: they have it
    narrow=None,  # (n, COLUMNS) bfloat16: where residuals go, the logits stay; HEADS == 1
    lost=None,  # (n,) float32: |r|^2 less that of the stored residual; with narrow
    COLUMNS: tl.constexpr = 0,  # of narrow: CLASSES and zeros behind them
):
    """Softmax residual in place and row statistics; see the head of this file."""
    ONE_TILE: tl.constexpr = BLOCK_CLASSES >= CLASSES
    lane = tl.arange(0, BLOCK_CLASSES)[None, :]
    rows = logit_rows(logits, counted, items, row_stride, HEADS, CLASSES, BLOCK_ROWS, CONTIGUOUS)
    inputs = ItemInputs(bias, labels, target_stride, sample_weight)
    report = Report(status, first_row)
    known = read_labels(inputs, rows, lane, ignore_index, smoothing, report, CLASSES, SOFT, SMOOTH)
    label, live = known.label, known.live
    z_label = tl.load(rows.base + label, mask=live, other=0.0)
    if bias is not None:
        z_label += tl.load(bias + rows.head * CLASSES + label, mask=live, other=0.0)

    # First walk: max and sum over the classes that are not the label.
    if ONE_TILE:
        z = load_logits(rows, lane, live, bias, HEADS, CLASSES, "")
        rival = (lane < CLASSES) & (lane != label[:, None])
        top = tl.where(rival, z, -INF)
        rest = tl.where(is_finite(z), 0.0, float("nan"))
    else:
        top, rest = walk_rivals(rows, label, live, lane, bias, HEADS, CLASSES)
    top_rival, rest = merge_lanes(top, rest)

    # Scalars of a row.
    # One comparison for both: rest is NaN or small, so the sum cannot overflow.
    sane = live & is_finite(rest + z_label)
    sums = softmax_sums(z_label, top_rival, rest)
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if sample_weight is not None:
        scale = tl.load(sample_weight + rows.row, mask=live, other=0.0)

    # Every thread has read what it needs of these rows before any thread overwrites them.
    tl.debug_barrier()

    # Second walk: residuals out, sums over classes.
    missing = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    spread = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    cost = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    # Plain arithmetic: in Triton 3.6 tl.cdiv of two constants is no constant.
    TILES: tl.constexpr = (CLASSES + BLOCK_CLASSES - 1) // BLOCK_CLASSES
    for step in range(0, TILES):
        column = (TILES - 1 - step) * BLOCK_CLASSES + lane
        stored = (column < CLASSES) & rows.exists[:, None]
        inside = (column < CLASSES) & live[:, None]
        if not ONE_TILE:
            z = load_logits(rows, column, live, bias, HEADS, CLASSES, "evict_first")
        r, term, e, below = _tile_residual(
            z, column, inside, rows, inputs, known, sums, smoothing, CLASSES, SOFT, SMOOTH
        )
        if SOFT or SMOOTH:
            cost += term
        r = tl.where(inside & sane[:, None], r * scale[:, None], 0.0)
        if narrow is None:
            tl.store(rows.base[:, None] + column, r, mask=stored)
        else:
            missing += _store_narrow(narrow, r, rows, column, COLUMNS)
        squares += r * r
        spread += tl.where(e == 0.0, 0.0, e * below)  # 0 * inf is no entropy

    # Statistics; NaN where a row does not count.
    row, exists = rows.row, rows.exists
    value = _loss_of(sums, z_label, known.target_sum, cost, smoothing, CLASSES, SOFT, SMOOTH)
    value = tl.where(sane, value * scale, float("nan"))
    sqnorm = tl.where(sane, tl.sum(squares, axis=1), float("nan"))
    note_first_row(report, _LOGITS, live & (is_finite(value + sqnorm) == 0), row)
    out = rows.head * head_stride + row
    tl.store(loss + out, value, mask=exists)
    tl.store(residual_sqnorm + out, sqnorm, mask=exists)
    tl.store(margin + out, tl.where(sane, z_label - top_rival, float("nan")), mask=exists)
    spread_mean = tl.sum(spread, axis=1) * sums.inverse
    tl.store(entropy + out, tl.where(sane, sums.log_sum + spread_mean, float("nan")), mask=exists)
    if narrow is not None:
        tl.store(lost + row, tl.sum(missing, axis=1), mask=exists)
    if softmax_top is not None:
        r_label = -sums.not_label
        if SMOOTH:
            r_label += smoothing - smoothing / CLASSES
        tl.store(softmax_top + out, tl.where(sane, sums.top, float("nan")), mask=exists)
        tl.store(softmax_log_sum + out, tl.where(sane, sums.log_sum, float("nan")), mask=exists)
        tl.store(label_residual + out, tl.where(sane, r_label * scale, 0.0), mask=exists)
