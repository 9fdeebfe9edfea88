"""Explicit per-sample gradients for what has no faster rule: by vmap in chunks, or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .batches import Batch
from .modes import Substitution
from .norms.packed import sequence_orders
from .passes import Gradients, Network, explicit_gradients

# Bytes of gradients at a time.
_BYTES = 1 << 28
# Samples at a time, for the activations.
_SAMPLES = 64


def one_by_one(network: Network, batch: Batch, only: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """Yield (samples, id -> (n, ...) gradients), one backward pass a sample."""
    for number in range(batch.samples):
        some = slice(number, number + 1)
        gradients = explicit_gradients(network, batch.take(some), only)
        yield some, {key: g[None] for key, g in gradients.items()}


def vmapped(network: Network, batch: Batch, only: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """Yield the same by ``vmap(grad)`` over as many samples as fit.

    Raises
    ------
    ValueError
        Samples of different sizes; vmap adds errors of its own for what it cannot do.
    """
    if batch.flat or any(True for _ in sequence_orders((batch.args, batch.kwargs))):
        raise ValueError("the samples of a batch have inputs of different sizes")
    chosen = [p for p in network.parameters if id(p) in only]
    size = sum(p.numel() * p.element_size() for p in chosen)
    step = max(1, min(_SAMPLES, _BYTES // max(size, 1)))
    for start in range(0, batch.samples, step):
        some = slice(start, min(start + step, batch.samples))
        part = batch.take(some)
        leaves, form = tree_flatten((part.args, part.kwargs, part.labels))
        batched = [isinstance(v, Tensor) and v.dim() > 0 and len(v) == part.rows for v in leaves]
        stacked = [
            v.reshape(part.samples, part.views, *v.shape[1:]) if b else v
            for v, b in zip(leaves, batched, strict=True)
        ]
        moving = [v for v, b in zip(stacked, batched, strict=True) if b]

        def loss(values: list[Tensor], inputs: list[Tensor]) -> Tensor:
            left = iter(inputs)
            whole = [next(left) if b else v for v, b in zip(stacked, batched, strict=True)]  # noqa: B023
            args, kwargs, labels = tree_unflatten(whole, form)  # noqa: B023
            one = Batch(args, kwargs, labels, part.index[:1], part.views)  # noqa: B023
            with Substitution({id(p): v for p, v in zip(chosen, values, strict=True)}):
                outputs = network.forward(one)
            return network.losses(outputs, one).differentiable.sum() / one.views

        with torch.enable_grad(), network.context(True), warnings.catch_warnings():
            # Some operations are run sample by sample: slow, and no more than that.
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
                [p.detach() for p in chosen], moving
            )
        yield some, {id(p): g.detach() for p, g in zip(chosen, found, strict=True)}


Method = Callable[[Network, Batch, Sequence[int]], Iterator[tuple[Any, Any]]]


def norms(method: Method, network: Network, batch: Batch, only: Sequence[int]) -> Tensor:
    """Squared norms of the gradients of some parameters, (n,) float64."""
    result = torch.zeros(batch.samples, dtype=torch.float64, device=network.device)
    for some, gradients in method(network, batch, only):
        for g in gradients.values():
            result[some] += g.reshape(len(g), -1).square().sum(1).double()
    return result


def dots(method: Method, network: Network, batch: Batch, tangents: Gradients) -> Tensor:
    """Products of all gradients with ``tangents``, (n,) float64."""
    result = torch.zeros(batch.samples, dtype=torch.float64, device=network.device)
    for some, gradients in method(network, batch, list(network.names)):
        for key, g in gradients.items():
            result[some] += (g.reshape(len(g), -1) @ tangents[key].flatten()).double()
    return result
