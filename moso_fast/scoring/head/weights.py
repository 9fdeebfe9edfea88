"""The weights of a head that are in force, as it was called, and whether it is PyTorch's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...sources.find_head import FULL_GRADIENT, is_convolution


@dataclass(frozen=True)
class HeadCall:
    """Input and output of one call of the head, and under which autocast it was made.

    ``versions`` are those of both tensors right after the call, which count writes to them;
    ``output`` is what the model went on with, or a copy where it is known to write to it.
    """

    value: Tensor
    output: Tensor
    live: Tensor
    versions: tuple[int, int]
    autocast: torch.dtype | None

    def overwritten(self) -> tuple[bool, bool]:
        """Tell whether the model wrote to the input and to the output after the call."""
        # Clones have versions of their own, which nobody but us could move. Writes to tensors of
        # inference mode are not counted: there the copy is compared.
        output = version(self.live) != self.versions[1]
        if self.live.is_inference():
            output = not torch.equal(self.live, self.output)
        return version(self.value) != self.versions[0], output


@dataclass(frozen=True)
class HeadReading:
    """Weights (C, D) and (C,) of a head, with logits = output_scale (W (input_scale h) + b)."""

    weight: Tensor
    bias: Tensor | None
    input_scale: float = 1.0
    output_scale: float = 1.0

    def copied(self, device: torch.device) -> HeadReading:
        """Return the same with tensors of its own on ``device``."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return replace(self, weight=self.weight.to(device, copy=True), bias=bias)


@dataclass(frozen=True)
class Sample:
    """Some rows that went into a head, (n, D), in the form it takes, and how it was called."""

    rows: Tensor
    shape: tuple[int, ...]
    autocast: torch.dtype | None


def version(tensor: Tensor) -> int:
    """Return the number of writes to ``tensor``; -1 where PyTorch does not count them."""
    return -1 if tensor.is_inference() else tensor._version


def last_dim(tensor: Tensor, head: nn.Module) -> Tensor:
    """Bring features or classes of the head's input or output to the last dimension."""
    return tensor.movedim(1, -1) if is_convolution(head) else tensor


def is_plain(head: nn.Module) -> bool:
    """Tell whether nothing but PyTorch's own forward runs when the head is called.

    To be asked before hooks of our own are in place.
    """
    own = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    forward = getattr(type(head), "forward", None)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return (
        any(forward is cls.forward for cls in own)
        and "forward" not in head.__dict__
        and type(head._parameters.get("weight")) in (Tensor, nn.Parameter)
        and not any(getattr(head, hook) for hook in hooks)
    )


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is in force, or None."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def effective(name: str, head: nn.Module, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Weight (C, D) and bias (C,) of a head as they are now; ``shape`` is (C, D).

    Raises
    ------
    ValueError
        Weights of another shape, or that are no floating-point numbers.
    """
    weight, bias = (_numbers(name, head, attribute) for attribute in ("weight", "bias"))
    if weight is not None and is_convolution(head):
        weight = weight.flatten(1)
    if weight is None or weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
        found = "missing" if weight is None else tuple(weight.shape)
        why = f"it maps {shape[1]} features to {shape[0]}, and its weight is {found}"
        raise refused(name, head, why)
    return weight, bias


def _numbers(name: str, head: nn.Module, attribute: str) -> Tensor | None:
    value: Any = getattr(head, attribute, None)
    if value is None:
        return None
    # Sharded and quantised tensors are classes of their own, which say what they stand for.
    kind = type(value)
    if isinstance(value, Tensor) and kind not in (Tensor, nn.Parameter, nn.Buffer):
        if callable(getattr(kind, "full_tensor", None)):
            value = kind.full_tensor(value)  # type: ignore[attr-defined]
        elif kind.dequantize is not Tensor.dequantize:
            value = value.dequantize()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise refused(name, head, f"its {attribute} is {what}, no floating point (quantised)")
    return value.detach()


def check_trained(name: str, head: nn.Module) -> None:
    """Refuse a head whose own weight is frozen while others in it are trained instead of it."""
    weight = head._parameters.get("weight")
    others = [n for n, p in head.named_parameters() if p.requires_grad and n not in ("bias",)]
    if weight is not None and not weight.requires_grad and others:
        raise refused(
            name, head, f"its weight is frozen and {', '.join(others[:4])} are trained in its place"
        )


def refused(name: str, head: nn.Module, why: str) -> ValueError:
    """Return the error about a head that is not what the last-layer path needs."""
    kind = type(head).__name__
    return ValueError(f"head {name!r} ({kind}) cannot be scored by itself: {why}; {FULL_GRADIENT}")
