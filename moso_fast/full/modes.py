"""Modes for plain autograd and for forward mode: calls that lack a derivative are written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .norms.bags import bags_of, written_out
from .norms.normalization import with_strides_of
from .norms.packed import pack_padded
from .norms.recurrent import CELLS, RECURRENT, cell, recurrent


class Sound(TorchFunctionMode):
    """Keeps plain autograd clear of two faults.

    That of batch norm in `with_strides_of`; and cuDNN's recurrent layers have no backward in eval
    mode: they are written out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in RECURRENT and args[0].is_cuda:
            result = recurrent(F.linear, RECURRENT[func], args, kwargs or {})
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            return with_strides_of(args[0], result)
        return result


class Substitution(TorchFunctionMode):
    """Within this mode, every call gets other tensors in place of some: id -> tensor.

    Recurrent layers, bags and packing are written out, since their fused kernels know neither
    forward mode nor vmap.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Exchange the arguments of one call."""
        args = tuple(map(self._replaced, args))
        kwargs = {k: self._replaced(v) for k, v in kwargs.items()} if kwargs else {}
        result = _written_out(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func is F.batch_norm and args[0].dtype in (torch.float16, torch.bfloat16):
            # Its forward-mode rule gives a tangent of another dtype than the 16-bit result.
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        result = func(*args, **kwargs)
        if func is F.embedding:
            return _padding_held(result, *args, **kwargs)
        return result

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensors.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        return value


def _written_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in RECURRENT:
        return recurrent(F.linear, RECURRENT[func], args, kwargs)
    if func in CELLS:
        return cell(F.linear, CELLS[func], args, kwargs)
    if func is torch._pack_padded_sequence and not kwargs:
        return pack_padded(*args)
    if func is F.embedding_bag:
        bags = bags_of(*args, **kwargs)
        return NotImplemented if bags is None else written_out(args[1], bags)
    return NotImplemented


def _padding_held(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Take the tangent from the padding token's row: its gradient is 0 by definition."""
    primal, tangent = forward_ad.unpack_dual(result)
    if padding_idx is None or tangent is None:
        return result
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding[..., None], primal, result)
