"""From a tile of logits to residuals, with labels read and every statistic of the rows written.

A tile of logits is (BLOCK_ROWS, HEADS_A_TILE * LANES): the C classes of a head in the first of
its LANES (a power of two), heads side by side. Read as (BLOCK_ROWS * HEADS_A_TILE, LANES) it has
one *item* a line: a (row, head) with its logits. Programs number tiles of heads by ``group``::

      row 0 | head 0: z z z . | head 1: z z z . |        item 0   z z z .
      row 1 | head 0: z z z . | head 1: z z z . |   =    item 1   z z z .
                                                         item 2   z z z .   ...
"""

from __future__ import annotations

import triton
import triton.language as tl

from moso_fast.core.losses import SOFT_LABEL_TOLERANCE
from moso_fast.core.status import STATUS_FEATURE, STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET

from .common import is_finite, note_first_row
from .row_losses import row_loss
from .row_tuples import ItemResults, Items

_LABEL = tl.constexpr(STATUS_LABEL)
_FEATURE = tl.constexpr(STATUS_FEATURE)
_LOGITS = tl.constexpr(STATUS_LOGITS)
_TARGET = tl.constexpr(STATUS_TARGET)
_TARGET_TOLERANCE = tl.constexpr(SOFT_LABEL_TOLERANCE)


@triton.jit
def items_of(
    at,
    stop,
    group,
    HEADS: tl.constexpr,
    HEADS_A_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Row (int64) and head of every item of the tile from row ``at`` on, and whether it exists."""
    item = tl.arange(0, BLOCK_ROWS * HEADS_A_TILE)
    row = at + item // HEADS_A_TILE
    head = group * HEADS_A_TILE + item % HEADS_A_TILE
    return Items(row, head, (row < stop) & (head < HEADS))


@triton.jit
def class_columns(
    group,
    HEADS: tl.constexpr,
    HEADS_A_TILE: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Column in (K C) of every lane of a tile (HEADS_A_TILE * LANES,), and whether it is one."""
    lane = tl.arange(0, HEADS_A_TILE * LANES)
    head = group * HEADS_A_TILE + lane // LANES
    return head * CLASSES + lane % LANES, (head < HEADS) & (lane % LANES < CLASSES)


@triton.jit
def to_items(x, BLOCK_ROWS: tl.constexpr, HEADS_A_TILE: tl.constexpr):
    """One value a row (BLOCK_ROWS,) as one value an item."""
    if HEADS_A_TILE == 1:
        return x
    else:
        shape: tl.constexpr = [BLOCK_ROWS, HEADS_A_TILE]
        return tl.reshape(tl.broadcast_to(x[:, None], shape), [BLOCK_ROWS * HEADS_A_TILE])


@triton.jit
def item_residuals(
    z,  # (items, LANES) logits, without their bias
    items,  # Items
    finite,  # (items,) are the features of the row finite?
    inputs,  # ItemInputs
    settings,  # LossSettings
    report,  # Report
    CLASSES: tl.constexpr,
):
    """ItemResults of a tile of logits; labels that are out of range or unsound are reported."""
    LANES: tl.constexpr = z.shape[1]
    LOSS: tl.constexpr = settings.LOSS
    row = items.row
    lane = tl.arange(0, LANES)[None, :]
    counted = items.exists
    if LOSS == "ids":
        label = tl.load(inputs.labels + row, mask=items.exists, other=0).to(tl.int64)
        counted &= label != settings.ignore_index
    if settings.EXCLUDE:
        counted &= finite
    live = counted & finite
    if LOSS == "ids":
        in_range = (label >= 0) & (label < CLASSES)
        note_first_row(report, _LABEL, counted & (in_range == 0), row)
        live &= in_range
    if not settings.EXCLUDE:
        note_first_row(report, _FEATURE, counted & (finite == 0), row)

    inside = (lane < CLASSES) & live[:, None]
    if inputs.bias is not None:
        bias_at = inputs.bias + items.head[:, None] * CLASSES + lane
        z += tl.load(bias_at, mask=inside, other=0.0)
    z = tl.where(inside, z, 0.0)
    t = z
    if LOSS != "ids":
        address = inputs.labels + row[:, None] * inputs.target_stride + lane
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        label, sound = _read_targets(t, inside, row, LOSS)
        note_first_row(report, _TARGET, live & (sound == 0), row)
        live &= sound

    r, value, margin, entropy, sane = row_loss(
        z, inside, label, t, settings.smoothing, LOSS, CLASSES, settings.SMOOTH
    )
    if inputs.sample_weight is not None:
        scale = tl.load(inputs.sample_weight + row, mask=live, other=0.0)
        r *= scale[:, None]
        value *= scale
    sane &= live
    r = tl.where(inside & sane[:, None], r, 0.0)
    value = tl.where(sane, value, float("nan"))
    margin = tl.where(sane, margin, float("nan"))
    entropy = tl.where(sane, entropy, float("nan"))
    return ItemResults(r, value, margin, entropy, counted, live)


@triton.jit
def _read_targets(t, inside, row, LOSS: tl.constexpr):
    """Class that plays the label, and whether the targets (items, LANES) are sound; (items,)."""
    if LOSS == "squared":
        sound = tl.min(is_finite(t).to(tl.int32), axis=1) > 0
    else:
        sound = tl.min(((t >= 0.0) & (t <= 1.0)).to(tl.int32), axis=1) > 0
    label = row  # read by no other loss than "soft"
    if LOSS == "soft":
        sound &= tl.abs(tl.sum(t, axis=1) - 1.0) <= _TARGET_TOLERANCE
        best = tl.max(t, axis=1)
        lane = tl.arange(0, t.shape[1])[None, :]
        label = tl.min(tl.where(inside & (t == best[:, None]), lane, t.shape[1]), axis=1)
    return label, sound


@triton.jit
def write_rows(
    made,  # ItemResults
    items,  # Items
    sqnorm_of_features,  # (items,)
    out,  # OutputPointers
    report,  # Report
    CLASSES: tl.constexpr,
):
    """Write the statistics of the rows, their residuals if asked for, and report overflows."""
    r, value, row, exists = made.residual, made.loss, items.row, items.exists
    squares = tl.sum(r * r, axis=1) + tl.where(value == value, 0.0, float("nan"))
    overflow = is_finite(value + squares * sqnorm_of_features) == 0
    note_first_row(report, _LOGITS, made.live & overflow, row)
    at = items.head.to(tl.int64) * out.head_stride + row
    tl.store(out.loss + at, value, mask=exists)
    tl.store(out.residual_sqnorm + at, squares, mask=exists)
    tl.store(out.margin + at, made.margin, mask=exists)
    tl.store(out.entropy + at, made.entropy, mask=exists)
    first = exists & (items.head == 0)
    tl.store(out.feature_sqnorm + row, sqnorm_of_features, mask=first)
    tl.store(out.counted + row, made.counted, mask=first)
    if out.residual is not None:
        lane = tl.arange(0, r.shape[1])[None, :]
        row_at = out.residual + row[:, None] * out.residual_stride
        address = row_at + items.head[:, None] * CLASSES + lane
        tl.store(address, r, mask=exists[:, None] & (lane < CLASSES))
