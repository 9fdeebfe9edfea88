"""Residual and statistics of rows whose logits all lie in one tile: every loss, in registers.

A tile is (items, lanes): an item is one (row, head), its C logits fill the first lanes. The
formulas, and why none of them subtracts numbers that nearly cancel, stand at the heads of
softmax_residual.py and elementwise_residual.py, whose kernels do the same in place in memory.

``LOSS`` is one of ``"ids"`` and ``"soft"`` (cross-entropy with class ids or label probabilities),
``"binary"`` and ``"squared"``. Everything here is per unit sample weight, and arithmetic only:
what a caller does not use costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INF, is_finite, log1p
from .row_tuples import SoftmaxSums


@triton.jit
def largest_and_rest(x, ok):
    """Max over the lanes, and the sum of e^(x - max) over everything but one entry at that max.

    NaN as the second where a lane is not ``ok``.
    """
    top = tl.max(x, axis=1)
    at_top = x == top[:, None]
    terms = tl.where(at_top, 0.0, tl.exp(x - top[:, None]))
    ties = tl.sum(at_top.to(tl.int32), axis=1) - 1
    return top, tl.sum(tl.where(ok, terms, float("nan")), axis=1) + ties.to(tl.float32)


@triton.jit
def softmax_sums(z_label, top_rival, rest):
    """SoftmaxSums of items of which one class plays the label.

    ``z_label`` is the label's logit, ``top_rival`` the largest of the others, ``rest`` the sum of
    e^(z - top_rival) over the others but one at that max; (items,) each.
    """
    top = tl.maximum(top_rival, z_label)
    exp_label = tl.exp(z_label - top)
    others = (1.0 + rest) * tl.exp(top_rival - top)
    # log S from S without one of its largest terms, whoever owns that term.
    sum_but_one = tl.where(z_label >= top_rival, others, rest + exp_label)
    log_sum = log1p(sum_but_one)
    inverse = 1.0 / (1.0 + sum_but_one)
    return SoftmaxSums(top, log_sum, inverse, others * inverse)


@triton.jit
def soft_residual(p, t, is_label, not_label, total):
    """Residual (items, lanes) for targets ``t`` of the sum ``total`` (items,), both smoothed.

    ``not_label`` (items,) is 1 - p of the class that plays the label, as softmax_sums makes it.
    """
    not_p = tl.where(is_label, not_label[:, None], 1.0 - p)
    return p * (total[:, None] - t) - t * not_p


@triton.jit
def _softmax(
    z,
    inside,
    label,
    t,
    smoothing,
    CLASSES: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    lane = tl.arange(0, z.shape[1])[None, :]
    is_label = lane == label[:, None]
    z_label = tl.sum(tl.where(is_label, z, 0.0), axis=1)
    rival = inside & (is_label == 0)
    top_rival, rest = largest_and_rest(tl.where(rival, z, -INF), is_finite(z))
    finite = is_finite(rest + z_label)
    top, log_sum, inverse, not_label = softmax_sums(z_label, top_rival, rest)

    below = tl.where(inside, top[:, None] - z, 0.0)
    e = tl.where(inside, tl.exp(-below), 0.0)
    p = e * inverse[:, None]
    spread = tl.sum(tl.where(e == 0.0, 0.0, e * below), axis=1)  # 0 * inf is no entropy
    if SOFT:
        total = tl.sum(t, axis=1)
        if SMOOTH:
            t = tl.where(inside, (1.0 - smoothing) * t + smoothing / CLASSES, 0.0)
            total = (1.0 - smoothing) * total + smoothing
        r = soft_residual(p, t, is_label, not_label, total)
        cost = tl.sum(tl.where(t == 0.0, 0.0, t * below), axis=1)  # 0 * inf is no cost
        value = total * log_sum + cost
    else:
        r = tl.where(is_label, -not_label[:, None], p)
        value = log_sum + (top - z_label)
        if SMOOTH:
            r += tl.where(is_label, smoothing - smoothing / CLASSES, -smoothing / CLASSES)
            mean_cost = tl.sum(below, axis=1) / CLASSES
            value = (1.0 - smoothing) * value + smoothing * (log_sum + mean_cost)
    return r, value, z_label - top_rival, log_sum + spread * inverse, finite


@triton.jit
def binary_terms(z, t):
    """Of every class, of any shape: residual, s(z), s(-z), loss where t = 0, loss where t = 1."""
    shrunk = tl.exp(-tl.abs(z))
    tail = log1p(shrunk)
    large = 1.0 / (1.0 + shrunk)
    small = shrunk * large
    p = tl.where(z >= 0.0, large, small)
    not_p = tl.where(z >= 0.0, small, large)
    if_off = tl.maximum(z, 0.0) + tail
    if_on = tl.maximum(-z, 0.0) + tail
    return (1.0 - t) * p - t * not_p, p, not_p, if_off, if_on


@triton.jit
def _binary(z, inside, t):
    r, p, not_p, if_off, if_on = binary_terms(z, t)
    cost = tl.where(inside, (1.0 - t) * if_off + t * if_on, 0.0)
    closest = tl.where(inside, tl.where(t >= 0.5, z, -z), INF)
    spread = tl.where(inside, p * if_on + not_p * if_off, 0.0)
    finite = tl.min(is_finite(z).to(tl.int32), axis=1) > 0
    return r, tl.sum(cost, axis=1), tl.min(closest, axis=1), tl.sum(spread, axis=1), finite


@triton.jit
def _squared(z, inside, t):
    error = tl.where(inside, z - t, 0.0)
    finite = tl.min(is_finite(z).to(tl.int32), axis=1) > 0
    value = tl.sum(error * error, axis=1)
    undefined = tl.where(value == value, float("nan"), float("nan"))
    return 2.0 * error, value, undefined, undefined, finite


@triton.jit
def row_loss(
    z, inside, label, t, smoothing, LOSS: tl.constexpr, CLASSES: tl.constexpr, SMOOTH: tl.constexpr
):
    """Residual (items, lanes); loss, margin, entropy (items,); whether all logits are finite.

    ``z`` must be 0 outside ``inside`` (items, lanes). ``label`` (items,) is the class that plays
    the label in cross-entropy, ``t`` (items, lanes) the targets of the other three, 0 outside.
    Residuals outside, and all results of an item with a non-finite logit, are free.
    """
    if LOSS == "ids":
        return _softmax(z, inside, label, z, smoothing, CLASSES, False, SMOOTH)
    elif LOSS == "soft":
        return _softmax(z, inside, label, t, smoothing, CLASSES, True, SMOOTH)
    elif LOSS == "binary":
        return _binary(z, inside, t)
    else:
        return _squared(z, inside, t)
