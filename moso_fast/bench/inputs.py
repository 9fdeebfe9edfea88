"""Seeded inputs of a case, and the exact answer in float64 that every provider is held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.reference import closed_form_stats
from .cases import Case
from .networks import exact_network, make_network

__all__ = ["Inputs", "Result", "errors_of", "exact", "make_inputs"]

# Quantity -> (N,) values, or (K, N) for K heads.
Result = dict[str, Tensor]

_BLOCK = 2**24  # elements of a block of rows of the float64 answer


@dataclass
class Inputs:
    """Tensors of one problem; ``features`` are the inputs of ``model`` in a network case."""

    features: Tensor
    labels: Tensor
    weight: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    bias: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    cu_seqlens: Tensor | None = None
    model: nn.Module | None = None

    def samples(self) -> list[slice]:
        """Rows of every sample: one row each, or the tokens of a sequence."""
        if self.cu_seqlens is None:
            return [slice(row, row + 1) for row in range(len(self.labels))]
        return [slice(a, b) for a, b in pairwise(self.cu_seqlens.tolist())]

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the scoring functions, in their order."""
        return self.features, self.weight, self.labels, self.bias


def make_inputs(case: Case, rows: int, device: str = "cpu") -> Inputs:
    """Random problem of this many rows, with a head that has learnt something."""
    generator = torch.Generator().manual_seed(1000 * case.classes + case.dim)
    if case.kind == "network":
        model, images, labels = make_network(case.network, case.classes, rows, generator)
        return Inputs(images.to(device), labels.to(device), model=model.to(device).eval())
    shape = (case.classes, case.dim) if case.heads == 1 else (case.heads, case.classes, case.dim)
    weight = torch.randn(shape, generator=generator, device="cpu") / case.dim**0.5
    bias = torch.randn(shape[:-1], generator=generator, device="cpu")
    features = torch.randn(rows, case.dim, generator=generator, device="cpu")
    labels = torch.randint(0, case.classes, (rows,), generator=generator, device="cpu")
    first = weight if case.heads == 1 else weight[0]
    features += 4.0 * first[labels] / first.norm(dim=1).mean()
    offsets = None
    if case.tokens:
        ends = list(range(0, rows, case.tokens))
        offsets = torch.tensor([*ends, rows], dtype=torch.int32, device=device)
    return Inputs(
        features.to(device, case.dtype),
        labels.to(device),
        weight.to(device),
        bias.to(device),
        offsets,
    )


def exact(case: Case, inputs: Inputs) -> Result:
    """Loss, alignment and squared norm of every sample in float64.

    ``alignment_without_bias`` leaves the bias gradient out, for methods that do.
    """
    if case.kind == "network":
        assert inputs.model is not None
        return exact_network(inputs.model, inputs.features, inputs.labels)
    if case.kind == "sequences":
        return _exact_sequences(inputs)
    if case.kind == "heads":
        heads = [
            closed_form_stats(inputs.features, weight, inputs.labels, bias)
            for weight, bias in zip(inputs.weight, inputs.bias, strict=True)
        ]
        names = ("loss", "alignment", "grad_sqnorm")
        return {name: torch.cat([getattr(h, name) for h in heads]) for name in names}
    return _exact_head(inputs)


def errors_of(result: Result, truth: Result) -> dict[str, float]:
    """Relative error (Frobenius) of every quantity of ``result``; NaN where anything is NaN."""
    errors = {}
    for name, values in result.items():
        expected = truth[name]
        difference = values.detach().double().reshape(expected.shape) - expected
        errors[name] = float(difference.norm() / expected.norm())
    return errors


def _residual(inputs: Inputs, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Features, residuals and losses of some rows in float64."""
    h = inputs.features[rows].double()
    log_p = torch.addmm(inputs.bias.double(), h, inputs.weight.double().T).log_softmax(1)
    labels = inputs.labels[rows, None]
    residual = log_p.exp().scatter_add(1, labels, torch.full_like(log_p[:, :1], -1.0))
    return h, residual, -log_p.gather(1, labels).squeeze(1)


def _exact_head(inputs: Inputs) -> Result:
    """Evaluate the closed form in float64, in blocks of rows that bound its memory."""
    count, classes = len(inputs.labels), inputs.weight.shape[0]
    step = max(1, _BLOCK // max(classes, inputs.features.shape[1]))
    blocks = [slice(start, start + step) for start in range(0, count, step)]
    grad = torch.zeros_like(inputs.weight, dtype=torch.float64)
    bias_grad = torch.zeros_like(inputs.bias, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("loss", "grad_sqnorm", "alignment", "alignment_without_bias")
    }
    for rows in blocks:
        h, residual, loss = _residual(inputs, rows)
        grad.addmm_(residual.T, h)
        bias_grad += residual.sum(0)
        found["loss"].append(loss)
        found["grad_sqnorm"].append(residual.square().sum(1) * (h.square().sum(1) + 1))
    grad /= count
    bias_grad /= count
    for rows in blocks:
        h, residual, _ = _residual(inputs, rows)
        plain = (residual * (h @ grad.T)).sum(1)
        found["alignment_without_bias"].append(plain)
        found["alignment"].append(plain + residual @ bias_grad)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _exact_sequences(inputs: Inputs) -> Result:
    """Gradient of one sequence after the other, summed over its tokens."""
    pieces = inputs.samples()
    mean = torch.zeros(
        inputs.weight.shape[0],
        inputs.weight.shape[1] + 1,
        dtype=torch.float64,
        device=inputs.features.device,
    )

    def gradient(rows: slice) -> tuple[Tensor, Tensor]:
        h, residual, loss = _residual(inputs, rows)
        return residual.T @ torch.cat([h, torch.ones_like(h[:, :1])], 1), loss.sum()

    for rows in pieces:
        mean += gradient(rows)[0] / len(pieces)
    found: dict[str, list[Tensor]] = {"loss": [], "alignment": [], "grad_sqnorm": []}
    without = []
    for rows in pieces:
        g, loss = gradient(rows)
        found["loss"].append(loss)
        found["alignment"].append((g * mean).sum())
        found["grad_sqnorm"].append(g.square().sum())
        without.append((g[:, :-1] * mean[:, :-1]).sum())
    found["alignment_without_bias"] = without
    return {name: torch.stack(values) for name, values in found.items()}
