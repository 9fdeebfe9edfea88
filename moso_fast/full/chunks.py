"""How many samples go through a network at a time: as many as the memory holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .batches import Batch

_CPU_SHARE, _CUDA_SHARE = 0.25, 0.5
# Activations, their gradients, and what the norms of the widest layer take beside.
_COPIES = 4


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()


class _SmallerChunk(Exception):
    """The chunk size that has just been chosen is less than the chunk at hand."""


class Chunks:
    """Cuts batches into chunks, smaller ones where memory runs out.

    ``size`` is the samples at a time: as given, else None (whole batches) until `choose` or a lack
    of memory says otherwise.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.device, self.size, self._fixed = device, size, size is not None
        self._at_hand = 0

    def of(
        self, batch: Batch, work: Callable[[Batch], tuple[Any, Any]]
    ) -> Iterator[tuple[Batch, Any, Any]]:
        """Yield (chunk, *work(chunk)); where memory runs out, chunks become half as large."""
        start = 0
        while start < batch.samples:
            size = self._at_hand = min(self.size or batch.samples, batch.samples - start)
            chunk = batch.take(slice(start, start + size))
            try:
                done = work(chunk)
            except _SmallerChunk:
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
                done = None
            if done is None:
                self.size = (size + 1) // 2
                if batch.labels.is_cuda:
                    torch.cuda.empty_cache()
                continue
            yield chunk, *done
            start += size

    def choose(self, bytes_per_sample: int) -> None:
        """Choose how many samples at a time a share of the memory holds the activations of.

        Called by the work on a chunk, which begins again with fewer samples if that is too many.
        """
        if self._fixed or not bytes_per_sample:
            return
        if self.size is None:
            self.size = max(1, int(self._budget() / (_COPIES * bytes_per_sample)))
        if self._at_hand > self.size:
            raise _SmallerChunk

    def _budget(self) -> float:
        if self.device.type == "cuda":
            return _CUDA_SHARE * torch.cuda.mem_get_info(self.device)[0]
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return _CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return float(1 << 31)
