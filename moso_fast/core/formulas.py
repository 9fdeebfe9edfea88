"""Scores from (alignment, self norm, |G|^2, N): pure algebra, no kernels.

With a_i = <g_i, G>, q_i = |g_i|^2 and G the mean gradient of the N counted samples, every
formula here is what one step of training loses (or gains) when sample i is left out, but for
``"cosine"``: a_i / (|g_i| |G|), the direction alone, whatever the size of a gradient (the length of
a sequence, say).
"""

from __future__ import annotations

import math
import numbers

from torch import Tensor

FORMULAS = ("moso", "one_step", "official", "official_exact", "alignment", "cosine")

# The formulas that do not divide by N - 1: defined where the sample is the only one of its part.
_NEEDS_NO_OTHERS = ("official", "alignment", "cosine")


def check_formula(formula: str) -> str:
    """Return ``formula``, or raise ValueError naming the known ones."""
    if formula not in FORMULAS:
        raise ValueError(f"formula must be one of {', '.join(FORMULAS)}; got {formula!r}")
    return formula


def check_scale(scale: float) -> None:
    """Raise TypeError unless ``scale`` is a real number, ValueError unless it is finite."""
    # A float first: what an abstract class has to say takes longer than a small part of a job.
    if type(scale) is not float and (
        isinstance(scale, bool) or not isinstance(scale, numbers.Real)
    ):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_count(formula: str, count: int) -> None:
    """Raise ValueError where ``formula`` divides by N - 1 and only one sample counts."""
    if count == 1 and formula not in _NEEDS_NO_OTHERS:
        raise ValueError(
            f"formula={formula!r} compares a sample with the others, but only 1 sample counts; "
            "give at least 2, or use formula='alignment'"
        )


def score(
    formula: str,
    alignment: Tensor,
    grad_sqnorm: Tensor,
    mean_grad_sqnorm: Tensor,
    count: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Scores of one checkpoint; high = informative = keep.

    Parameters
    ----------
    formula
        One of :data:`FORMULAS` (the paper's equation: ``"moso"``).
    alignment, grad_sqnorm
        a_i and q_i, shape (N,) or (K, N).
    mean_grad_sqnorm
        |G|^2 of every head, (K,) float64; K = 1 for (N,) alignments.
    count
        N, the number of samples that count, () int64; with fewer than two the formulas that
        divide by N - 1 give NaN (see :func:`check_count` for the error).
    scale
        Factor on the result, such as the learning rate eta_t.

    Returns
    -------
    Tensor
        Same shape and dtype as ``alignment``; computed in float64.

    Raises
    ------
    ValueError
        Unknown formula.
    """
    check_formula(formula)
    if formula == "moso":
        # The one that is asked for most, in few operations; in float64, as the first of them is.
        result = (alignment.double() * count).sub_(grad_sqnorm).div_(count - 1)
        return (result if scale == 1 else result.mul_(scale)).to(alignment.dtype)
    a, q, n = alignment.double(), grad_sqnorm.double(), count.double()
    g2 = mean_grad_sqnorm[:, None] if a.dim() == 2 else mean_grad_sqnorm[0]
    others = n - 1.0
    if formula == "one_step":
        result = ((n + 1.0) * a - n * g2 - q) / others**2
    elif formula == "official":
        result = a - q / n
    elif formula == "official_exact":
        result = ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / others**2
    elif formula == "cosine":
        # Of a gradient of zero, or with a mean of zero: no direction, no agreement.
        norms = q.sqrt() * g2.sqrt()
        result = (a / norms).masked_fill_(norms == 0, 0.0)
    else:
        result = a
    return (result * scale).to(alignment.dtype)
