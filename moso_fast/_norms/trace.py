"""Watching a forward pass: calls that use a parameter are replaced by ones that keep a tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import attention
from .convolution import convolution
from .elementwise import binary, expand
from .embedding import embedding
from .linear import addmm, linear, matmul
from .normalization import batch_norm, group_norm, layer_norm, rms_norm
from .recurrent import recurrent
from .tape import Tape

_LAYERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
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
RECURRENT = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}


class Trace(TorchFunctionMode):
    """Within this mode, calls that use a parameter of the tape's plan write to the tape.

    ``expanding``: parameters and look-ups that have no samples are repeated for each of them.
    """

    def __init__(self, tape: Tape, expanding: bool = True) -> None:
        super().__init__()
        self.tape, self.expanding = tape, expanding
        self.bytes = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace one call, or leave it as it is."""
        kwargs = kwargs or {}
        result = self._replaced(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if self.tape.probing and isinstance(result, Tensor):
            self.bytes += result.numel() * result.element_size()
        return result

    def _replaced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = _LAYERS.get(func)
        if layer is not None:
            inputs = args[1:2] if func is torch.addmm else args[:1]
            if any(id(x) in self.tape.plan.names for x in inputs):
                return NotImplemented  # its own gradient would not be seen
            return layer(self, *args, **kwargs)
        if func in _BINARY and len(args) == 2:
            return binary(self, func, *args, **kwargs)
        if func is Tensor.expand and not kwargs:
            return expand(self, func, *args)
        # cuDNN's have no backward in eval mode, traced or not.
        if func in RECURRENT and (args[0].is_cuda or self._any_tracked(args[2:3])):
            return recurrent(self._linear, RECURRENT[func], args, kwargs)
        if func is F.multi_head_attention_forward:
            return attention(self._linear, *args, **kwargs)
        return NotImplemented

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = linear(self, x, weight, bias)
        return F.linear(x, weight, bias) if result is NotImplemented else result

    def _any_tracked(self, lists: tuple[Any, ...]) -> bool:
        weights = [w for one in lists if isinstance(one, (list, tuple)) for w in one]
        return any(map(self.tape.plan.tracked, weights))


def untraced_uses(output: Tensor, names: dict[int, str]) -> set[int]:
    """Ids of the parameters that the graph of ``output`` uses elsewhere than in a trace."""
    found = set()
    seen = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        traced = getattr(getattr(node, "_forward_cls", None), "traced", False)
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is None:
                stack.append(following)
            elif not traced and id(variable) in names:
                found.add(id(variable))
    return found


@contextmanager
def whole_graph() -> Iterator[None]:
    """Run the block without gradient checkpointing, and with attention unfused.

    Checkpointing runs parts of the model again where no mode sees them, or hides them from the
    autograd graph. The fused path of nn.MultiheadAttention has no derivative.
    """
    module: Any = torch.utils.checkpoint
    function = module.CheckpointFunction
    before = vars(function).get("apply"), module._checkpoint_without_reentrant_generator
    fused = torch.backends.mha.get_fastpath_enabled()

    def plain(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return run(*args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    function.apply, module._checkpoint_without_reentrant_generator = plain, nothing
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        if before[0] is None:
            del function.apply
        else:
            function.apply = before[0]
        module._checkpoint_without_reentrant_generator = before[1]
        torch.backends.mha.set_fastpath_enabled(fused)
