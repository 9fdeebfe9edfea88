"""Which known map takes a head's output to a model's logits, found from pairs of numbers.

The pairs come from a forward pass in which the head's output was replaced by random numbers of
several sizes (see ``output_check.py``), so that a map which bends large numbers only, or leaves
small ones alone, shows. A map is returned only if it gives every number up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.logit_map import LogitMap

# Rounding errors of a map, in units of the coarsest dtype's eps: a few operations one after
# another in float32; in 16 bits fewer, since most models go to float32 for some of them.
_ALLOWED = {False: 16.0, True: 4.0}
_STEPS = 60


def find_map(given: Tensor, seen: Tensor, eps: float) -> LogitMap | None:
    """Return the map with m(given) = seen up to rounding, or None.

    Parameters
    ----------
    given, seen
        (n, C) float64, n C at least some dozens: the head's output and the logits.
    eps
        Relative rounding of the numbers: ``finfo.eps`` of the coarsest dtype in between.
    """
    if not bool(torch.isfinite(seen).all()) or not bool(seen.any()):
        return None
    for candidate in _candidates(given, seen, eps):
        if candidate is not None and agrees(candidate, given, seen, eps):
            return candidate
    return None


def agrees(found: LogitMap, given: Tensor, seen: Tensor, eps: float) -> bool:
    """Tell whether m(given) = seen up to rounding, both (n, C) float64; rows not finite aside."""
    usable = torch.isfinite(given).all(-1) & torch.isfinite(seen).all(-1)
    given, seen = given[usable], seen[usable]
    allowed = _ALLOWED[eps > 1e-3] * eps * found.rounding(given)
    if not given.numel():
        return True
    # The smallest numbers of a column of probabilities are below what float32 can tell apart.
    floor = torch.finfo(torch.float32).tiny if eps > 1e-12 else 0.0
    return bool(((found.apply(given) - seen).abs() <= allowed + floor).all())


def tidy(value: float, eps: float) -> float:
    """Return the short decimal number that ``value`` is up to rounding, if there is one."""
    near = 2e-7 if eps < 1e-3 else eps / 8
    for digits in (2, 3, 4, 6):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= near * abs(value):
            return short
    return value


def _candidates(z: Tensor, x: Tensor, eps: float) -> Iterator[LogitMap | None]:
    classes = z.shape[1]
    slope = float((z * x).sum() / z.square().sum())
    yield _map("scale", tidy(slope, eps)) if slope else None
    if z.shape[0] >= 3:
        yield _affine(z, x)
    yield _soft_cap(z, x, eps)
    if bool((x >= 0).all() & (x <= 1).all()):
        yield _map("sigmoid", _slope(z, x.logit(), (x > 1e-3) & (x < 1 - 1e-3), eps))
        if classes > 1 and bool(((x.sum(1) - 1).abs() < max(1e-4, 8 * eps)).all()):
            yield _map("softmax", _row_slope(z, x, eps))
    if classes > 1 and bool((x <= 0).all()):
        yield _map("log_softmax", _row_slope(z, x.exp(), eps))
    yield _clamp(z, x, eps)


def _map(kind: str, *values: float | None) -> LogitMap | None:
    if any(v is None or math.isnan(v) for v in values):
        return None
    return LogitMap(kind, tuple(torch.tensor(v, dtype=torch.float64, device="cpu") for v in values))


def _slope(z: Tensor, x: Tensor, usable: Tensor, eps: float) -> float | None:
    """Slope of a line through 0, by least squares over the usable numbers."""
    z, x = z[usable], x[usable]
    if len(z) < 4:
        return None
    return tidy(float((z * x).sum() / z.square().sum()), eps)


def _row_slope(z: Tensor, p: Tensor, eps: float) -> float | None:
    """Return a of p = softmax(a z): log p_c - log p_d = a (z_c - z_d) in every row."""
    top = p.argmax(1, keepdim=True)
    ratio = (p / p.gather(1, top)).log()
    usable = (p > 1e-3).scatter(1, top, False)
    return _slope(z - z.gather(1, top), ratio, usable, eps)


def _affine(z: Tensor, x: Tensor) -> LogitMap | None:
    """Fit a_c z_c + b_c by least squares, each number by its own rounding."""
    weight = 1 / (1 + z.square())
    w, wz, wzz = weight.sum(0), (weight * z).sum(0), (weight * z * z).sum(0)
    factor, offset = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(3):  # the second and third for what the first rounds off
        off = x - factor * z - offset
        wx, wzx = (weight * off).sum(0), (weight * z * off).sum(0)
        determinant = w * wzz - wz * wz
        factor = factor + (w * wzx - wz * wx) / determinant
        offset = offset + (wzz * wx - wz * wzx) / determinant
    if not bool((factor * z).abs().max() > 1e-6 * x.abs().max()):
        return None  # logits that the head has no part in
    return LogitMap("affine", (factor, offset))


def _soft_cap(z: Tensor, x: Tensor, eps: float) -> LogitMap | None:
    """Fit a tanh(b z) by Gauss-Newton, from the largest number and the slope at 0."""
    a = float(x.abs().max()) * (1 + 1e-9)
    small = z.abs() <= z.abs().median() / 4
    b = float((z * x)[small].sum() / z[small].square().sum()) / a
    if not (math.isfinite(b) and b):
        return None
    for _ in range(_STEPS):
        t = (b * z).tanh()
        by_a, by_b = t, a * z * (1 - t * t)
        off = x - a * t
        aa, ab, bb = by_a.square().sum(), (by_a * by_b).sum(), by_b.square().sum()
        determinant = float(aa * bb - ab * ab)
        if not determinant > 0:
            return None
        to_a, to_b = float((by_a * off).sum()), float((by_b * off).sum())
        step_a = (float(bb) * to_a - float(ab) * to_b) / determinant
        step_b = (float(aa) * to_b - float(ab) * to_a) / determinant
        # No step turns a sign or multiplies a number: far from the solution the line is wrong.
        damping = max(1.0, 2 * abs(step_a / a), 2 * abs(step_b / b))
        a, b = a + step_a / damping, b + step_b / damping
        if max(abs(step_a / a), abs(step_b / b)) < 1e-15:
            break
    a, inverse = tidy(a, eps), tidy(1 / b, eps)
    return _map("tanh", a, 1 / inverse)


def _clamp(z: Tensor, x: Tensor, eps: float) -> LogitMap | None:
    """Fit a z between two limits: a largest or smallest number that comes more than once."""
    low, high = float(x.min()), float(x.max())
    limits = [
        limit if int((x == limit).sum()) > 1 else other
        for limit, other in ((low, -math.inf), (high, math.inf))
    ]
    inside = (x > limits[0]) & (x < limits[1])
    if limits == [-math.inf, math.inf]:
        return None
    return _map("clamp", _slope(z, x, inside, eps), *limits)
