"""Memory that shows wrong addresses: rows beyond 32-bit offsets, walls, repeated stores."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

# Two strides are 2^32 - 128: cut to 32 bits, the third row lies 128 elements before the first.
STRIDE = 2**31 - 64
FRONT = 1024
MAP_NORESERVE = 0x4000  # in Python's mmap from 3.13 on


class Sparse:
    """Three rows ``STRIDE`` elements (float32: 8 GiB) apart, in pages that exist once touched."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32) -> None:
        self._map = mmap.mmap(
            -1,
            dtype.itemsize * (2 * FRONT + 2 * STRIDE),
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
        )
        starts = [FRONT + i * STRIDE for i in range(3)]
        self.rows = [
            torch.frombuffer(self._map, dtype=dtype, offset=dtype.itemsize * start, count=columns)
            for start in starts
        ]
        self._columns, self._dtype = columns, dtype

    def fill(self, values: Tensor) -> None:
        """Write three rows."""
        for row, value in zip(self.rows, values, strict=True):
            row.copy_(value)

    def stacked(self) -> Tensor:
        """Return the three rows as one small matrix."""
        return torch.stack([row.clone() for row in self.rows])

    def matrix(self) -> Tensor:
        """Return the (3, columns) view of row stride ``STRIDE``."""
        whole = torch.frombuffer(self._map, dtype=self._dtype)
        return whole.as_strided((3, self._columns), (STRIDE, 1), FRONT)


def walled(values: Tensor) -> Tensor:
    """Copy into memory that ends at a page nobody may read: one element too far is a crash.

    A mask that only keeps a kernel from reading what it then does not use shows in no result.
    """
    size = values.numel() * values.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(
        memory, dtype=values.dtype, offset=room - size, count=values.numel()
    ).view(values.shape)
    return copy.copy_(values)


@contextmanager
def each_written_once() -> Iterator[None]:
    """Fail if kernels store to one address twice: on a GPU that is a race, or work done twice.

    Numbers written over by equal ones show in no result.
    """
    given, written = interpreter_builder.create_masked_store, []

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written.append(pointers.data[mask.data].ravel())
        return given(pointers, value, mask, *rest)

    interpreter_builder.create_masked_store = store
    try:
        yield
    finally:
        interpreter_builder.create_masked_store = given
    addresses = np.concatenate(written)
    assert len(addresses) and len(np.unique(addresses)) == len(addresses), "written twice"
