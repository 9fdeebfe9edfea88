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
    return row, head, (row < stop) & (head < HEADS)


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
    row,  # (items,) int64
    head,
    exists,
    finite,  # (items,) are the features of the row finite?
    bias,  # (K, C) float32 or None
    labels,  # (n,) integers, or (n, C) targets of any real dtype
    sample_weight,  # (n,) float32 or None
    status,  # (STATUS_SLOTS,) int64; None: report nothing
    first_row,
    target_stride,
    ignore_index,
    smoothing,
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    EXCLUDE: tl.constexpr,  # rows with non-finite features do not count, else they are reported
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Residuals (items, LANES), 0 where an item yields none, and what is known of the items.

    Returns residuals; loss, margin and entropy (NaN where there is no residual); which items
    count, and which of them yield a residual.
    """
    lane = tl.arange(0, LANES)[None, :]
    counted = exists
    if LOSS == "ids":
        label = tl.load(labels + row, mask=exists, other=0).to(tl.int64)
        counted &= label != ignore_index
    if EXCLUDE:
        counted &= finite
    live = counted & finite
    if LOSS == "ids":
        in_range = (label >= 0) & (label < CLASSES)
        if status is not None:
            note_first_row(status, _LABEL, counted & (in_range == 0), row + first_row)
        live &= in_range
    if status is not None and not EXCLUDE:
        note_first_row(status, _FEATURE, counted & (finite == 0), row + first_row)

    inside = (lane < CLASSES) & live[:, None]
    if bias is not None:
        z += tl.load(bias + head[:, None] * CLASSES + lane, mask=inside, other=0.0)
    z = tl.where(inside, z, 0.0)
    t = z
    if LOSS != "ids":
        address = labels + row[:, None] * target_stride + lane
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if LOSS == "squared":
            sound = tl.min(is_finite(t).to(tl.int32), axis=1) > 0
        else:
            sound = tl.min(((t >= 0.0) & (t <= 1.0)).to(tl.int32), axis=1) > 0
        label = row
        if LOSS == "soft":
            sound &= tl.abs(tl.sum(t, axis=1) - 1.0) <= _TARGET_TOLERANCE
            best = tl.max(t, axis=1)
            label = tl.min(tl.where(inside & (t == best[:, None]), lane, LANES), axis=1)
        if status is not None:
            note_first_row(status, _TARGET, live & (sound == 0), row + first_row)
        live &= sound

    r, value, margin, entropy, sane = row_loss(
        z, inside, label, t, smoothing, LOSS, CLASSES, SMOOTH
    )
    if sample_weight is not None:
        scale = tl.load(sample_weight + row, mask=live, other=0.0)
        r *= scale[:, None]
        value *= scale
    sane &= live
    r = tl.where(inside & sane[:, None], r, 0.0)
    value = tl.where(sane, value, float("nan"))
    margin = tl.where(sane, margin, float("nan"))
    entropy = tl.where(sane, entropy, float("nan"))
    return r, value, margin, entropy, counted, live


@triton.jit
def write_rows(
    r,  # (items, LANES)
    value,  # (items,) and so on, as item_residuals returns them
    margin,
    entropy,
    counted,
    live,
    row,
    head,
    exists,
    sqnorm_of_features,  # (items,)
    loss,  # (K, n) float32, as the next three
    residual_sqnorm,
    margin_out,
    entropy_out,
    feature_sqnorm,  # (n,) float32
    counted_out,  # (n,) bool
    residual,  # (n, K C) float32 or None
    status,
    first_row,
    head_stride,
    residual_stride,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the statistics of the rows, their residuals if asked for, and report overflows."""
    squares = tl.sum(r * r, axis=1) + tl.where(value == value, 0.0, float("nan"))
    overflow = is_finite(value + squares * sqnorm_of_features) == 0
    note_first_row(status, _LOGITS, live & overflow, row + first_row)
    out = head.to(tl.int64) * head_stride + row
    tl.store(loss + out, value, mask=exists)
    tl.store(residual_sqnorm + out, squares, mask=exists)
    tl.store(margin_out + out, margin, mask=exists)
    tl.store(entropy_out + out, entropy, mask=exists)
    first = exists & (head == 0)
    tl.store(feature_sqnorm + row, sqnorm_of_features, mask=first)
    tl.store(counted_out + row, counted, mask=first)
    if residual is not None:
        lane = tl.arange(0, LANES)[None, :]
        address = residual + row[:, None] * residual_stride + head[:, None] * CLASSES + lane
        tl.store(address, r, mask=exists[:, None] & (lane < CLASSES))
