"""PyTorch's forward mode, without the warnings that it gives about itself."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.autograd.forward_ad as forward_ad

__all__ = ["load_forward_mode"]


@cache
def load_forward_mode() -> None:
    """Have PyTorch load its forward mode; to be called before the first dual tensor of a process.

    That tensor makes PyTorch compile some derivatives by its own ``torch.jit.script``, of which it
    says each time that it is deprecated: a FutureWarning since torch 2.14, which users get to see
    and can do nothing about. Only these are kept quiet, and only here.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        number = torch.zeros((), device="cpu")
        forward_ad.make_dual(number, number)
