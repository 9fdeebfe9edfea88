"""The float32 matmul precision that a problem asks for, whatever is set globally.

PyTorch keeps that setting for the whole process. Calls from several threads therefore share it:
the first to enter remembers the caller's setting, the last to leave restores it, and while they
overlap the strictest request holds.

PyTorch has two sets of names for it. The old ones (``set_float32_matmul_precision``,
``allow_tf32``) cannot be read any more once the new ones (``fp32_precision`` of a backend, or of
one operation of it) say something else. Whichever the caller has used is what is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .problem import Problem

_lock = threading.Lock()
_users = 0
_convolving = 0
# How to put back what was changed, the last change last.
_matmul_undo: list[Callable[[], None]] = []
_convolution_undo: list[Callable[[], None]] = []


@contextmanager
def own_precision(problem: Problem) -> Iterator[None]:
    """No graph, no autocast, and float32 products as exact as ``problem.precision`` asks."""
    kind = problem.device.type
    allowed = "high" if kind == "cuda" and problem.precision != "highest" else "highest"
    # To turn off what is off already would take several times as long as all else here.
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if on else nullcontext():
        try:
            _enter(allowed, sums_of_halves=kind == "cuda")
            yield
        finally:
            _leave()


@contextmanager
def exact_products() -> Iterator[None]:
    """No float32 product or convolution with rounded operands, whatever is set globally."""
    try:
        _enter("highest", convolutions=True)
        yield
    finally:
        _leave(convolutions=True)


def rounds_to(kind: str) -> str:
    """Format to which a device of ``kind`` rounds float32 operands: ``"ieee"`` for not at all.

    Returns
    -------
    str
        ``"ieee"``, ``"tf32"`` or ``"bf16"``. Where PyTorch has no setting for that kind of device,
        the coarsest of what is set for any.
    """
    gpu, cpu = (setting.fp32_precision for setting in _products())
    found = {"cuda": [gpu], "cpu": [cpu]}.get(kind, [gpu, cpu])
    return next((name for name in ("bf16", "tf32") if name in found), "ieee")


def _enter(allowed: str, convolutions: bool = False, sums_of_halves: bool = False) -> None:
    global _users, _convolving
    with _lock:
        # Counted first: where PyTorch refuses to change a setting, `_leave` puts the others back.
        _users += 1
        _convolving += convolutions
        _allow_products(allowed)
        if sums_of_halves:
            _forbid_sums_in_halves()
        if convolutions:
            _forbid_convolutions()


def _leave(convolutions: bool = False) -> None:
    global _users, _convolving
    with _lock:
        if convolutions:
            _convolving -= 1
            if _convolving == 0:
                _undo(_convolution_undo)
        _users -= 1
        if _users == 0:
            _undo(_matmul_undo)


def _undo(changes: list[Callable[[], None]]) -> None:
    while changes:
        changes.pop()()


def _allow_products(allowed: str) -> None:
    """Let matrix products be no coarser than ``allowed``; as coarse, for the first to ask."""
    backends: Any = torch.backends
    try:
        current = torch.get_float32_matmul_precision()
    except RuntimeError:
        gpu, cpu = _products()
        if allowed == "highest":
            _forbid([backends, backends.cudnn, gpu, cpu], _matmul_undo)
        elif _users == 1 and gpu.fp32_precision != "tf32":
            _set(gpu, "tf32", _matmul_undo)
        return
    # Another thread that relies on "highest" must not be given less.
    if current != allowed and (_users == 1 or allowed == "highest"):
        for setting in _products():
            _remember(setting, _matmul_undo)
        _matmul_undo.append(lambda: torch.set_float32_matmul_precision(current))
        torch.set_float32_matmul_precision(allowed)


def _forbid_sums_in_halves() -> None:
    """Let products of float16 operands on a GPU be summed in float32."""
    matmul: Any = torch.backends.cuda.matmul
    if matmul.allow_fp16_accumulation:
        _matmul_undo.append(lambda: setattr(matmul, "allow_fp16_accumulation", True))
        matmul.allow_fp16_accumulation = False


def _forbid_convolutions() -> None:
    """Let neither cuDNN nor oneDNN round the operands of convolutions and recurrent layers."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    settings = [backends, mkldnn.conv, mkldnn.rnn]
    try:
        old_name: bool = cudnn.allow_tf32
    except RuntimeError:
        settings += [cudnn, cudnn.conv, cudnn.rnn]
    else:
        if old_name:
            _convolution_undo.append(lambda: setattr(cudnn, "allow_tf32", True))
            cudnn.allow_tf32 = False
    _forbid(settings, _convolution_undo)


def _products() -> tuple[Any, Any]:
    """PyTorch's settings of matrix products on GPUs and on CPUs, by their new names."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul


def _forbid(settings: list[Any], undo: list[Callable[[], None]]) -> None:
    """Set to exact what rounds among ``settings``, each of which follows those before it.

    An operation that had no setting of its own is exact once its backend is, and stays without.
    (oneDNN's backend is never among them: PyTorch's name for it sets that of all backends.)
    """
    for setting in settings:
        if setting.fp32_precision not in ("ieee", "none"):
            _set(setting, "ieee", undo)


def _set(setting: Any, value: str, undo: list[Callable[[], None]]) -> None:
    _remember(setting, undo)
    setting.fp32_precision = value


def _remember(setting: Any, undo: list[Callable[[], None]]) -> None:
    before = setting.fp32_precision

    def put_back() -> None:
        # What followed the setting of its backend goes on following it.
        setting.fp32_precision = "none"
        if setting.fp32_precision != before:
            setting.fp32_precision = before

    undo.append(put_back)
