"""Packed sequences: where each sample's steps lie, and packing in operations with derivatives.

A packed sequence holds the first step of all samples, then the second of those that have one, and
so on; the samples are sorted by length, the longest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Places:
    """Where the steps of each sample lie in a packed sequence.

    Parameters
    ----------
    sizes
        (T,) int64: how many samples have a step t (``PackedSequence.batch_sizes``).
    order
        (B,) the sample of each column (``PackedSequence.sorted_indices``); None = 0..B-1.
    device
        Of the data.
    """

    def __init__(self, sizes: Tensor, order: Tensor | None, device: torch.device) -> None:
        sizes = sizes.to(device)
        columns = torch.arange(int(sizes[0]), device=device)
        starts = sizes.cumsum(0) - sizes
        active = columns < sizes[:, None]
        rows = torch.where(active, starts[:, None] + columns, 0)
        self._order = order = columns if order is None else order.to(device)
        self._column = column = torch.empty_like(order).scatter_(0, order, columns)
        #: (T, B) bool: whether a sample has a step t.
        self.active = active[:, column]
        self._rows = rows[:, column]
        time = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        self._steps = time, order[torch.arange(len(time), device=device) - starts[time]]

    def unpacked(self, data: Tensor) -> Tensor:
        """(T, B, ...) with the samples in their own order; 0 where a sample has no step."""
        shape = (*self.active.shape, *[1] * (data.dim() - 1))
        return torch.where(self.active.view(shape), data[self._rows], 0.0)

    def packed(self, steps: Tensor) -> Tensor:
        """Pack (T, B, ...) again."""
        return steps[self._steps]

    def by_sample(self, state: Tensor) -> Tensor:
        """(L, B, ...) of the columns, brought to the order of the samples."""
        return state[:, self._column]

    def as_packed(self, state: Tensor) -> Tensor:
        """Bring (L, B, ...) of the samples to the order of the columns."""
        return state[:, self._order]


def pack_padded(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``torch._pack_padded_sequence`` by indexing, which has a forward-mode derivative."""
    steps = input.transpose(0, 1) if batch_first else input
    lengths = lengths.cpu()
    time = torch.arange(int(lengths.max()), device="cpu")
    sizes = (lengths[None] > time[:, None]).sum(1)
    return Places(sizes, None, input.device).packed(steps), sizes


def sequence_orders(value: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (batch_sizes, sorted_indices) of the packed sequences in a nested input."""
    if isinstance(value, PackedSequence):
        yield value.batch_sizes, value.sorted_indices
    elif isinstance(value, dict):
        for item in value.values():
            yield from sequence_orders(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from sequence_orders(item)


def some_of(value: PackedSequence, samples: Tensor) -> PackedSequence:
    """Packed sequence of some of the samples."""
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    chosen = samples.to(padded.device)
    return pack_padded_sequence(
        padded[chosen], lengths[samples.cpu()], batch_first=True, enforce_sorted=False
    )
