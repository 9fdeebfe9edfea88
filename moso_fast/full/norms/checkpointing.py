"""Forward passes that leave the whole graph: gradient checkpointing and fused attention off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

# What `checkpoint(..., use_reentrant=False)` goes through, by release: the first up to torch 2.13,
# the second from 2.14 on, where the first is left for others that call it.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


@contextmanager
def whole_graph() -> Iterator[None]:
    """Run the block without gradient checkpointing, and with attention unfused.

    Checkpointing runs parts of the model again during the backward pass, where no mode sees them,
    so that other tensors are saved than in the forward pass; or it hides them from the autograd
    graph. The fused path of nn.MultiheadAttention has no derivative.
    """
    module: Any = torch.utils.checkpoint
    generators = {name: _nothing for name in _GENERATORS if hasattr(module, name)}
    changes: list[tuple[Any, dict[str, Any]]] = [
        (module.CheckpointFunction, {"apply": _plain}),
        (module, generators),
    ]
    if hasattr(module, "_checkpoint_hook"):
        # The hooks that drop what is saved: for those who took a generator by its name earlier, as
        # torch.distributed does, and releases that call theirs by another name.
        changes.append((module._checkpoint_hook, {"__enter__": _stays, "__exit__": _stays}))
    fused = torch.backends.mha.get_fastpath_enabled()
    kept = [(owner, name, vars(owner).get(name)) for owner, new in changes for name in new]
    for owner, new in changes:
        for name, value in new.items():
            setattr(owner, name, value)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is None:
                delattr(owner, name)  # inherited before
            else:
                setattr(owner, name, value)
        torch.backends.mha.set_fastpath_enabled(fused)


def _plain(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return run(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand in for what goes on before and after the forward pass of a checkpointed part."""
    yield


def _stays(hook: Any, *args: Any) -> None:
    """Neither enter nor leave the hooks."""
