"""A name for the inputs of a data set by some of its samples, so that a run resumes over its own.

Labels are compared whole, as the jobs read them. To read all inputs for a comparison would cost as
much as the data cost in a run that has nothing left to compute; a normalisation, a tokeniser or a
file that was changed shows in any of the samples.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset

from ...util.array_like import bytes_of
from .batch_parts import parts_of

SAMPLES = 64  # the first, the last, and others evenly between them
_DEPTH = 24  # deeper than inputs are nested; what lies below counts by its class alone
_PLAIN = (bool, int, float, str, bytes)
_WRITTEN_OUT = (bool, int, float, complex, str, bytes, bytearray, range, np.generic, enum.Enum)


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
            sample = data[place]
            # What a sample must be is said where it is scored.
            with suppress(TypeError, ValueError):
                sample = parts_of(sample)[0]
            result.update(_Inputs().digest(sample))
    # Whoever reads two of them in the message of a run that is not resumed learns the other cause.
    return (
        f"digest {result.hexdigest()} (another one each time if the data set draws at random) of "
        f"{len(places)} samples"
    )


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


class _Inputs:
    """Digest of one sample's inputs of any kind, by what they hold and not by where they lie.

    For one sample alone: a data set may hand out the same object again with other contents.
    """

    def __init__(self) -> None:
        self._open: list[int] = []  # what is being looked into: an object may hold itself
        # What is held in several places is looked into once. Objects are kept with their digests,
        # since another one could come to lie where one has gone.
        self._done: dict[int, tuple[Any, bytes]] = {}

    def digest(self, value: Any) -> bytes:
        """Return a digest of a value and of all that it holds."""
        result = hashlib.blake2b(digest_size=16)
        for piece in self._pieces(value):
            # With its length: two texts one after the other are not one long text.
            result.update(f"{len(piece)} ".encode() + piece)
        return result.digest()

    def _pieces(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, Tensor):
            yield from self._of_tensor(value)
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype} {value.shape}".encode()
            if value.dtype.hasobject:  # its bytes are addresses
                yield from self._of_parts(value, value.reshape(-1).tolist())
            else:
                yield np.ascontiguousarray(value).tobytes()
        elif value is None or isinstance(value, _WRITTEN_OUT):
            yield repr(value).encode()
        elif id(value) in self._done:
            yield self._done[id(value)][1]
        elif id(value) in self._open or len(self._open) > _DEPTH:
            yield type(value).__qualname__.encode()
        else:
            yield from self._of_container(value)

    def _of_tensor(self, tensor: Tensor) -> Iterator[bytes]:
        tensor = tensor.detach()
        if tensor.is_nested:
            parts = list(tensor.unbind())
            yield f"nested {len(parts)}".encode()
            for part in parts:
                yield self.digest(part)
            return
        tensor = tensor.cpu()
        if tensor.layout != torch.strided or tensor.is_quantized:
            tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        if tensor.numel():
            yield bytes_of(tensor).tobytes()

    def _of_container(self, value: Any) -> Iterator[bytes]:
        """Look into lists, dictionaries, what pytree knows, images and objects with attributes."""
        outermost = iter([False])
        # One level at a time, so that what holds itself is seen.
        leaves, structure = tree_flatten(value, is_leaf=lambda _: next(outermost, True))
        if str(structure) != "*":  # of what pytree does not open
            yield str(structure).encode()
            yield from self._of_parts(value, leaves)
            return
        yield type(value).__qualname__.encode()
        if isinstance(value, ModuleType) or (callable(value) and hasattr(value, "__qualname__")):
            yield str(value.__name__).encode()
        elif isinstance(value, Mapping):
            yield from self._of_parts(
                value, [part for pair in dict(value).items() for part in pair]
            )
        elif callable(getattr(value, "tobytes", None)):  # an image of Pillow, say
            facts = [getattr(value, name, "") for name in ("size", "mode", "dtype", "shape")]
            yield " ".join(str(fact) for fact in facts if not callable(fact)).encode()
            yield value.tobytes()
        elif isinstance(value, Set):
            yield from sorted(self._of_parts(value, list(value)))
        elif isinstance(value, Sequence):
            yield from self._of_parts(value, list(value))
        elif callable(getattr(value, "__array__", None)):  # a column of pandas, say
            yield self.digest(np.asarray(value))
        else:
            yield from self._of_object(value)

    def _of_object(self, value: Any) -> Iterator[bytes]:
        attributes = _attributes(value)
        if attributes:
            parts = [part for pair in attributes for part in pair]
            result = b"".join(self._of_parts(value, parts))
            self._done[id(value)] = value, result
            yield result
        elif " at 0x" not in repr(value):  # a date, a fraction: no address in its text
            yield repr(value).encode()

    def _of_parts(self, value: Any, parts: list[Any]) -> Iterator[bytes]:
        if parts and all(type(part) in _PLAIN for part in parts):  # token numbers: by far quicker
            yield repr(parts).encode()
            return
        self._open.append(id(value))
        for part in parts:
            yield self.digest(part)
        self._open.pop()


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return names and values of what an object holds, without what it computed for later use."""
    found = dict(getattr(value, "__dict__", None) or {})
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            at = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, at):
                found[at] = getattr(value, at)
    cached = {
        name
        for cls in type(value).__mro__
        for name, member in vars(cls).items()
        if isinstance(member, functools.cached_property)
    }
    return [(str(name), found[name]) for name in sorted(found, key=str) if name not in cached]
