"""Watching a forward pass: calls that use a parameter are replaced by ones that keep a tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import attention
from .bags import embedding_bag
from .convolution import convolution
from .elementwise import binary, expand
from .embedding import embedding
from .linear import addmm, linear, matmul
from .moves import moves_rows
from .normalization import batch_norm, group_norm, layer_norm, rms_norm
from .packed import sequence_orders
from .recurrent import CELLS, RECURRENT, cell, is_packed, recurrent, weights_of
from .tape import Tape

_LAYERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.mm: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.__matmul__: matmul,
}
_BINARY = {
    *(torch.add, torch.sub, torch.mul, torch.div),
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div),
    *(Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__),
    *(Tensor.__radd__, Tensor.__rmul__),
}
# Operations that take rows in another order, as packing does with the samples.
_SELECT = {torch.index_select, Tensor.index_select}


class Trace(TorchFunctionMode):
    """Within this mode, calls that use a parameter of the tape's plan write to the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.bytes = 0
        # Of the last selection of rows: result and row numbers.
        self._selected: tuple[Any, Tensor | None] = (None, None)
        # By the id of its batch_sizes, which are kept alive: the samples of a packed sequence.
        self._orders: dict[int, tuple[Tensor, Tensor | None]] = {}

    def know_packed(self, inputs: Any) -> None:
        """Note in which order the samples lie in the packed sequences of a nested input."""
        for sizes, order in sequence_orders(inputs):
            self._orders[id(sizes)] = sizes, order

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace one call, or leave it as it is."""
        kwargs = kwargs or {}
        self.tape.moves = self.tape.moves or moves_rows(func, args)
        result = self._marked(self._replaced, func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if func in _SELECT and len(args) == 3:
            self._selected = result, args[2]
        elif func is torch._pack_padded_sequence:
            selected, order = self._selected
            self._orders[id(result[1])] = result[1], order if args[0] is selected else None
        if self.tape.probing and isinstance(result, Tensor):
            self.bytes += result.numel() * result.element_size()
        return result

    def _replaced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = _LAYERS.get(func)
        if layer is not None:
            inputs = args[1:2] if func is torch.addmm else args[:1]
            if any(id(x) in self.tape.plan.names for x in inputs):
                return NotImplemented  # its own gradient would not be seen
            return layer(self.tape, *args, **kwargs)
        if func in _BINARY and len(args) == 2:
            return binary(self.tape, func, *args, **kwargs)
        if func is Tensor.expand and not kwargs:
            return expand(self.tape, func, *args)
        # cuDNN's have no backward in eval mode, traced or not.
        if func in RECURRENT and (args[0].is_cuda or self._any_tracked(weights_of(args))):
            order = self._orders.get(id(args[1]), (None, None))[1] if is_packed(args) else None
            return recurrent(self._linear, RECURRENT[func], args, kwargs, order)
        if func in CELLS and self._any_tracked(args[2:]):
            return cell(self._linear, CELLS[func], args, kwargs)
        if func is F.multi_head_attention_forward:
            return attention(self._linear, *args, **kwargs)
        return NotImplemented

    def _marked(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a call that may be traced, and put its marks on the tape."""
        before = len(self.tape.calls)
        result = run(*args)
        if len(self.tape.calls) == before + 1 and isinstance(result, Tensor):
            self.tape.mark(result)
        return result

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = self._marked(linear, self.tape, x, weight, bias)
        return F.linear(x, weight, bias) if result is NotImplemented else result

    def _any_tracked(self, weights: Sequence[Any]) -> bool:
        return any(map(self.tape.plan.tracked, weights))


def _edges(output: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield (node, leaf variable) for every place where the graph of ``output`` uses one."""
    seen = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is None:
                stack.append(following)
            else:
                yield node, variable


def untraced_uses(output: Tensor, names: dict[int, str]) -> set[int]:
    """Ids of the parameters that the graph of ``output`` uses elsewhere than in a trace."""
    return {
        id(variable)
        for node, variable in _edges(output)
        if id(variable) in names
        and not getattr(getattr(node, "_forward_cls", None), "traced", False)
    }


def leaves(output: Tensor, known: set[int]) -> list[Tensor]:
    """List the leaf variables in the graph of ``output`` whose ids are not ``known``."""
    found = {id(v): v for _, v in _edges(output) if id(v) not in known}
    return list(found.values())
