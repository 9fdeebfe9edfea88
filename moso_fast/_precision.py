"""The float32 matmul precision that a problem asks for, whatever is set globally.

PyTorch keeps that setting for the whole process. Calls from several threads therefore share it:
the first to enter remembers the caller's setting, the last to leave restores it, and while they
overlap the strictest request holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .problem import Problem

_lock = threading.Lock()
_users = 0
_before = "highest"


@contextmanager
def own_precision(problem: Problem) -> Iterator[None]:
    """No graph, no autocast, and float32 products as exact as ``problem.precision`` asks."""
    kind = problem.device.type
    allowed = "high" if kind == "cuda" and problem.precision != "highest" else "highest"
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        _enter(allowed)
        try:
            yield
        finally:
            _leave()


def _enter(allowed: str) -> None:
    global _users, _before
    with _lock:
        current = torch.get_float32_matmul_precision()
        if _users == 0:
            _before = current
        _users += 1
        # Another thread that relies on "highest" must not be given less.
        if current != allowed and (_users == 1 or allowed == "highest"):
            torch.set_float32_matmul_precision(allowed)


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and torch.get_float32_matmul_precision() != _before:
            torch.set_float32_matmul_precision(_before)
