"""Lanes to a device that copy between buffers of main memory, at once or late."""

from __future__ import annotations

import torch
from torch import Tensor

from moso_fast.core.streaming import Lane


class EagerLane(Lane):
    """Copies at once, the earliest that a device could; checks what each copy waits for.

    A token is the number of marks set when it was made. A buffer may be overwritten after the
    mark that was set once its last chunk had been read.
    """

    lazy = False

    def __init__(self) -> None:
        self.marks = 0
        self.sent: list[tuple[int, int]] = []  # rows, marks waited for
        self.read_until: dict[int, int] = {}  # address -> marks when it was last read
        self.waits = 0

    def staging(self, shape, dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    def buffer(self, shape, dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def read(self, features: Tensor) -> None:
        """What a test's backend does with the features of a chunk."""
        self.read_until[features.data_ptr()] = self.marks + 1

    def send(self, source: Tensor, target: Tensor, after) -> object:
        assert after >= self.read_until.get(target.data_ptr(), 0), "overwrites what is being read"
        self.sent.append((len(source), after))
        target.copy_(source)
        return None

    def expect(self, token) -> None:
        self.waits += 1

    def wait(self, token) -> None:
        pass


class LazyLane(EagerLane):
    """Copies when somebody waits for it, the latest that a device could."""

    def send(self, source: Tensor, target: Tensor, after) -> object:
        self.sent.append((len(source), after))
        pending = [lambda: target.copy_(source)]
        self.all_pending = [*getattr(self, "all_pending", []), pending]
        return pending

    def expect(self, token) -> None:
        self.waits += 1
        self.wait(token)

    def wait(self, token) -> None:
        while token:
            token.pop()()


LANES = (EagerLane, LazyLane)
