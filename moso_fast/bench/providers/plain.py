"""The honest opponents: the same results in plain PyTorch, none with a per-sample gradient.

The functions on one head take ``(features (N, D), weight (C, D), labels (N,), bias (C,))`` and
return ``(loss, alignment, grad_sqnorm)``, each (N,), for cross-entropy with class ids. Features
of 16 bits are multiplied in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...util.forward_mode import load_forward_mode
from ..cases import Case
from ..inputs import Inputs
from .base import Job, Provider
from .ours import NAMES

__all__ = ["CHUNK_ROWS", "PROVIDERS", "Opponent", "Scores", "chunked", "compiled", "jvp", "naive"]

Scores = tuple[Tensor, Tensor, Tensor]
Opponent = Callable[[Tensor, Tensor, Tensor, Tensor], Scores]

CHUNK_ROWS = (512, 2048, 8192, 32768)
COMPILED_ROWS = 2048
NARROW = "16-bit products, chunks of 2048"


def naive(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
    """Evaluate the closed form over all rows at once: what a reader of the paper writes first."""
    features = features.to(weight.dtype)
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
    h = h.to(weight.dtype)
    logits = torch.addmm(bias, h, weight.T)
    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, y[:, None]).squeeze(1)
    residual = log_p.exp()
    residual = residual - F.one_hot(y, weight.shape[0]).to(residual.dtype)
    sqnorm = residual.square().sum(1) * (torch.linalg.vector_norm(h, dim=1).square() + 1)
    return loss, residual, sqnorm, residual.T @ h, residual.sum(0)


def second_chunk(h: Tensor, residual: Tensor, mean_grad: Tensor, mean_bias: Tensor) -> Tensor:
    """Alignment of one chunk."""
    return (residual * torch.addmm(mean_bias, h.to(residual.dtype), mean_grad.T)).sum(1)


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T`` by oneDNN, which on some processors is twice as fast as ``torch.mm``."""
    left, right = a.contiguous().to_mkldnn(), b.contiguous().to_mkldnn()
    return torch.ops.aten.mkldnn_linear(left, right).to_dense()


def first_chunk_onednn(h: Tensor, weight: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """:func:`first_chunk` with its products by oneDNN."""
    h = h.to(weight.dtype)
    residual = onednn_product(h, weight).add_(bias).log_softmax(1)
    loss = -residual.gather(1, y[:, None]).squeeze(1)
    residual.exp_()
    residual[torch.arange(len(y), device=y.device), y] -= 1
    sqnorm = residual.square().sum(1) * (torch.linalg.vector_norm(h, dim=1).square() + 1)
    return loss, residual, sqnorm, onednn_product(residual.T, h.T), residual.sum(0)


def second_chunk_onednn(
    h: Tensor, residual: Tensor, mean_grad: Tensor, mean_bias: Tensor
) -> Tensor:
    """:func:`second_chunk` with its product by oneDNN."""
    return onednn_product(h.to(residual.dtype), mean_grad).add_(mean_bias).mul_(residual).sum(1)


def chunked(
    rows: int,
    first: Callable[..., tuple[Tensor, ...]] = first_chunk,
    second: Callable[..., Tensor] = second_chunk,
) -> Opponent:
    """Return the closed form over chunks of rows, residuals kept between the passes."""

    def run(features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Scores:
        count = len(labels)
        loss, alignment, sqnorm = (features.new_empty(count, dtype=weight.dtype) for _ in range(3))
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
    load_forward_mode()
    features = features.to(weight.dtype)
    head = (weight.detach().requires_grad_(), bias.detach().requires_grad_())

    def losses(w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, w, b), labels, reduction="none")

    mean_grad = torch.autograd.grad(losses(*head).mean(), head)
    with torch.no_grad():
        plain = tuple(p.detach() for p in head)
        loss, alignment = torch.func.jvp(losses, plain, mean_grad)[:2]
        residual = F.linear(features, *plain).softmax(1)
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1
        sqnorm = residual.square().sum(1) * (features.square().sum(1) + 1)
    return loss, alignment, sqnorm


def fused_mean_gradient(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, rows: int = 2048
) -> Scores:
    """Mean gradient by ``F.linear_cross_entropy``, everything else chunk by chunk.

    Its own documentation recommends chunks where N >= D and C > D; elsewhere it takes none.
    """
    features = features.to(weight.dtype)
    head = (weight.detach().requires_grad_(), bias.detach().requires_grad_())
    chunks = weight.shape[1] < weight.shape[0] and weight.shape[1] <= len(labels)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512) if chunks else None
    mean_loss = F.linear_cross_entropy(
        features, head[0], labels, linear_bias=head[1], options=options
    )
    mean_grad, mean_bias = torch.autograd.grad(mean_loss, head)
    loss, alignment, sqnorm = (torch.empty_like(features[:, 0]) for _ in range(3))
    with torch.no_grad():
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            h, y = features[part], labels[part]
            log_p = torch.addmm(bias, h, weight.T).log_softmax(1)
            loss[part] = -log_p.gather(1, y[:, None]).squeeze(1)
            residual = log_p.exp_()
            residual[torch.arange(len(y), device=y.device), y] -= 1
            alignment[part] = second_chunk(h, residual, mean_grad, mean_bias)
            sqnorm[part] = residual.square().sum(1) * (h.square().sum(1) + 1)
    return loss, alignment, sqnorm


def _on_heads(opponent: Opponent) -> Callable[[Case, Inputs], Job]:
    """Job of an opponent; K heads one after another, which is what it would take."""

    def prepare(case: Case, inputs: Inputs) -> Job:
        def one() -> dict[str, Tensor]:
            return dict(zip(NAMES, opponent(*inputs.head), strict=True))

        def several() -> dict[str, Tensor]:
            found = [
                opponent(inputs.features, weight, inputs.labels, bias)
                for weight, bias in zip(inputs.weight, inputs.bias, strict=True)
            ]
            return {name: torch.stack([f[i] for f in found]) for i, name in enumerate(NAMES)}

        return one if case.heads == 1 else several

    return prepare


def _chunks_fit(rows: int) -> Callable[[Case, Inputs], str | None]:
    def refuse(case: Case, inputs: Inputs) -> str | None:
        count = len(inputs.labels)
        return None if rows < count else f"{count} rows are one chunk: the same as naive"

    return refuse


def _no_onednn(case: Case, inputs: Inputs) -> str | None:
    if inputs.features.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "oneDNN is PyTorch's library for CPUs"
    return None


def _no_fused(case: Case, inputs: Inputs) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    return None


def _medium(case: Case, inputs: Inputs) -> Job:
    """Chunks multiplied in bfloat16."""
    weight, bias = inputs.weight.to(case.dtype), inputs.bias.to(case.dtype)
    run = chunked(COMPILED_ROWS)
    return lambda: dict(zip(NAMES, run(inputs.features, weight, inputs.labels, bias), strict=True))


def _provider(name: str, opponent: Opponent, **options: Any) -> Provider:
    kinds = frozenset({"head", "heads"})
    return Provider(name, "plain", kinds, _on_heads(opponent), **options)


def _compiled_job(case: Case, inputs: Inputs) -> Job:
    torch.compiler.reset()  # after a few shapes of other cases it would no longer compile
    job = _on_heads(compiled(COMPILED_ROWS))(case, inputs)
    job()  # compiles: set-up, which would else be taken for the time of a call
    return job


PROVIDERS = (
    _provider("naive", naive),
    *(_provider(f"chunks of {n}", chunked(n), refuse=_chunks_fit(n)) for n in CHUNK_ROWS),
    Provider(
        f"torch.compile, chunks of {COMPILED_ROWS}",
        "plain",
        frozenset({"head", "heads"}),
        _compiled_job,
        compiles=True,
    ),
    _provider(
        "oneDNN, chunks of 2048",
        chunked(2048, first_chunk_onednn, second_chunk_onednn),
        refuse=_no_onednn,
    ),
    _provider("torch.func.jvp", jvp),
    _provider("F.linear_cross_entropy", fused_mean_gradient, refuse=_no_fused),
    Provider(
        NARROW,
        "plain",
        frozenset({"head"}),
        _medium,
        narrow=True,
        note="products and logits in 16 bits",
    ),
)
