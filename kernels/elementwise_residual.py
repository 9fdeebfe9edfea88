"""Losses that are a sum over the classes: binary cross-entropy and squared error, in place.

For logits z and targets t of one (row, head), with sample weight w::

    BCE: loss = w sum_c [t softplus(-z) + (1 - t) softplus(z)],  r = w [(1 - t) s(z) - t s(-z)]
    MSE: loss = w sum_c (z - t)^2,                               r = w 2 (z - t)

s is the logistic function. s(z) - t is never computed: where t is 0 or 1 and the model is right
it would lose every digit. Margin (BCE) is the smallest logit signed by its target, entropy the
sum of the C binary entropies; both NaN for MSE.

The classes are independent: one walk over tiles of BLOCK_ROWS items by BLOCK_CLASSES lanes, each
logit read and written once, each target read once: 12 bytes, about 40 flops: memory bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moso_fast.core.status import STATUS_LOGITS, STATUS_TARGET

from .common import INF, is_finite, note_first_row
from .logit_rows import logit_rows
from .row_losses import binary_terms
from .row_tuples import Report

_LOGITS = tl.constexpr(STATUS_LOGITS)
_TARGET = tl.constexpr(STATUS_TARGET)


@triton.jit
def elementwise_residual_kernel(
    # Read; logits are written too.
    logits,  # (n, K * C) float32: logits in, residuals out
    targets,  # (n, C), any real dtype
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
    target_stride,
    head_stride,  # loss, residual_sqnorm, margin, entropy
    # The problem, and the tile.
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # row_stride == K * C, known when compiling: wider loads
    BINARY: tl.constexpr,  # binary cross-entropy, else squared error
):
    """Elementwise residual in place and row statistics; see the head of this file.

    A non-finite logit leaves residual 0 at its own class alone, NaN statistics, and its row in
    ``status``.
    """
    lane = tl.arange(0, BLOCK_CLASSES)[None, :]
    rows = logit_rows(logits, counted, items, row_stride, HEADS, CLASSES, BLOCK_ROWS, CONTIGUOUS)
    base, row, exists, live = rows.base, rows.row, rows.exists, rows.counted
    report = Report(status, first_row)
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if sample_weight is not None:
        scale = tl.load(sample_weight + row, mask=live, other=0.0)

    cost = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    spread = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
    closest = tl.full([BLOCK_ROWS, BLOCK_CLASSES], INF, tl.float32)
    unsound = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.int32)
    for start in range(0, CLASSES, BLOCK_CLASSES):
        column = start + lane
        stored = (column < CLASSES) & exists[:, None]
        inside = (column < CLASSES) & live[:, None]
        z = tl.load(base[:, None] + column, mask=inside, other=0.0)
        address = targets + row[:, None] * target_stride + column
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if BINARY:
            r, p, not_p, if_off, if_on = binary_terms(z, t)
            term = (1.0 - t) * if_off + t * if_on
            spread += tl.where(inside, p * if_on + not_p * if_off, 0.0)
            closest = tl.minimum(closest, tl.where(inside, tl.where(t >= 0.5, z, -z), INF))
            unsound |= tl.where((t >= 0.0) & (t <= 1.0), 0, 1)
        else:
            r = 2.0 * (z - t)
            term = (z - t) * (z - t)
            unsound |= tl.where(is_finite(t), 0, 1)
        cost += tl.where(inside, tl.where(is_finite(z), term, float("nan")), 0.0)
        r = tl.where(inside & is_finite(z), r * scale[:, None], 0.0)
        # A thread overwrites only what it alone has read: the tile has no fewer elements than
        # the program has threads (residual.py), so no element is held twice.
        tl.store(base[:, None] + column, r, mask=stored)
        squares += r * r

    sound = tl.max(unsound, axis=1) == 0
    note_first_row(report, _TARGET, live & (sound == 0), row)
    value = tl.where(live, tl.sum(cost, axis=1) * scale, float("nan"))
    # A NaN loss takes the other statistics of its row with it.
    spoilt = tl.where(value == value, 0.0, float("nan"))
    sqnorm = tl.sum(squares, axis=1) + spoilt
    note_first_row(report, _LOGITS, live & sound & (is_finite(value + sqnorm) == 0), row)
    out = rows.head * head_stride + row
    tl.store(loss + out, value, mask=exists)
    tl.store(residual_sqnorm + out, sqnorm, mask=exists)
    if BINARY:
        tl.store(margin + out, tl.min(closest, axis=1) + spoilt, mask=exists)
        tl.store(entropy + out, tl.sum(spread, axis=1) + spoilt, mask=exists)
    else:
        undefined = tl.full([BLOCK_ROWS], float("nan"), tl.float32)
        tl.store(margin + out, undefined, mask=exists)
        tl.store(entropy + out, undefined, mask=exists)
