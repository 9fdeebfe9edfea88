"""Statistics of heads whose output goes through a known map before the loss is taken of it.

A factor s changes nothing but the weights: the logits are those of the head s W, and a gradient by
W is s times the one by s W. Any other map is applied within the passes (see `problem.logit_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..core import engine
from ..core.logit_map import LogitMap
from ..core.losses import row_statistics
from ..core.precision import own_precision
from ..core.problem import Problem, build_problem
from ..core.sequences import segment_sum
from ..functional import LastLayerStats, last_layer_stats

_BLOCK_NUMBERS = 2**22


def head_stats(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_map: LogitMap | None = None,
    logit_scale: Sequence[float] | None = None,
    **options: Any,
) -> LastLayerStats:
    """`last_layer_stats` of the loss of m(s (W h + b)), with gradients by W and b.

    Parameters
    ----------
    logit_map
        m, the same for all heads; None = none.
    logit_scale
        s of each of the K heads; None = 1.
    **options
        As in `last_layer_stats`, which also says what is returned and raised. EL2N is the norm of
        the derivative by the logits m.
    """
    # log_softmax leaves cross-entropy as it is.
    if options.get("loss", "cross_entropy") == "cross_entropy" and logit_map is not None:
        logit_map = None if logit_map.keeps_cross_entropy() else logit_map
    scales = None
    if logit_scale is not None and any(s != 1.0 for s in logit_scale):
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        scales = torch.tensor(logit_scale, dtype=torch.float64, device=weight.device)
        if weight.dim() == 2:
            scales = scales[0]
        weight = (weight.double() * scales[..., None, None]).to(wide)
        bias = None if bias is None else (bias.double() * scales[..., None]).to(wide)
    if logit_map is None:
        stats = last_layer_stats(features, weight, labels, bias, **options)
    else:
        stats = _mapped_stats(features, weight, labels, bias, logit_map, **options)
    return stats if scales is None else _scaled(stats, scales)


def _scaled(stats: LastLayerStats, scales: Tensor) -> LastLayerStats:
    """Statistics by W from those by s W: gradients are s times as long."""
    square = scales.square()
    by_head = square[..., None].to(stats.alignment.device)
    return replace(
        stats,
        alignment=(stats.alignment * by_head).to(stats.alignment.dtype),
        grad_sqnorm=(stats.grad_sqnorm * by_head).to(stats.grad_sqnorm.dtype),
        _mean_grad_sqnorm=stats._mean_grad_sqnorm * square.to(stats._mean_grad_sqnorm.device),
    )


def _mapped_stats(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_map: LogitMap,
    *,
    backend: str = "auto",
    chunk_size: int | None = None,
    **options: Any,
) -> LastLayerStats:
    problem = build_problem(features, weight, labels, bias, logit_map=logit_map, **options)
    chosen = choose(problem, backend)[0]
    with own_precision(problem):
        found = engine.run(problem, chosen, chunk_size)
        found.el2n = _logit_residuals(problem, found.alignment)
    shape = found.alignment.shape if problem.stacked else found.alignment.shape[1:]
    names = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")
    return LastLayerStats(
        **{name: getattr(found, name).reshape(shape) for name in names},
        backend=chosen.name,
        _mean_grad_sqnorm=found.mean_grad_sqnorm,
        _count=found.count,
    )


def _logit_residuals(problem: Problem, like: Tensor) -> Tensor:
    """EL2N: |dl/dm| of every sample; the passes know the derivative by the head's output alone."""
    assert problem.logit_map is not None
    heads, classes, dtype = problem.heads, problem.classes, problem.compute_dtype
    squared = torch.empty(heads, problem.rows, dtype=dtype, device=problem.device)
    step = max(1, _BLOCK_NUMBERS // (heads * classes))
    for start in range(0, problem.rows, step):
        rows = slice(start, min(start + step, problem.rows))
        counted, labels = problem.counted(rows), problem.labels[rows]
        if not problem.soft_labels:
            labels = torch.where(counted, labels.long(), 0)
        h = torch.nan_to_num(problem.feature_rows(rows).to(dtype))
        z = torch.einsum("nd,kcd->nkc", h, problem.weight)
        if problem.bias is not None:
            z = z + problem.bias
        stats = row_statistics(
            problem.logit_map.apply(z),
            labels if labels.dim() == 1 else labels.to(dtype),
            loss=problem.loss,
            label_smoothing=problem.label_smoothing,
            sample_weight=None if problem.sample_weight is None else problem.sample_weight[rows],
        )
        squared[:, rows] = torch.where(counted[:, None], stats.residual_sqnorm, 0).T
    if problem.cu_seqlens is not None:
        squared = segment_sum(squared.double(), problem.cu_seqlens).to(dtype)
    el2n = squared.sqrt().reshape(like.shape)
    # Samples that do not count have no alignment either.
    return torch.where(torch.isnan(like), like, el2n)
