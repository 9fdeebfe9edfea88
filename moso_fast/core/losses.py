"""Residual dl/dz and row statistics of each loss, in plain PyTorch.

The label's residual is always built from the *other* classes, never as ``p - 1``, and the loss
of a sample whose label wins as ``log1p(sum of the others)``, never as ``lse - z_y``: with losses
near 1e-8 the textbook forms round to exactly 0 in float32 and the ranking is lost.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logit_map import LogitMap


class Loss(NamedTuple):
    """What a loss wants of the targets of a row, and whether its outputs are a distribution."""

    least: float  # the smallest target, and the largest: finite ones in any case
    most: float
    sum_to_one: bool = False
    entropy: bool = True  # else margin and entropy are NaN

    def wrong(self, targets: Tensor) -> Tensor:
        """Mask of the entries that are no targets."""
        if self.least < self.most < math.inf:
            return ~((targets >= self.least) & (targets <= self.most))
        return ~(torch.isfinite(targets) & (targets >= self.least))


KNOWN = {
    "cross_entropy": Loss(0.0, 1.0, sum_to_one=True),
    "binary_cross_entropy": Loss(0.0, 1.0),
    "mse": Loss(-math.inf, math.inf, entropy=False),
}
LOSSES = tuple(KNOWN)

# Largest deviation of a row of label probabilities from sum 1 that rounding (bfloat16) explains.
SOFT_LABEL_TOLERANCE = 1e-2


class RowStatistics(NamedTuple):
    """What one row yields: ``residual`` (..., C) and scalars (...) of every row."""

    residual: Tensor
    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor


def row_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> RowStatistics:
    """Residual, loss, |residual|^2, margin and entropy of every row.

    Parameters
    ----------
    logits
        (n, K, C): rows, heads, classes; float32 or float64.
    labels
        (n,) int64 class ids within [0, C), or (n, C) targets in the dtype of ``logits``.
    loss
        ``"cross_entropy"``: -sum_c t_c log p_c, where t is the (smoothed) label.
        ``"binary_cross_entropy"`` and ``"mse"``: the sum over the C outputs of
        ``F.binary_cross_entropy_with_logits`` and ``F.mse_loss`` with ``reduction="none"``.
    label_smoothing
        epsilon in [0, 1): t <- (1 - epsilon) t + epsilon / C, as in ``F.cross_entropy``.
    sample_weight
        (n,) factors on the loss, hence on the residual.

    Returns
    -------
    RowStatistics
        residual (n, K, C); the rest (n, K). Margin is z_y - max of the others (+inf where C = 1);
        for binary targets the smallest logit signed by its target; NaN for ``"mse"``.
        Entropy is that of the predicted distribution in nats (sum over C for binary), NaN for
        ``"mse"``.
    """
    if loss == "cross_entropy":
        if labels.dim() == 1:
            stats = _cross_entropy_ids(logits, labels, label_smoothing)
        else:
            stats = _cross_entropy_soft(logits, labels, label_smoothing)
    elif loss == "binary_cross_entropy":
        stats = _binary_cross_entropy(logits, labels)
    else:
        stats = _mse(logits, labels)
    residual, loss_values, margin, entropy = stats
    if sample_weight is not None:
        residual = residual * sample_weight[:, None, None]
        loss_values = loss_values * sample_weight[:, None]
    return RowStatistics(residual, loss_values, residual.square().sum(-1), margin, entropy)


def mapped_statistics(
    logit_map: LogitMap | None, outputs: Tensor, labels: Tensor, **options: Any
) -> RowStatistics:
    """Row statistics of the loss of m(z), where the residual is that by the head's outputs z.

    Parameters
    ----------
    logit_map
        m; None = the outputs are the logits.
    outputs
        (n, K, C); labels and options as in :func:`row_statistics`.
    """
    if logit_map is None:
        return row_statistics(outputs, labels, **options)
    stats = row_statistics(logit_map.apply(outputs), labels, **options)
    residual = logit_map.pull_back(outputs, stats.residual)
    return stats._replace(residual=residual, residual_sqnorm=residual.square().sum(-1))


def _cross_entropy_ids(
    z: Tensor, y: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    classes = z.shape[-1]
    index = y[:, None, None].expand(-1, z.shape[1], 1)
    top = z.argmax(-1, keepdim=True)
    shifted = z - z.gather(-1, top)
    residual = shifted.exp()
    label_exp = residual.gather(-1, index).squeeze(-1)
    label_shift = shifted.gather(-1, index).squeeze(-1)
    # S = 1 + rest, its largest term set aside: log S keeps its digits where S rounds to 1.
    residual.scatter_(-1, index, 0.0).scatter_(-1, top, 0.0)
    neither = residual.sum(-1)
    wins = (top == index).squeeze(-1)
    others = torch.where(wins, neither, neither + 1.0)
    rest = torch.where(wins, neither, neither + label_exp)
    total, log_total = 1.0 + rest, rest.log1p()
    loss = log_total - label_shift
    entropy = (
        log_total - ((residual * shifted).sum(-1) + label_exp * label_shift) / total
    ).clamp_min(0.0)
    residual.scatter_(-1, top, 1.0)
    residual /= total[..., None]
    residual.scatter_(-1, index, -(others / total)[..., None])
    if smoothing:
        loss = (1.0 - smoothing) * loss + smoothing * (log_total - shifted.mean(-1))
        residual -= smoothing / classes
        residual.scatter_add_(-1, index, torch.full_like(others, smoothing)[..., None])
    rival = z.scatter(-1, index, float("-inf")).amax(-1)
    margin = z.gather(-1, index).squeeze(-1) - rival
    return residual, loss, margin, entropy


def _cross_entropy_soft(
    z: Tensor, target: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    classes = z.shape[-1]
    t = (target * (1.0 - smoothing) + smoothing / classes)[:, None, :].expand(z.shape)
    top = z.argmax(-1, keepdim=True)
    shifted = z - z.gather(-1, top)
    exp = shifted.exp()
    others = exp.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    total = 1.0 + others
    p, log_p = exp / total, shifted - others.log1p()
    residual = p * t.sum(-1, keepdim=True) - t
    # Of the winner p may round to 1: (sum of the other targets) p - t (1 - p) loses nothing.
    t_top, t_rest = t.gather(-1, top), t.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    residual.scatter_(-1, top, t_rest / total - t_top * (others / total))
    loss = -(t * log_p).sum(-1)
    entropy = -(p * log_p).sum(-1)
    label = target.argmax(-1)[:, None, None].expand(-1, z.shape[1], 1)
    rival = z.scatter(-1, label, float("-inf")).amax(-1)
    return residual, loss, z.gather(-1, label).squeeze(-1) - rival, entropy


def _binary_cross_entropy(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = target[:, None, :]
    p, not_p = z.sigmoid(), (-z).sigmoid()
    tail = z.abs().neg().exp().log1p()
    if_off, if_on = z.clamp_min(0) + tail, (-z).clamp_min(0) + tail
    residual = (1.0 - t) * p - t * not_p
    loss = ((1.0 - t) * if_off + t * if_on).sum(-1)
    margin = torch.where(t >= 0.5, z, -z).amin(-1)
    entropy = (p * if_on + not_p * if_off).sum(-1)
    return residual, loss, margin, entropy


def _mse(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    error = z - target[:, None, :]
    loss = error.square().sum(-1)
    undefined = torch.full_like(loss, float("nan"))
    return 2.0 * error, loss, undefined, undefined
