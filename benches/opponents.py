"""What the package is measured against: the same numbers in plain PyTorch, no kernels of ours.

Every function takes ``(features (N, D), weight (C, D), labels (N,), bias (C,))`` and returns
``(loss, alignment, grad_sqnorm)``, each (N,), for cross-entropy with class ids. None builds a
per-sample gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = tuple[Tensor, Tensor, Tensor]
Opponent = Callable[[Tensor, Tensor, Tensor, Tensor], Scores]

CHUNK_ROWS = (512, 2048, 8192, 32768)


def naive(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
    """Evaluate the closed form over all rows at once: what a reader of the paper writes first."""
    rows = torch.arange(len(labels), device=labels.device)
    logits = F.linear(features, weight, bias)
    loss = F.cross_entropy(logits, labels, reduction="none")
    residual = logits.softmax(1)
    residual[rows, labels] -= 1
    mean_grad = residual.T @ features / len(labels)
    alignment = (residual * F.linear(features, mean_grad, residual.mean(0))).sum(1)
    grad_sqnorm = residual.square().sum(1) * (features.square().sum(1) + 1)
    return loss, alignment, grad_sqnorm


def first_chunk(h: Tensor, weight: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Loss, residual, self norm and gradient sums of one chunk."""
    logits = torch.addmm(bias, h, weight.T)
    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, y[:, None]).squeeze(1)
    residual = log_p.exp()
    residual = residual - F.one_hot(y, weight.shape[0]).to(residual.dtype)
    sqnorm = residual.square().sum(1) * (torch.linalg.vector_norm(h, dim=1).square() + 1)
    return loss, residual, sqnorm, residual.T @ h, residual.sum(0)


def second_chunk(h: Tensor, residual: Tensor, mean_grad: Tensor, mean_bias: Tensor) -> Tensor:
    """Alignment of one chunk."""
    return (residual * torch.addmm(mean_bias, h, mean_grad.T)).sum(1)


def chunked(
    rows: int,
    first: Callable[..., tuple[Tensor, ...]] = first_chunk,
    second: Callable[..., Tensor] = second_chunk,
) -> Opponent:
    """Return the closed form over chunks of rows, residuals kept between the passes."""

    def run(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
        count = len(labels)
        loss, alignment, sqnorm = (features.new_empty(count) for _ in range(3))
        grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
        kept = []
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            loss[part], residual, sqnorm[part], outer, sums = first(
                features[part], weight, labels[part], bias
            )
            grad += outer
            bias_grad += sums
            kept.append(residual)
        grad /= count
        bias_grad /= count
        for index, start in enumerate(range(0, count, rows)):
            part = slice(start, start + rows)
            alignment[part] = second(features[part], kept[index], grad, bias_grad)
        return loss, alignment, sqnorm

    return run


def compiled(rows: int) -> Opponent:
    """Return :func:`chunked` with both chunk functions compiled."""
    return chunked(
        rows, torch.compile(first_chunk, dynamic=False), torch.compile(second_chunk, dynamic=False)
    )


def jvp(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
    """Mean gradient by one backward pass, alignments as one forward-mode derivative along it."""
    head = (weight.detach().requires_grad_(), bias.detach().requires_grad_())

    def losses(w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, w, b), labels, reduction="none")

    mean_grad = torch.autograd.grad(losses(*head).mean(), head)
    with torch.no_grad():
        plain = tuple(p.detach() for p in head)
        loss, alignment = torch.func.jvp(losses, plain, mean_grad)
        residual = F.linear(features, *plain).softmax(1)
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1
        sqnorm = residual.square().sum(1) * (features.square().sum(1) + 1)
    return loss, alignment, sqnorm
