"""Plain PyTorch that does build per-sample gradients: the authors' loop, and ``vmap(grad)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from ..inputs import Inputs
from .base import Job, Provider

__all__ = ["PROVIDERS", "two_passes", "vmap_job"]

# Bytes of per-sample gradients at a time; where all of them fit they are made once, else twice.
_GRADIENT_BYTES = 2**30


def two_passes(gradients: Sequence[Callable[[], tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Results from functions that give loss and gradient of one sample, called twice each."""
    mean = torch.zeros_like(gradients[0]()[1])
    for gradient in gradients:
        mean += gradient()[1] / len(gradients)
    losses, alignments, norms = [], [], []
    for gradient in gradients:
        loss, g = gradient()
        losses.append(loss)
        alignments.append(torch.dot(g, mean))
        norms.append(torch.dot(g, g))
    return {
        "loss": torch.stack(losses),
        "alignment": torch.stack(alignments),
        "grad_sqnorm": torch.stack(norms),
    }


def vmap_job(
    loss_of: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
    point: dict[str, Tensor],
    features: Tensor,
    labels: Tensor,
) -> Job:
    """``vmap(grad_and_value)`` over as many samples as a gigabyte of gradients allows."""
    gradients = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0))
    elements = sum(p.numel() for p in point.values())
    step = max(1, _GRADIENT_BYTES // (4 * elements))
    parts = [slice(start, start + step) for start in range(0, len(labels), step)]

    def run() -> dict[str, Tensor]:
        mean = {name: torch.zeros_like(p) for name, p in point.items()}
        kept, losses, norms, alignments = [], [], [], []
        for rows in parts:
            grads, loss = gradients(point, features[rows], labels[rows])
            losses.append(loss)
            norms.append(sum(g.flatten(1).square().sum(1) for g in grads.values()))
            for name, g in grads.items():
                mean[name] += g.sum(0) / len(labels)
            if len(parts) == 1:
                kept.append(grads)
            del grads
        for index, rows in enumerate(parts):
            grads = kept[index] if kept else gradients(point, features[rows], labels[rows])[0]
            alignments.append(sum(g.flatten(1) @ mean[n].flatten() for n, g in grads.items()))
        return {
            "loss": torch.cat(losses),
            "alignment": torch.cat(alignments),
            "grad_sqnorm": torch.cat(norms),
        }

    return run


def _loop(case: Case, inputs: Inputs) -> Job:
    """Batch size 1 and two passes, as the authors' script does it, here for the head alone."""
    weight, bias = (t.clone().requires_grad_() for t in (inputs.weight, inputs.bias))

    def gradient(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(F.linear(h, weight, bias), y, reduction="sum")
        parts = torch.autograd.grad(loss, (weight, bias))
        return loss.detach(), torch.cat([part.flatten() for part in parts])

    samples = [(inputs.features[rows], inputs.labels[rows]) for rows in inputs.samples()]
    return lambda: two_passes([partial(gradient, h, y) for h, y in samples])


def _vmap(case: Case, inputs: Inputs) -> Job:
    def loss_of(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, p["weight"], p["bias"]), y, reduction="sum")

    features, labels = inputs.features, inputs.labels
    if case.kind == "sequences":
        features = features.view(-1, case.tokens, case.dim)
        labels = labels.view(-1, case.tokens)
    return vmap_job(loss_of, {"weight": inputs.weight, "bias": inputs.bias}, features, labels)


def _unequal(case: Case, inputs: Inputs) -> str | None:
    if case.kind != "sequences" or len(inputs.labels) % case.tokens == 0:
        return None
    return "sequences differ in length"


_KINDS = frozenset({"head", "sequences"})
PROVIDERS = (
    Provider("torch.func.vmap(grad)", "autograd", _KINDS, _vmap, refuse=_unequal, heavy=True),
    Provider("autograd, batch size 1", "autograd", _KINDS, _loop, heavy=True),
)
