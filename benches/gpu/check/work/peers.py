"""Fused linear cross-entropy of other libraries, forward and backward: the bound that people know.

They do not compute what we do: the gradients with respect to features and weights of one loss
take three products of the size of ours, so their time says what such a call may take. Compared at
their own precision, bfloat16, for large vocabularies, which is what they are made for.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..worker import Skipped
from .timing import Clock, copy_rate, device, inputs, item_bytes, job_of, warm_up

ROUNDS = 9
PEERS = ("liger", "cut_cross_entropy")
_PACKAGES = {"liger": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Time one library's loss and gradients on one job."""
    shape, dtype, _ = job_of(unit)
    where, name = device(), unit["contender"]
    if where.type != "cuda":
        raise Skipped("no CUDA device")
    call = loss_of(name)
    clock = Clock(where)
    torch.cuda.empty_cache()
    features, weight, labels, bias = inputs(shape, dtype, where)
    parameters = [tensor.requires_grad_() for tensor in (features, weight, bias)]

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        call(features, weight, labels, bias).backward()

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    emit(item_bytes=item_bytes(dtype), peak_bytes=torch.cuda.max_memory_allocated() - before)
    warm_up(where)
    emit(copy_before=copy_rate(where, clock))
    seconds = [clock.time(both) for _ in range(ROUNDS)]
    emit(
        milliseconds=1e3 * statistics.median(seconds),
        all_milliseconds=[1e3 * each for each in seconds],
    )


def loss_of(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Any]:
    """Return the mean loss of features, weight, labels and bias by a library."""
    try:
        if name == "liger":
            module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
            function = module.LigerFusedLinearCrossEntropyFunction
            return lambda h, w, y, b: _first(function.apply(h, w, y, b))
        linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        raise Skipped(f"{_PACKAGES[name]} is not installed ({error})") from None
    return lambda h, w, y, b: linear_cross_entropy(h, w, y)  # 25.1 has no bias


def _first(result: Any) -> Any:
    """Return the loss: some versions return more."""
    return result[0] if isinstance(result, tuple) else result
