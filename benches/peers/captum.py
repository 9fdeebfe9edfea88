"""Captum's TracIn classes, asked for the dot products with the summed gradient of all samples.

The head alone is the model and the features are its inputs, so that nothing else is timed; the
checkpoint is loaded by a function that does nothing, since reloading is no part of the question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.bench.cases import Case
from moso_fast.bench.inputs import Inputs
from moso_fast.bench.providers import Job, Provider

__all__ = ["PROVIDERS", "head_module"]

_BATCH = 256


def head_module(inputs: Inputs) -> nn.Sequential:
    """Return a model whose only layer with parameters, ``"1"``, is the head."""
    layer = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(inputs.weight)
        layer.bias.copy_(inputs.bias)
    return nn.Sequential(nn.Identity(), layer)


def _no_reload(model: nn.Module, path: Any) -> float:
    return 1.0


def _tracin(case: Case, inputs: Inputs) -> Job:
    """``TracInCP.influence(aggregate=True)``: N x C x D Jacobians, batch by batch."""
    from captum.influence import TracInCP

    data = TensorDataset(inputs.features, inputs.labels)
    tracin = TracInCP(
        head_module(inputs),
        data,
        ["none"],
        _no_reload,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=_BATCH,
        sample_wise_grads_per_batch=True,
    )
    loader = DataLoader(data, batch_size=_BATCH)

    def run() -> dict[str, Tensor]:
        summed = tracin.influence(loader, aggregate=True)
        return {"alignment": summed.flatten() / len(inputs.labels)}

    return run


def _tracin_fast(case: Case, inputs: Inputs) -> Job:
    """``TracInCPFast``: all pairs of samples, averaged; it knows no other way to the mean."""
    from captum.influence import TracInCPFast

    model = head_module(inputs)
    tracin = TracInCPFast(
        model,
        model[1],
        TensorDataset(inputs.features, inputs.labels),
        ["none"],
        _no_reload,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=_BATCH,
    )

    def run() -> dict[str, Tensor]:
        pairs = tracin.influence((inputs.features, inputs.labels))
        return {"alignment_without_bias": pairs.mean(0)}

    return run


PROVIDERS = (
    Provider(
        "Captum TracInCP, aggregate",
        "peer",
        frozenset({"head"}),
        _tracin,
        needs=("captum",),
        heavy=True,
        note="alignment only",
    ),
    Provider(
        "Captum TracInCPFast",
        "peer",
        frozenset({"head"}),
        _tracin_fast,
        needs=("captum",),
        heavy=True,
        note="alignment only; leaves the bias out; all N x N pairs",
    ),
)
