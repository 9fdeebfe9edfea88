"""Whether a network reads the tensors of its head outside of the head.

Heads of several checkpoints share their features where all other weights are equal. That holds
only if nothing but the head uses the head's own: a factor kept in it and applied behind it, a
division by the norm of its weight before it, an embedding tied to it, make features of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Reads(TorchFunctionMode):
    """Notes in ``found`` that a tensor of the head goes into an operation outside its call."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.found = False
        self._inside = 0
        self._own = {id(t) for t in (*head.parameters(), *head.buffers())}

    def enter(self, *_: Any) -> None:
        """Mark that the head is called (a forward pre-hook)."""
        self._inside += 1

    def leave(self, *_: Any) -> None:
        """Mark that its call has ended (a forward hook)."""
        self._inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside and not self.found and not _is_fact(func, result):
            leaves = tree_leaves((args, kwargs))
            self.found = any(isinstance(t, Tensor) and id(t) in self._own for t in leaves)
        return result


def _is_fact(func: Any, result: Any) -> bool:
    """Tell whether no number of a tensor was asked for (``weight.shape``, ``weight.dtype``)."""
    name = getattr(func, "__name__", "")
    return name in _FACTS or (name == "__get__" and not isinstance(result, Tensor))


_FACTS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "data_ptr", "storage_offset"),
)


@contextmanager
def watched(head: nn.Module) -> Iterator[Reads]:
    """Watch the calls of the block."""
    reads = Reads(head)
    handles = [
        head.register_forward_pre_hook(reads.enter, prepend=True),
        head.register_forward_hook(reads.leave, always_call=True),
    ]
    try:
        with reads:
            yield reads
    finally:
        for handle in handles:
            handle.remove()
