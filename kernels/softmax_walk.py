"""What softmax_residual.py reads before it writes: labels, and one walk over the logits.

The walk goes over the classes that are not the label, in tiles of lanes. Every lane keeps its own
max and the sum of its other terms; lanes meet once, after it (merge_lanes).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from moso_fast.core.losses import SOFT_LABEL_TOLERANCE
from moso_fast.core.status import STATUS_LABEL, STATUS_TARGET

from .common import INF, is_finite, note_first_row

_LABEL = tl.constexpr(STATUS_LABEL)
_TARGET = tl.constexpr(STATUS_TARGET)
_TARGET_TOLERANCE = tl.constexpr(SOFT_LABEL_TOLERANCE)


class Labels(NamedTuple):
    """What the labels of a program's items say; (rows,) each."""

    label: tl.tensor  # class that plays the label
    target_sum: tl.tensor  # of smoothed soft labels
    live: tl.tensor  # which items yield a residual


@triton.jit
def read_labels(
    inputs,  # ItemInputs
    rows,  # LogitRows
    lane,  # (1, BLOCK_CLASSES)
    ignore_index,
    smoothing,
    report,  # Report
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Labels of the rows; what is out of range or no distribution is reported."""
    row, live = rows.row, rows.counted
    if SOFT:
        label, target_sum, sound = _read_targets(
            inputs.labels, row, inputs.target_stride, live, lane, CLASSES
        )
        note_first_row(report, _TARGET, live & (sound == 0), row)
        if SMOOTH:
            target_sum = (1.0 - smoothing) * target_sum + smoothing
    else:
        label = tl.load(inputs.labels + row, mask=rows.exists, other=0).to(tl.int64)
        live &= label != ignore_index
        in_range = (label >= 0) & (label < CLASSES)
        note_first_row(report, _LABEL, live & (in_range == 0), row)
        live &= in_range
        target_sum = tl.full([row.shape[0]], 1.0, tl.float32)
    return Labels(label, target_sum, live)


@triton.jit
def _read_targets(targets, row, target_stride, live, lane, CLASSES: tl.constexpr):
    """First walk over soft labels: (their argmax, the first one; their sum; are they sound?)."""
    shape: tl.constexpr = [live.shape[0], lane.shape[1]]
    top = tl.full(shape, -INF, tl.float32)
    where_top = tl.zeros(shape, tl.int32)
    total = tl.zeros(shape, tl.float32)
    outside = tl.zeros(shape, tl.int32)
    for start in range(0, CLASSES, lane.shape[1]):
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
def load_logits(
    rows,  # LogitRows
    column,  # (1, lanes)
    live,  # (rows,)
    bias,  # (K * C,) float32 or None
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    EVICTION: tl.constexpr,  # policy of the cache; "": the usual one
):
    """Logits (rows, lanes) of the columns plus their bias, if there is one; elsewhere free."""
    inside = (column < CLASSES) & live[:, None]
    at = rows.base[:, None] + column
    z = tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION)
    if bias is None:
        return z
    elif HEADS == 1:  # the same line for all rows
        return z + tl.load(bias + column, mask=column < CLASSES, other=0.0)
    else:
        bias_at = bias + rows.head[:, None] * CLASSES + column
        return z + tl.load(bias_at, mask=inside, other=0.0)


@triton.jit
def walk_rivals(rows, label, live, lane, bias, HEADS: tl.constexpr, CLASSES: tl.constexpr):
    """First walk over the classes that are not the label, for merge_lanes: (rows, lanes) each.

    Every lane's max, and the sum of e^(z - max) over its other classes: NaN where one of its
    logits, the label's included, is not finite.
    """
    shape: tl.constexpr = [live.shape[0], lane.shape[1]]
    top = tl.full(shape, -INF, tl.float32)
    rest = tl.zeros(shape, tl.float32)
    for start in range(0, CLASSES, lane.shape[1]):
        column = start + lane
        inside = (column < CLASSES) & live[:, None]
        z = load_logits(rows, column, live, bias, HEADS, CLASSES, "evict_last")
        rival = inside & (column != label[:, None])
        x = tl.where(rival, z, -INF)
        higher = x > top
        # e^(lower - higher); NaN while a lane has seen nothing (-inf - -inf), then unused.
        fade = tl.exp(-tl.abs(x - top))
        rest = tl.where(higher, (rest + 1.0) * fade, rest + tl.where(rival, fade, 0.0))
        rest = tl.where(is_finite(z), rest, float("nan"))  # stays NaN: the mark of a bad row
        top = tl.where(higher, x, top)
    return top, rest


@triton.jit
def merge_lanes(top, rest):
    """Max over lanes, and the sum of e^(x - max) over everything but one entry at that max.

    ``top`` and ``rest`` (rows, lanes) are each lane's max and the sum of its other terms.
    """
    best = tl.max(top, axis=1)
    at_best = top == best[:, None]
    terms = tl.where(at_best, rest, (1.0 + rest) * tl.exp(top - best[:, None]))
    ties = tl.sum(at_best.to(tl.int32), axis=1) - 1
    return best, tl.sum(terms, axis=1) + ties.to(tl.float32)
