"""Plain PyTorch for token heads, where the gradient of a sample is a sum over its tokens.

Alignments add up over tokens; the squared norm of a sum needs the products of all pairs of tokens
of one sequence, sum_tt' (r_t.r_t') (h_t.h_t' + 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from ..inputs import Inputs
from .base import Job, Provider
from .plain import jvp, naive

__all__ = ["PROVIDERS"]


def _loop(case: Case, inputs: Inputs) -> Job:
    """One sequence after the other; residuals kept between the passes."""
    features, weight, labels, bias = inputs.head
    pieces = inputs.samples()

    def run() -> dict[str, Tensor]:
        grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
        losses, norms, kept = [], [], []
        for rows in pieces:
            h, y = features[rows], labels[rows]
            log_p = torch.addmm(bias, h, weight.T).log_softmax(1)
            losses.append(-log_p.gather(1, y[:, None]).sum())
            residual = log_p.exp()
            residual[torch.arange(len(y), device=y.device), y] -= 1
            norms.append(((residual @ residual.T) * (h @ h.T + 1)).sum())
            grad += residual.T @ h
            bias_grad += residual.sum(0)
            kept.append(residual)
        grad /= len(pieces)
        bias_grad /= len(pieces)
        aligned = [
            (r * torch.addmm(bias_grad, features[rows], grad.T)).sum()
            for rows, r in zip(pieces, kept, strict=True)
        ]
        return {
            "loss": torch.stack(losses),
            "alignment": torch.stack(aligned),
            "grad_sqnorm": torch.stack(norms),
        }

    return run


def _batched(case: Case, inputs: Inputs) -> Job:
    """All sequences at once, as (B, T, C) tensors; they have one length here."""
    features, weight, labels, bias = inputs.head
    shape = (len(inputs.samples()), case.tokens)

    def run() -> dict[str, Tensor]:
        h, y = features.view(*shape, -1), labels.view(shape)
        log_p = F.linear(h, weight, bias).log_softmax(2)
        loss = -log_p.gather(2, y[..., None]).sum((1, 2))
        residual = log_p.exp_()
        residual.scatter_add_(2, y[..., None], residual.new_full((*shape, 1), -1.0))
        flat = residual.flatten(0, 1)
        grad, bias_grad = flat.T @ features / shape[0], flat.sum(0) / shape[0]
        alignment = (residual * F.linear(h, grad, bias_grad)).sum((1, 2))
        pairs = torch.bmm(residual, residual.mT) * (torch.bmm(h, h.mT) + 1)
        return {"loss": loss, "alignment": alignment, "grad_sqnorm": pairs.sum((1, 2))}

    return run


def _unequal(case: Case, inputs: Inputs) -> str | None:
    lengths = {rows.stop - rows.start for rows in inputs.samples()}
    return None if lengths == {case.tokens} else "sequences differ in length"


def _jvp(case: Case, inputs: Inputs) -> Job:
    """Token alignments by :func:`.plain.jvp`, summed; no norms, which it has no way to."""
    features, weight, labels, bias = inputs.head
    sequences = len(inputs.samples())

    def run() -> dict[str, Tensor]:
        loss, alignment, _ = jvp(features, weight, labels, bias)
        per_token = case.tokens  # the mean over tokens is the mean over sequences divided by it
        return {
            "loss": loss.view(sequences, -1).sum(1),
            "alignment": per_token * alignment.view(sequences, -1).sum(1),
        }

    return run


def _closed_form_tokens(case: Case, inputs: Inputs) -> Job:
    features, weight, labels, bias = inputs.head
    sequences = len(inputs.samples())

    def run() -> dict[str, Tensor]:
        loss, alignment, _ = naive(features, weight, labels, bias)
        return {
            "loss": loss.view(sequences, -1).sum(1),
            "alignment": case.tokens * alignment.view(sequences, -1).sum(1),
        }

    return run


_KINDS = frozenset({"sequences"})
PROVIDERS = (
    Provider("loop over sequences", "plain", _KINDS, _loop),
    Provider("batch of sequences", "plain", _KINDS, _batched, refuse=_unequal),
    Provider(
        "naive over tokens", "plain", _KINDS, _closed_form_tokens, refuse=_unequal, note="no norms"
    ),
    Provider("torch.func.jvp", "plain", _KINDS, _jvp, refuse=_unequal, note="no norms"),
)
