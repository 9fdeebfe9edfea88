"""Repeating a part in float64 where a self-check fails that rounding may have failed.

Where gradients nearly cancel (a layer norm over two features lets hardly anything through), what
is left in float32 is rounding, and two right ways to the same number differ. In float64 a rule that
is right passes the same checks by far, and one that is wrong fails them as it did.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .checks import SelfCheckError
from .passes import Network


@contextmanager
def in_float64(network: Network) -> Iterator[Network]:
    """Run the block with the model's numbers in float64; afterwards it has its own back.

    So have the parameters: the very ``.grad`` that each had before.

    Yields a network of the same model and parameters, without autocast.
    """
    model = network.model
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    saved: list[tuple[Tensor, Tensor]] = []
    # A gradient must have its parameter's dtype: the caller's are taken off and come back last.
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in gradients:
            p.grad = None
        for tensor in tensors:
            saved.append((tensor, tensor.data))
            tensor.data = tensor.data.double()
        other = copy.copy(network)
        other.dtype, other.autocast = torch.float64, None
        yield other
    finally:
        for tensor, data in reversed(saved):
            tensor.data = data
        for p, gradient in gradients:
            p.grad = gradient


def can_repeat(network: Network) -> bool:
    """Tell whether float64 is more precise than what the network computes in."""
    return network.autocast is not None or any(p.dtype != torch.float64 for p in network.parameters)


def failed_again(error: SelfCheckError) -> SelfCheckError:
    """Return the error for a check that failed in float64, too."""
    return SelfCheckError(
        f"{error}; that is with dtype=torch.float64, so it is not rounding: please report this "
        "with the model"
    )


def cannot_repeat(error: SelfCheckError, reason: BaseException) -> SelfCheckError:
    """Return the error for a check that could not be repeated in float64."""
    said = str(reason).strip().partition("\n")[0][:160]
    return SelfCheckError(
        f"{error}; dtype=torch.float64 would tell whether this is rounding, but the model does not "
        f"run in it ({type(reason).__name__}: {said})"
    )
