"""One layer through its rule in moso_fast.full.norms, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moso_fast.full.batches import Batch
from moso_fast.full.loss import OutputLoss
from moso_fast.full.methods import Methods
from moso_fast.full.passes import Network, alignment_forward, traced

ROWS = 5
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return a loss whose gradient differs from entry to entry."""
    return outputs.flatten(1).square().sum(1)


def network_of(
    model: nn.Module, loss: Callable[[Any, Tensor], Tensor] | OutputLoss = squares, **options: Any
) -> Network:
    """Return a network of the parameters that require grad, on the CPU."""
    loss = loss if isinstance(loss, OutputLoss) else OutputLoss(loss)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Network(model, loss, parameters, torch.device("cpu"), **options)


def batch_of(inputs: Tensor, labels: Tensor | None = None, views: int = 1) -> Batch:
    """Return a batch of these rows; they are numbered from 20 on."""
    labels = torch.zeros(len(inputs)) if labels is None else labels
    return Batch((inputs,), {}, labels, torch.arange(20, 20 + len(inputs) // views), views)


def gradients_by_name(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of `squares` for each row alone, (n, ...) by the parameter's name.

    Each row goes through the model twice, for torch's fault with batch norm of one image.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for k in range(len(inputs)):
        loss = squares(model(inputs[[k, k]]), torch.zeros(2))[0]
        for name, g in zip(found, torch.autograd.grad(loss, list(named.values())), strict=True):
            found[name].append(g.to_dense())
    return {name: torch.stack(rows) for name, rows in found.items()}


def check_rule(
    model: nn.Module, inputs: Tensor, explicit: tuple[str, ...] = (), calls: int | None = None
) -> None:
    """Compare what is traced, parameter by parameter, and the alignment, with plain autograd.

    All parameters must have been traced but for those named in ``explicit``: a rule that differs
    from plain autograd is not used, which no score would show. ``calls`` are traced in all. Where
    everything has a rule, the first parameters are then checked each alone, the others frozen.
    """
    check_once(model, inputs, explicit, calls)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, _ in [] if explicit else named[:4]:
        for other, p in named:
            p.requires_grad_(other == name)
        check_once(model, inputs)
    for _, p in named:
        p.requires_grad_(True)


def check_once(
    model: nn.Module, inputs: Tensor, explicit: tuple[str, ...] = (), calls: int | None = None
) -> None:
    """Do that for the parameters that require grad."""
    network, batch = network_of(model), batch_of(inputs)
    methods = Methods(network)
    methods.prepare(batch)
    _, sums, tape = traced(network, methods.plan, batch, methods.expanding)
    left = {network.names[key]: why for key, why in methods.plan.others.items()}
    assert left.keys() == set(explicit), left
    if calls is not None:
        assert len(tape.calls) == calls
    expected = gradients_by_name(model, inputs)
    parameters = dict(model.named_parameters())
    along = torch.zeros(len(inputs), dtype=torch.float64)
    for (name, g), total in zip(expected.items(), sums, strict=True):
        torch.testing.assert_close(total, g.sum(0), **CLOSE)
        along += (g * g[0]).reshape(len(g), -1).sum(1)
        if name not in explicit:
            norms = tape.norms[id(parameters[name])]
            torch.testing.assert_close(norms, g.square().reshape(len(g), -1).sum(1), **CLOSE)
    if explicit:
        return
    assert methods.aligned is alignment_forward, methods.reasons
    tangents = {id(parameters[name]): g[0] for name, g in expected.items()}
    tangent = alignment_forward(network, batch, tangents).tangent
    torch.testing.assert_close(tangent, along, **CLOSE)
