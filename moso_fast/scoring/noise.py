"""Whether 16-bit operands were too coarse for the scores of a run, judged by its own statistics.

A MoSo score is (N a - q) / (N - 1), and a holds q / N: where a sample's gradient is nearly
orthogonal to all others (many classes, few samples of each), the score is a small difference of
terms of size q / (N - 1). With ``precision="medium"`` each of these is right to 2e-4 or so of its
size (measured on 500 to 32,000 classes), whatever is left of the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

# Of the terms: at 100 times the size of the score, its error is some percent.
_LARGEST_RATIO = 100.0


def cancellation(
    fields: Mapping[str, Tensor], counts: Mapping[int, int], ids: Tensor | None
) -> float:
    """Return the median over the samples of q / (N - 1) by the size of the MoSo score.

    Parameters
    ----------
    fields
        ``alignment`` and ``grad_sqnorm``, (N,) each, NaN where a sample does not count.
    counts
        N of every part; ``ids`` (N,) says which part a sample belongs to, None = all to one.
    """
    q = fields["grad_sqnorm"].double()
    if ids is None:
        count = torch.full_like(q, next(iter(counts.values())))
    else:
        count = torch.zeros_like(q)
        for part, number in counts.items():
            count[ids == part] = number
    own = q / (count - 1)
    score = count / (count - 1) * fields["alignment"].double() - own
    ratio = own / score.abs()
    ratio = ratio[~ratio.isnan()]
    return float(ratio.median()) if len(ratio) else 0.0


def warn_if_noise(ratio: float) -> None:
    """Warn that scores are small differences of rounded terms, and say what helps."""
    if ratio > _LARGEST_RATIO:
        warnings.warn(
            f"precision='medium': the scores are differences of terms {ratio:.0f} times their size "
            f"(many classes, few samples of each), so about {min(1.0, 2e-4 * ratio):.0%} of each "
            "may be rounding; precision='high' or 'highest' scores them exactly",
            stacklevel=5,  # whoever called MoSoScorer.score
        )
