"""What travels together in device code: named tuples that kernels build and functions take apart.

A kernel's own parameters stay flat, since launches and ahead-of-time signatures name each of them.
Inside, what belongs together goes to a function as one argument. Triton takes such tuples apart
while it compiles: they cost nothing, a member may be a pointer, a block, None or a constant.

A tuple with constants (fields in capitals) is built within the call that it goes to: Triton turns
the constants of a tuple that is assigned to a name into run-time values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl


class Items(NamedTuple):
    """Which (row, head) the items of a tile are, and which of them exist; (items,) each."""

    row: tl.tensor  # int64
    head: tl.tensor
    exists: tl.tensor


class Report(NamedTuple):
    """Where bad rows are reported."""

    status: Any  # (STATUS_SLOTS,) int64; None: report nothing
    first_row: tl.tensor  # what row 0 is called there


class ItemInputs(NamedTuple):
    """What an item's residual is made from besides its logits."""

    bias: Any  # (K, C) float32 or None
    labels: Any  # (n,) integers, or (n, C) targets of any real dtype
    target_stride: tl.tensor  # between rows of targets
    sample_weight: Any  # (n,) float32 or None


class LossSettings(NamedTuple):
    """The loss and its options."""

    LOSS: tl.constexpr  # one of those of row_losses.py
    SMOOTH: tl.constexpr  # is there label smoothing?
    EXCLUDE: tl.constexpr  # rows with non-finite features do not count, else they are reported
    ignore_index: tl.tensor
    smoothing: tl.tensor


class ItemResults(NamedTuple):
    """What item_residuals makes of a tile of logits; (items,) each but the first."""

    residual: tl.tensor  # (items, LANES), 0 where an item yields none
    loss: tl.tensor  # NaN where there is no residual, as the next two
    margin: tl.tensor
    entropy: tl.tensor
    counted: tl.tensor
    live: tl.tensor  # which of those that count yield a residual


class SoftmaxSums(NamedTuple):
    """Softmax of an item; S is the sum of e^(z - top); (items,) each."""

    top: tl.tensor  # the largest logit
    log_sum: tl.tensor  # log S
    inverse: tl.tensor  # 1 / S
    not_label: tl.tensor  # 1 - p of the class that plays the label, from the other classes


class OutputPointers(NamedTuple):
    """Where the statistics of rows go, and their residuals."""

    loss: Any  # (K, n) float32, rows head_stride apart, as the next three
    residual_sqnorm: Any
    margin: Any
    entropy: Any
    head_stride: tl.tensor
    feature_sqnorm: Any  # (n,) float32
    counted: Any  # (n,) bool
    residual: Any  # (n, K C) float32, rows residual_stride apart; None: not written here
    residual_stride: tl.tensor
