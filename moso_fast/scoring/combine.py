"""From row statistics per checkpoint and part to one ScoreTable; the algebra every scorer shares.

The paper's score is ``T / (N K) sum_k eta_k s_k``: each sample is scored against the mean
gradient of its own part of N samples, at K sampled checkpoints with learning rates eta_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tables.table import ScoreTable
from .parts import FIELDS, split_parts

COMBINE = ("mean", "zscore")


def combine_checkpoints(
    stats: Sequence[Mapping[str, Tensor]],
    *,
    lr: Sequence[float],
    partition: Tensor | None = None,
    combine: str = "mean",
    num_steps: int | None = None,
    index: Tensor,
    provenance: Mapping[str, Any] | None = None,
) -> ScoreTable:
    """Combine the statistics of K checkpoints into one table.

    Parameters
    ----------
    stats
        K mappings as returned by :func:`parts.with_scores`: alignment, grad_sqnorm, loss, el2n,
        margin, entropy, score, each (N,).
    lr
        K learning rates eta_k, in units of the optimiser's step.
    partition
        (N,) ids of the parts the statistics were computed in; None = one part.
    combine
        ``"mean"``: score = T / (N K) sum_k eta_k s_k with N the counted samples of the part (the
        paper). ``"zscore"``: s_k less its mean over the population standard deviation within its
        part (all zero where that is 0), averaged over k; eta_k and T / N cancel.
    num_steps
        T, the number of training steps; None leaves the factor T / N out.
    index
        (N,) data-set indices of the rows.
    provenance
        JSON-able facts to keep with the table.

    Returns
    -------
    ScoreTable
        ``metrics``: means over checkpoints of the six statistics, ``grand`` = mean of
        sqrt(grad_sqnorm), ``self_influence`` = (1/K) sum_k eta_k grad_sqnorm_k.
        ``per_checkpoint``: the six (K, N), and ``score`` = eta_k s_k.

    Raises
    ------
    ValueError
        No checkpoint, unequal lengths, a missing key, an unknown ``combine``, a bad
        ``num_steps``, learning rates that are all 0 with ``combine="mean"``.
    """
    num_checkpoints = len(stats)
    if num_checkpoints == 0:
        raise ValueError("stats must hold at least one checkpoint; got none")
    if len(lr) != num_checkpoints:
        raise ValueError(
            f"lr must give one learning rate a checkpoint; got {len(lr)} for {num_checkpoints}"
        )
    check_combine(combine, num_steps)
    if combine == "mean" and all(float(rate) == 0 for rate in lr):
        raise ValueError(
            "lr is 0 for all checkpoints, which would make every score 0; give the learning rates "
            "of the steps that were taken (a schedule that ends at 0 leaves 0 in its last "
            "checkpoint)"
        )
    rates = torch.tensor([float(rate) for rate in lr], dtype=torch.float64, device="cpu")[:, None]
    parts: list[Any] = [slice(None)]
    if partition is not None:
        parts = [rows for _, rows in split_parts(partition, index.shape[0])]
    per_checkpoint = {name: _stack(stats, name, index) for name in (*FIELDS, "score")}
    raw = per_checkpoint["score"].double()
    dtype = per_checkpoint["score"].dtype
    per_checkpoint["score"] = (raw * rates).to(dtype)
    if combine == "zscore":
        combined = _standardise(raw, parts)
    else:
        combined = raw * rates
        if num_steps is not None:
            counted = (~per_checkpoint["alignment"].isnan()).double()
            for part in parts:
                combined[:, part] *= num_steps / counted[:, part].sum(1, keepdim=True)
    metrics = {name: per_checkpoint[name].mean(0, dtype=torch.float64) for name in FIELDS}
    sqnorm = per_checkpoint["grad_sqnorm"].double()
    metrics["grand"] = sqnorm.sqrt().mean(0)
    metrics["self_influence"] = (sqnorm * rates).mean(0)
    return ScoreTable(
        scores=combined.mean(0).to(dtype),
        metrics={name: values.to(dtype) for name, values in metrics.items()},
        per_checkpoint=per_checkpoint,
        index=index,
        higher_is_better=True,
        provenance=dict(provenance or {}),
    )


def check_combine(combine: str, num_steps: int | None = None) -> None:
    """Raise ValueError for an unknown ``combine`` or a ``num_steps`` that is no count."""
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}; got {combine!r}")
    if num_steps is not None and (isinstance(num_steps, bool) or num_steps < 1):
        raise ValueError(f"num_steps must be None or a whole number >= 1; got {num_steps!r}")


def _stack(stats: Sequence[Mapping[str, Tensor]], name: str, index: Tensor) -> Tensor:
    """Stack one statistic of all checkpoints to (K, N) on the CPU."""
    for k, one in enumerate(stats):
        if name not in one:
            raise ValueError(f"stats of checkpoint {k} lack {name!r}; they have {sorted(one)}")
        if one[name].shape != index.shape:
            raise ValueError(
                f"stats[{k}][{name!r}] must have shape {tuple(index.shape)}, as index; "
                f"got {tuple(one[name].shape)}"
            )
    return torch.stack([one[name].detach().cpu() for one in stats])


def _standardise(scores: Tensor, parts: Sequence[Any]) -> Tensor:
    """Zero mean and unit population deviation per checkpoint and part; NaN stays NaN."""
    result = torch.empty_like(scores)
    for rows in parts:
        values = scores[:, rows]
        if not values.numel():
            continue
        centred = values - values.nanmean(1, keepdim=True)
        deviation = centred.square().nanmean(1, keepdim=True).sqrt()
        # Equal scores leave rounding noise of the mean behind: that is no spread either.
        noise = 1e-14 * values.abs().nan_to_num(0.0).amax(1, keepdim=True)
        flat = deviation <= noise
        result[:, rows] = torch.where(flat, centred * 0.0, centred / deviation)
    return result
