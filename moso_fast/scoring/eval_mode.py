"""A network in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; then every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    try:
        model.eval()
        # Not inference_mode: what a model caches in it during a forward pass (rotary tables, say)
        # could never be used in training again.
        with torch.no_grad(), _eager(model):
            yield
    finally:
        # First the method, for modules that act on the change (merged adapters), then each flag.
        model.train(was_training)
        for module, mode in modes:
            module.training = mode


def _eager(model: nn.Module) -> Any:
    """Run a compiled model as it was written: compiled code may ignore a hook that came later."""
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
