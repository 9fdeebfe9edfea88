"""How much memory a job may use, and the plan that follows from it.

Residuals of the first pass are kept where they fit the budget, otherwise the second pass computes
them again.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from .passes import Passes, Plan
from .problem import Problem
from .streaming import CHUNK_BYTES

_CPU_RESIDUAL_SHARE = 0.25
_CUDA_RESIDUAL_SHARE = 0.5

# Residuals that a GPU keeps whatever is free, so that short jobs need not wait for the driver to
# say what is. No more than most backends take to work on one chunk (512 MiB to 2 GiB), and an
# eighth of the smallest GPUs that the kernels are tested for (4 GiB).
_CUDA_ALWAYS_KEPT = 2**29

# What residual_budget found last, by device.
_last_budget: dict[torch.device, int] = {}

# Of the free memory of a GPU, what residuals and features from main memory may take together; and
# what else a chunk needs.
_CUDA_KEPT_SHARE = 0.8
_CUDA_WORKING_BYTES = 3 * 2**30


def make_plan(problem: Problem, chunk_size: int | None) -> Plan:
    """Decide what may be kept in memory.

    ``chunk_size`` (rows) fixes the chunk and has the second pass recompute residuals, so that
    memory does not grow with the number of rows.
    """
    check_chunk_size(chunk_size)
    residual_bytes = _residual_bytes(problem)
    if chunk_size is not None:
        return Plan(chunk_size, False, residual_bytes, 0)
    budget = _enough(problem.device, residual_bytes)
    keep = residual_bytes <= budget
    resident = 0
    if problem.streamed:
        resident = resident_budget(problem.device, residual_bytes if keep else 0)
    return Plan(None, keep, residual_bytes, budget, resident)


def rows_at_a_time(problem: Problem, plan: Plan, passes: Passes) -> int:
    """Rows of a chunk: as the caller fixed them, or what the backend and streaming allow."""
    if plan.chunk_size is not None:
        return plan.chunk_size
    if not problem.streamed:
        return passes.chunk_rows
    a_row = problem.dim * problem.features.dtype.itemsize
    return max(1, min(passes.chunk_rows, CHUNK_BYTES // a_row))


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError unless ``chunk_size`` is None or a positive int."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size!r}")


def _residual_bytes(problem: Problem) -> int:
    return problem.rows * problem.heads * problem.classes * problem.compute_dtype.itemsize


def _enough(device: torch.device, needed: int) -> int:
    """:func:`residual_budget`, or what is always kept where ``needed`` bytes are no more."""
    if device.type == "cuda" and needed <= _CUDA_ALWAYS_KEPT:
        return _CUDA_ALWAYS_KEPT
    return residual_budget(device)


def residual_budget(device: torch.device) -> int:
    """Bytes of residuals that may stay between the passes on this device."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured_budget(device)
        budget = max(_CUDA_ALWAYS_KEPT, int(_CUDA_RESIDUAL_SHARE * _free_bytes(device)))
        _last_budget[device] = budget
        return budget
    return _cpu_budget()


@cache
def _cpu_budget() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(_CPU_RESIDUAL_SHARE * physical)
    return 2**30


def _captured_budget(device: torch.device) -> int:
    """Return the budget under CUDA graph capture, where the driver may not be asked what is free.

    A captured call must not be the first to launch a kernel: it would be compiled and loaded
    within the capture. So it is planned like the call that came before it to warm up, by what that
    one was told, unless PyTorch has since taken memory that this one would need: a graph has
    memory of its own and cannot use what others have given back. Without such a call all that
    PyTorch has not taken is as good as free.
    """
    left = torch.cuda.get_device_properties(device).total_memory
    left -= torch.cuda.memory_reserved(device)  # PyTorch's own books: the driver is not asked
    budget = int(_CUDA_RESIDUAL_SHARE * left)
    return max(_CUDA_ALWAYS_KEPT, min(budget, _last_budget.get(device, budget)))


def _free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that PyTorch holds from earlier work and can give back.

    Without the latter a second call would find what the first one used gone, and plan otherwise.
    """
    held = torch.cuda.memory_stats(device)  # empty before the first allocation

    def current(kind: str) -> int:
        return held.get(f"{kind}_bytes.all.current", 0)

    idle = current("reserved") - current("active") - current("inactive_split")
    return torch.cuda.mem_get_info(device)[0] + max(0, idle)


def resident_budget(device: torch.device, residual_bytes: int) -> int:
    """Bytes of streamed features that may stay on a GPU beside residuals and a chunk's work."""
    free = _free_bytes(device)
    return max(0, int(_CUDA_KEPT_SHARE * free) - residual_bytes - _CUDA_WORKING_BYTES)
