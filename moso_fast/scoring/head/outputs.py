"""The logits in what a model returned, with the classes in the last dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DEPTH = 3


def output_tensors(outputs: Any) -> dict[str, Tensor]:
    """Floating-point tensors by where they are in the output of a model.

    A tensor is all there is, and so is ``logits`` of a mapping or object; else every tensor in
    nested tuples, lists, mappings and plain objects.
    """
    if isinstance(outputs, Tensor):
        return {"": outputs}
    logits = (
        outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    )
    if isinstance(logits, Tensor):
        return {"logits": logits}
    found: dict[str, Tensor] = {}
    _collect(outputs, "", found, _DEPTH)
    return found


def _collect(value: Any, path: str, found: dict[str, Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim() and value.numel():
            found[path] = value
        return
    if depth == 0:
        return
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(f"[{k}]", item) for k, item in enumerate(value)]
    else:
        items = [(f".{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
    for key, item in items:
        _collect(item, path + key, found, depth - 1)


def arrangements(tensor: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """Read ``tensor`` in every way that has the classes in the last dimension, by name.

    ``shape`` (..., C) is that of the head's output. The classes may come second, as in images and
    as `torch.nn.CrossEntropyLoss` takes tokens; a single one may have no dimension.
    """
    found: dict[str, Tensor] = {}
    if tensor.dim() > 1 and tensor.shape[-1] == shape[-1]:
        found["last"] = tensor
    if tensor.dim() > 2 and tensor.shape[1] == shape[-1]:
        found["second"] = tensor.movedim(1, -1)
    if shape[-1] == 1 and tensor.shape == shape[:-1]:
        found["none"] = tensor[..., None]
    return found


def describe_outputs(outputs: Any) -> str:
    """Return the kind and the shapes of what a model returned, in a few words."""
    if isinstance(outputs, Tensor):
        return f"a tensor {tuple(outputs.shape)}"
    shapes = [str(tuple(t.shape)) for t in output_tensors(outputs).values()]
    more = ", ..." if len(shapes) > 4 else ""
    listed = ", ".join(shapes[:4]) + more if shapes else "no floating-point tensor"
    return f"{type(outputs).__name__} with {listed}"


@dataclass
class Logits:
    """Where the logits are in the output, and as what they are read."""

    path: str
    reading: str
    rounded: torch.dtype | None = None  # the format that the head's output went through

    def of(self, outputs: Any, shape: torch.Size) -> Tensor | None:
        """(..., C) logits in another output of the same model, if it has them."""
        tensor = output_tensors(outputs).get(self.path)
        return None if tensor is None else arrangements(tensor, shape).get(self.reading)


def same_memory(outputs: Any, z: Tensor) -> Tensor | None:
    """Return the logits where they are the very numbers of the head's output."""
    for tensor in output_tensors(outputs).values():
        for logits in arrangements(tensor, z.shape).values():
            if logits.numel() != z.numel() or logits.dtype != z.dtype:
                continue
            pairs = [
                (logits, z),
                (logits.reshape(-1, logits.shape[-1]), z.reshape(-1, z.shape[-1])),
            ]
            if any(
                (one.data_ptr(), one.shape, one.stride())
                == (other.data_ptr(), other.shape, other.stride())
                for one, other in pairs
            ):
                return logits
    return None
