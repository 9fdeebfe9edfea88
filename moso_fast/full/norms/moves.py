"""Operations by which a model may bring its samples to another order, or leave some out.

Where the samples lie in a call's output is found on a few of them. That holds for all batches,
except where the order depends on the data: sorting by length, sending tokens to experts, taking
padding out. So the first samples also go through every model in another order, and a model that
calls anything of the kind is checked batch by batch (`order_changes`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NAMES = (
    *("sort", "argsort", "msort", "topk", "kthvalue", "unique", "nonzero", "argwhere", "flip"),
    *("masked_select", "index_select", "gather", "take", "take_along_dim", "roll", "bincount"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_put"),
    *("index_put_", "index_copy", "index_copy_", "masked_scatter", "masked_scatter_", "one_hot"),
    *("repeat_interleave", "searchsorted", "tolist", "numpy", "item", "__array__", "__float__"),
    *(
        "__int__",
        "__index__",
        "__bool__",
        "multinomial",
        "randperm",
        "unique_consecutive",
        "fliplr",
        "flipud",
    ),
)
_MOVES = {
    getattr(owner, name)
    for name in _NAMES
    for owner in (torch, Tensor, torch.nn.functional)
    if hasattr(owner, name)
}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}


def moves_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether a call may give rows of a batch another order."""
    if func in _INDEXED:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, (Tensor, list)) for one in index)
    if func is torch.where:
        return len(args) == 1
    return func in _MOVES


def fingerprint(arranged: Tensor) -> Tensor:
    """One number for what each sample has in a call's output (samples, ...): (samples,) float64.

    A projection on a fixed direction in which no two entries count the same.
    """
    flat = arranged.detach().flatten(1)
    places = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64)
    direction = torch.cos(1.7 * places + 0.3).to(flat.dtype)
    return (flat @ direction).double()
