"""What this GPU can do at all: bytes/s of copies and reads, FLOP/s of large products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...table import OURS
from .timing import Clock, device, matmul_precision

SIZE, DRY_SIZE = 8192, 256


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Find one ceiling; ``unit["ceiling"]`` is "memory" or a precision."""
    where = device()
    clock, gpu = Clock(where), where.type == "cuda"
    if unit["ceiling"] == "memory":
        data = torch.ones(2**30 if gpu else 2**22, device=where)
        other = torch.empty_like(data)
        emit(
            read=data.nbytes / clock.median(data.sum),
            copy=2 * data.nbytes / clock.median(lambda: other.copy_(data)),
        )
        return
    name = unit["ceiling"]
    assert name in OURS
    size = SIZE if gpu else DRY_SIZE
    dtype = torch.bfloat16 if name == "medium" else torch.float32
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    with matmul_precision(name):
        emit(**{name: 2 * size**3 / clock.median(lambda: a @ b)})
