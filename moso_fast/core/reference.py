"""The definition: what every backend must equal, written for reading.

Two forms of the same numbers. :func:`explicit_stats` builds every per-sample gradient (N x C x D
numbers) and dots it with their mean, which is the paper's definition word by word.
:func:`closed_form_stats` uses g_i = r_i (outer) [h_i; 1] so that no gradient is built; it serves
where the explicit form does not fit in memory. Both compute in ``dtype`` throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import row_statistics
from .problem import Problem, build_problem
from .status import sequence_offsets


@dataclass(frozen=True)
class ReferenceStats:
    """Fields as in :class:`moso_fast.LastLayerStats`, always with the leading K axis."""

    alignment: Tensor
    grad_sqnorm: Tensor
    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    mean_grad: Tensor
    mean_grad_sqnorm: Tensor
    count: int


def per_sample_gradients(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Gradient of every sample's loss with respect to ``[weight, bias]``.

    Returns
    -------
    Tensor
        (K, N, C, D), or (K, N, C, D + 1) with the bias as the last column; zeros for ignored
        samples. Takes the options of :func:`moso_fast.last_layer_stats` and ``dtype``.
    """
    problem, rows = _rows(features, weight, labels, bias, **options)
    return _sum_sequences(problem, _row_gradients(rows), dim=1)


def explicit_stats(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> ReferenceStats:
    """a_i = <g_i, G>, q_i = |g_i|^2 and |G|^2 from explicit per-sample gradients.

    Equals, for one head and class-id labels::

        grads = torch.func.vmap(torch.func.grad(loss))(...)      # (N, C, D + 1)
        G = grads.mean(0); a = (grads * G).sum((1, 2)); q = (grads ** 2).sum((1, 2))
    """
    problem, rows = _rows(features, weight, labels, bias, **options)
    grads = _sum_sequences(problem, _row_gradients(rows), dim=1)
    counted = _sum_sequences(problem, rows.counted[None].long(), dim=1)[0] > 0
    count = int(counted.sum())
    mean_grad = grads.sum(1) / max(count, 1)
    alignment = torch.einsum("kncd,kcd->kn", grads, mean_grad)
    grad_sqnorm = grads.square().sum((2, 3))
    return _finish(problem, rows, counted, count, mean_grad, alignment, grad_sqnorm)


def closed_form_stats(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> ReferenceStats:
    """Compute the same numbers without a per-sample gradient; no sequences.

    Equals, with r the residuals (N, C) and h the features with a column of ones for the bias::

        G = r.T @ h / N; a = ((r @ G) * h).sum(1); q = (r ** 2).sum(1) * (h ** 2).sum(1)
    """
    problem, rows = _rows(features, weight, labels, bias, **options)
    if problem.cu_seqlens is not None:
        raise ValueError("closed_form_stats has no sequences; use explicit_stats")
    count = int(rows.counted.sum())
    mean_grad = torch.einsum("knc,nd->kcd", rows.residual, rows.features) / max(count, 1)
    projected = torch.einsum("knc,kcd->knd", rows.residual, mean_grad)
    alignment = (projected * rows.features).sum(-1)
    grad_sqnorm = rows.residual.square().sum(-1) * rows.features.square().sum(-1)
    return _finish(problem, rows, rows.counted, count, mean_grad, alignment, grad_sqnorm)


@dataclass(frozen=True)
class _Rows:
    features: Tensor  # (N, D) or (N, D + 1) with ones for the bias
    residual: Tensor  # (K, N, C), of the head's outputs, zero where not counted
    logit_sqnorm: Tensor  # (K, N) squared norm of the residual of the logits
    loss: Tensor  # (K, N), as are margin and entropy
    margin: Tensor
    entropy: Tensor
    counted: Tensor  # (N,) bool


def _rows(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Problem, _Rows]:
    problem = build_problem(features, weight, labels, bias, **options)
    counted = problem.counted(slice(None))
    finite = torch.isfinite(problem.features).all(1)
    if problem.nonfinite == "exclude":
        counted = counted & finite
    h = torch.where(counted[:, None], problem.features, 0).to(dtype)
    logits = torch.einsum("nd,kcd->nkc", h, problem.weight.to(dtype))
    if problem.bias is not None:
        logits = logits + problem.bias.to(dtype)
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    targets = problem.labels.to(dtype) if problem.soft_labels else problem.labels.long()
    if not problem.soft_labels:
        targets = torch.where(counted, targets, 0)
    weights = None if problem.sample_weight is None else problem.sample_weight.to(dtype)
    logit_map = problem.logit_map
    stats = row_statistics(
        logits if logit_map is None else logit_map.apply(logits),
        targets,
        loss=problem.loss,
        label_smoothing=problem.label_smoothing,
        sample_weight=weights,
    )
    by_logits = torch.where(counted[:, None, None], stats.residual, 0)
    by_outputs = by_logits if logit_map is None else logit_map.pull_back(logits, by_logits)
    values = (by_logits.square().sum(-1).T, stats.loss.T, stats.margin.T, stats.entropy.T)
    return problem, _Rows(h, by_outputs.transpose(0, 1), *values, counted)


def _row_gradients(rows: _Rows) -> Tensor:
    return torch.einsum("knc,nd->kncd", rows.residual, rows.features)


def _sum_sequences(problem: Problem, values: Tensor, dim: int) -> Tensor:
    if problem.cu_seqlens is None:
        return values
    lengths = sequence_offsets(problem).diff().tolist()
    return torch.stack([part.sum(dim) for part in values.split(lengths, dim)], dim)


def _finish(
    problem: Problem,
    rows: _Rows,
    counted: Tensor,
    count: int,
    mean_grad: Tensor,
    alignment: Tensor,
    grad_sqnorm: Tensor,
) -> ReferenceStats:
    used = rows.counted[None]
    tokens = _sum_sequences(problem, used.to(rows.loss.dtype), dim=1)

    def total(values: Tensor) -> Tensor:
        return _sum_sequences(problem, torch.where(used, values, 0), dim=1)

    def visible(values: Tensor) -> Tensor:
        return torch.where(counted[None], values, float("nan"))

    return ReferenceStats(
        alignment=visible(alignment),
        grad_sqnorm=visible(grad_sqnorm),
        loss=visible(total(rows.loss)),
        el2n=visible(total(rows.logit_sqnorm).sqrt()),
        margin=visible(total(rows.margin) / tokens),
        entropy=visible(total(rows.entropy) / tokens),
        mean_grad=mean_grad,
        mean_grad_sqnorm=mean_grad.square().sum((1, 2)),
        count=count,
    )
