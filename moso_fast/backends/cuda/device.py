"""The module of CUDA C++ kernels and the GPU it runs on: limits, memory, launches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.problem import Problem
from ...util.native import load_native

Job = dict[str, Any]  # fields by name: addresses and sizes


def module() -> ModuleType:
    """Return ``moso_fast._cuda``."""
    found = load_native("_cuda").module
    assert found is not None, "chosen only where it is available"
    return found


@cache
def compiled_for(of_device: tuple[int, int], architectures: str) -> bool:
    """Whether binary code of ``architectures`` ("sm_80 sm_90a compute_90") runs on a device.

    Code runs on its own and later minor versions of a major one, with an "a" on its own only. PTX
    for later devices is not counted: nobody has looked at the registers that they would take.
    """
    for major, minor, exact in re.findall(r"sm_(\d+)(\d)(a?)", architectures):
        built = int(major), int(minor)
        if of_device == built or (not exact and of_device[0] == built[0] and of_device > built):
            return True
    return False


@cache
def capability(device: int) -> tuple[int, int]:
    """Compute capability of a device, by its index."""
    return torch.cuda.get_device_capability(device)


@cache
def limits(device: int) -> tuple[int, int]:
    """Bytes of shared memory that one block may have, and multiprocessors."""
    shared, multiprocessors = module().device_limits(device)
    return int(shared), int(multiprocessors)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    return limits(index(device))[0]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has."""
    return limits(index(device))[1]


def bulk_copies(device: torch.device) -> bool:
    """Whether a thread of this GPU can ask for many bytes at once."""
    return capability(index(device)) >= (9, 0)


def index(device: torch.device) -> int:
    """Return the number of a device; of the current one where it has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def launch(device: torch.device, function: Callable[[Any], None], job: Job, *parts: Job) -> None:
    """Launch on the current stream of ``device``, whatever the current device.

    ``parts``: jobs within ``job`` that are launched there too.
    """
    on = index(device)
    # What torch.cuda.current_stream would make an object of, at ten times the cost.
    stream = torch._C._cuda_getCurrentRawStream(on)
    for part in (job, *parts):
        part["device"], part["stream"] = on, stream
    if on == torch.cuda.current_device():
        function(job)
        return
    with torch.cuda.device(on):
        function(job)


def empty(problem: Problem, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory where the problem's heads are."""
    return torch.empty(shape, dtype=dtype, device=problem.device)


def facts(problem: Problem, numbers: int, read: bool) -> Tensor:
    """Memory for float64 numbers that kernels write: in main memory if the host will read them."""
    if read:
        return torch.empty(numbers, dtype=torch.float64, pin_memory=True, device="cpu")
    return empty(problem, numbers, dtype=torch.float64)


def carve(problem: Problem, alignment: int, **sizes: int) -> tuple[Tensor, dict[str, int]]:
    """One piece of memory for arrays of these sizes (bytes), and the address of each."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // alignment) * alignment
    memory = empty(problem, end // 8, dtype=torch.float64)
    start = memory.data_ptr()
    return memory, {name: start + offset for name, offset in offsets.items()}
