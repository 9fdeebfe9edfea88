"""The float32 matmul precision that a problem asks for, whatever is set globally.

PyTorch keeps that setting for the whole process. Calls from several threads therefore share it:
the first to enter remembers the caller's setting, the last to leave restores it, and while they
overlap the strictest request holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .problem import Problem

_lock = threading.Lock()
_users = 0
_before = "highest"
_convolving = 0
_cudnn_before: bool | tuple[str, str] = True


@contextmanager
def own_precision(problem: Problem) -> Iterator[None]:
    """No graph, no autocast, and float32 products as exact as ``problem.precision`` asks."""
    kind = problem.device.type
    allowed = "high" if kind == "cuda" and problem.precision != "highest" else "highest"
    # To turn off what is off already would take several times as long as all else here.
    on = torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if on else nullcontext():
        _enter(allowed)
        try:
            yield
        finally:
            _leave()


@contextmanager
def exact_products() -> Iterator[None]:
    """No float32 product or convolution with rounded operands, whatever is set globally."""
    _enter("highest", convolutions=True)
    try:
        yield
    finally:
        _leave(convolutions=True)


def _enter(allowed: str, convolutions: bool = False) -> None:
    global _users, _before, _convolving, _cudnn_before
    with _lock:
        current = torch.get_float32_matmul_precision()
        if _users == 0:
            _before = current
        _users += 1
        # Another thread that relies on "highest" must not be given less.
        if current != allowed and (_users == 1 or allowed == "highest"):
            torch.set_float32_matmul_precision(allowed)
        if convolutions:
            if _convolving == 0:
                _cudnn_before = _forbid_tf32()
            _convolving += 1


def _leave(convolutions: bool = False) -> None:
    global _users, _convolving
    with _lock:
        if convolutions:
            _convolving -= 1
            if _convolving == 0:
                _restore_tf32(_cudnn_before)
        _users -= 1
        if _users == 0 and torch.get_float32_matmul_precision() != _before:
            torch.set_float32_matmul_precision(_before)


def _forbid_tf32() -> bool | tuple[str, str]:
    """Let cuDNN round no operands; return what was set before.

    PyTorch has an old and a new name for this setting, and the old one cannot be read any more
    once the new ones were written: what the caller has used is what is put back.
    """
    cudnn: Any = torch.backends.cudnn
    try:
        before: bool = cudnn.allow_tf32
    except RuntimeError:
        by_operation = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        return by_operation
    cudnn.allow_tf32 = False
    return before


def _restore_tf32(before: bool | tuple[str, str]) -> None:
    cudnn: Any = torch.backends.cudnn
    if isinstance(before, tuple):
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
    else:
        cudnn.allow_tf32 = before
