"""A name for the inputs of a data set by some of its samples, so that a run resumes over its own.

Labels are compared whole, as the jobs read them. To read all inputs for a comparison would cost as
much as the data cost in a run that has nothing left to compute; a normalisation, a tokeniser or a
file that was changed shows in any of the samples.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from ._batch_parts import parts_of

SAMPLES = 64  # the first, the last, and others evenly between them


def inputs_digest(loader: DataLoader[Any]) -> str | None:
    """Return a digest of some samples' inputs, or None where samples cannot be read by number."""
    data = loader.dataset
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        return None
    count = len(data)
    places = sorted({k * (count - 1) // (SAMPLES - 1) for k in range(SAMPLES)}) if count else []
    result = hashlib.blake2b(digest_size=16)
    with _own_randomness():
        for place in places:
            _add(result, data[place])
    return f"digest {result.hexdigest()} of {len(places)} samples"


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Draw no numbers that the caller would have drawn: a data set may use them."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _add(result: Any, sample: Any) -> None:
    try:
        inputs = parts_of(sample)[0]
    except (TypeError, ValueError):  # it says what a sample must be where it is scored
        inputs = sample
    leaves, structure = tree_flatten(inputs)
    result.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            if leaf.layout != torch.strided or leaf.is_quantized:
                leaf = leaf.dequantize() if leaf.is_quantized else leaf.to_dense()
            result.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            if leaf.numel():
                result.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            result.update(f"{leaf.dtype} {leaf.shape}".encode())
            result.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, (bool, int, float, complex, str, bytes, np.generic)) or leaf is None:
            result.update(repr(leaf).encode())
        elif callable(getattr(leaf, "tobytes", None)):  # an image of Pillow, say
            result.update(f"{getattr(leaf, 'size', '')} {getattr(leaf, 'mode', '')}".encode())
            result.update(leaf.tobytes())
        else:
            result.update(type(leaf).__qualname__.encode())
