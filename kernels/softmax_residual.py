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

from moso_fast.core.losses import SOFT_LABEL_TOLERANCE
from moso_fast.core.status import STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET

from .common import INF, is_finite, log1p, note_first_row

_LABEL = tl.constexpr(STATUS_LABEL)
_LOGITS = tl.constexpr(STATUS_LOGITS)
_TARGET = tl.constexpr(STATUS_TARGET)
_TARGET_TOLERANCE = tl.constexpr(SOFT_LABEL_TOLERANCE)


@triton.jit
def _read_targets(
    targets,
    row,
    target_stride,
    live,
    lane,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """First walk over soft labels: (their argmax, the first one; their sum; are they sound?)."""
    top = tl.full([BLOCK_ROWS, BLOCK_CLASSES], -INF, tl.float32)
    where_top = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.int32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    outside = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.int32)
    for start in range(0, CLASSES, BLOCK_CLASSES):
        column = start + lane
        inside = (column < CLASSES) & live[:, None]
        address = targets + row[:, None] * target_stride + column
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        total += t
        outside |= tl.where((t >= 0.0) & (t <= 1.0), 0, 1)
        better = inside & (t > top)
        top = tl.where(better, t, top)
        where_top = tl.where(better, column, where_top)
    at_top = top == tl.max(top, axis=1)[:, None]
    label = tl.min(tl.where(at_top, where_top, CLASSES), axis=1)
    sum_of_targets = tl.sum(total, axis=1)
    sound = (tl.max(outside, axis=1) == 0) & (tl.abs(sum_of_targets - 1.0) <= _TARGET_TOLERANCE)
    # All NaN: no lane found a top, and the label must still be a column.
    return tl.where(label < CLASSES, label, 0), sum_of_targets, sound


@triton.jit
def _merge_lanes(top, rest):
    """Max over lanes, and the sum of e^(x - max) over everything but one entry at that max.

    ``top`` and ``rest`` (rows, lanes) are each lane's max and the sum of its other terms.
    """
    best = tl.max(top, axis=1)
    at_best = top == best[:, None]
    terms = tl.where(at_best, rest, (1.0 + rest) * tl.exp(top - best[:, None]))
    ties = tl.sum(at_best.to(tl.int32), axis=1) - 1
    return best, tl.sum(terms, axis=1) + ties.to(tl.float32)


@triton.jit
def _with_bias(z, bias, head, column, live, HEADS: tl.constexpr, CLASSES: tl.constexpr):
    """Logits ``z`` (items, lanes) of the columns (1, lanes) plus their bias, if there is one."""
    if bias is None:
        return z
    elif HEADS == 1:  # the same line for all rows
        return z + tl.load(bias + column, mask=column < CLASSES, other=0.0)
    else:
        inside = (column < CLASSES) & live[:, None]
        return z + tl.load(bias + head[:, None] * CLASSES + column, mask=inside, other=0.0)


@triton.jit
def softmax_residual_kernel(
    logits,  # (n, K * C) float32: logits in, residuals out
    labels,  # (n,) integers; SOFT: (n, C) floats
    sample_weight,  # (n,) float32 or None
    counted,  # (n,) bool or None
    loss,  # (K, n) float32, as the next three
    residual_sqnorm,
    margin,
    entropy,
    status,  # (STATUS_SLOTS,) int64
    items,  # n * K
    first_row,  # what row 0 of this chunk is called in status
    row_stride,  # logits
    target_stride,  # soft labels
    head_stride,  # loss, residual_sqnorm, margin, entropy
    ignore_index,
    smoothing,
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # row_stride == K * C, known when compiling: wider loads
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
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
    item = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = item < items
    row = item // HEADS
    head = item % HEADS
    start_of_row = item * CLASSES if CONTIGUOUS else row * row_stride + head * CLASSES
    base = logits + start_of_row

    # Which rows count, and the class that plays the label.
    live = exists
    if counted is not None:
        live &= tl.load(counted + row, mask=exists, other=0).to(tl.int1)
    if SOFT:
        label, target_sum, sound = _read_targets(
            labels, row, target_stride, live, lane, CLASSES, BLOCK_ROWS, BLOCK_CLASSES
        )
        note_first_row(status, _TARGET, live & (sound == 0), row + first_row)
        if SMOOTH:
            target_sum = (1.0 - smoothing) * target_sum + smoothing
    else:
        label = tl.load(labels + row, mask=exists, other=0).to(tl.int64)
        live &= label != ignore_index
        in_range = (label >= 0) & (label < CLASSES)
        note_first_row(status, _LABEL, live & (in_range == 0), row + first_row)
        live &= in_range
    z_label = tl.load(base + label, mask=live, other=0.0)
    if bias is not None:
        z_label += tl.load(bias + head * CLASSES + label, mask=live, other=0.0)

    # First walk: max and sum over the classes that are not the label.
    if ONE_TILE:
        z = tl.load(base[:, None] + lane, mask=(lane < CLASSES) & live[:, None], other=0.0)
        z = _with_bias(z, bias, head, lane, live, HEADS, CLASSES)
        rival = (lane < CLASSES) & (lane != label[:, None])
        top = tl.where(rival, z, -INF)
        rest = tl.where(is_finite(z), 0.0, float("nan"))
    else:
        top = tl.full([BLOCK_ROWS, BLOCK_CLASSES], -INF, tl.float32)
        rest = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for start in range(0, CLASSES, BLOCK_CLASSES):
            column = start + lane
            inside = (column < CLASSES) & live[:, None]
            z = tl.load(
                base[:, None] + column, mask=inside, other=0.0, eviction_policy="evict_last"
            )
            z = _with_bias(z, bias, head, column, live, HEADS, CLASSES)
            rival = inside & (column != label[:, None])
            x = tl.where(rival, z, -INF)
            higher = x > top
            # e^(lower - higher); NaN while a lane has seen nothing (-inf - -inf), then unused.
            fade = tl.exp(-tl.abs(x - top))
            rest = tl.where(higher, (rest + 1.0) * fade, rest + tl.where(rival, fade, 0.0))
            rest = tl.where(is_finite(z), rest, float("nan"))  # stays NaN: the mark of a bad row
            top = tl.where(higher, x, top)
    top_rival, rest = _merge_lanes(top, rest)

    # Scalars of a row.
    # One comparison for both: rest is NaN or small, so the sum cannot overflow.
    sane = live & is_finite(rest + z_label)
    top = tl.maximum(top_rival, z_label)
    exp_label = tl.exp(z_label - top)
    others = (1.0 + rest) * tl.exp(top_rival - top)
    sum_but_one = tl.where(z_label >= top_rival, others, rest + exp_label)
    log_sum = log1p(sum_but_one)
    inverse = 1.0 / (1.0 + sum_but_one)
    not_label = others * inverse
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if sample_weight is not None:
        scale = tl.load(sample_weight + row, mask=live, other=0.0)

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
        stored = (column < CLASSES) & exists[:, None]
        inside = (column < CLASSES) & live[:, None]
        if not ONE_TILE:
            z = tl.load(
                base[:, None] + column, mask=inside, other=0.0, eviction_policy="evict_first"
            )
            z = _with_bias(z, bias, head, column, live, HEADS, CLASSES)
        below = tl.where(inside, top[:, None] - z, 0.0)
        e = tl.where(inside, tl.exp(-below), 0.0)
        p = e * inverse[:, None]
        is_label = column == label[:, None]
        if SOFT:
            t = tl.load(labels + row[:, None] * target_stride + column, mask=inside, other=0.0).to(
                tl.float32
            )
            if SMOOTH:
                t = tl.where(inside, (1.0 - smoothing) * t + smoothing / CLASSES, 0.0)
            not_p = tl.where(is_label, not_label[:, None], 1.0 - p)
            r = p * (target_sum[:, None] - t) - t * not_p
            cost += tl.where(t == 0.0, 0.0, t * below)  # 0 * inf is no cost
        else:
            r = tl.where(is_label, -not_label[:, None], p)
            if SMOOTH:
                r += tl.where(is_label, smoothing - smoothing / CLASSES, -smoothing / CLASSES)
                cost += below
        r = tl.where(inside & sane[:, None], r * scale[:, None], 0.0)
        if narrow is None:
            tl.store(base[:, None] + column, r, mask=stored)
        else:
            rounded = r.to(tl.bfloat16)
            padded = (column < COLUMNS) & exists[:, None]
            tl.store(narrow + row[:, None] * COLUMNS + column, rounded, mask=padded)
            missing += (r - rounded.to(tl.float32)) * (r + rounded.to(tl.float32))
        squares += r * r
        spread += tl.where(e == 0.0, 0.0, e * below)  # 0 * inf is no entropy

    # Statistics; NaN where a row does not count.
    if SOFT:
        value = target_sum * log_sum + tl.sum(cost, axis=1)
    else:
        value = log_sum + (top - z_label)
        if SMOOTH:
            mean_cost = tl.sum(cost, axis=1) / CLASSES
            value = (1.0 - smoothing) * value + smoothing * (log_sum + mean_cost)
    value = tl.where(sane, value * scale, float("nan"))
    sqnorm = tl.where(sane, tl.sum(squares, axis=1), float("nan"))
    note_first_row(status, _LOGITS, live & (is_finite(value + sqnorm) == 0), row + first_row)
    out = head * head_stride + row
    tl.store(loss + out, value, mask=exists)
    tl.store(residual_sqnorm + out, sqnorm, mask=exists)
    tl.store(margin + out, tl.where(sane, z_label - top_rival, float("nan")), mask=exists)
    spread_mean = tl.sum(spread, axis=1) * inverse
    tl.store(entropy + out, tl.where(sane, log_sum + spread_mean, float("nan")), mask=exists)
    if narrow is not None:
        tl.store(lost + row, tl.sum(missing, axis=1), mask=exists)
    if softmax_top is not None:
        r_label = -not_label
        if SMOOTH:
            r_label += smoothing - smoothing / CLASSES
        tl.store(softmax_top + out, tl.where(sane, top, float("nan")), mask=exists)
        tl.store(softmax_log_sum + out, tl.where(sane, log_sum, float("nan")), mask=exists)
        tl.store(label_residual + out, tl.where(sane, r_label * scale, 0.0), mask=exists)
