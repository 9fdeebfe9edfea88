"""Peak memory of a job: in a process of its own on a CPU, from the allocator on a GPU.

The process is forked from a server that has imported PyTorch and used nothing of it, runs the job
once (so that pools, compilers and caches are no part of the answer), returns what it freed to the
system, and then runs it again watching the high-water mark of its resident memory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from .cases import Case

__all__ = ["allocator_peak", "peak_bytes_in_child", "resident_peak"]

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
_LARGE = 2**18
_PRELOAD = ["moso_fast.bench.memory", "moso_fast.bench.providers", "moso_fast.bench.inputs"]


def allocator_peak(job: Any, device: str) -> int:
    """Peak of PyTorch's allocator on a GPU during a job that has run before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak(job: Any) -> int:
    """Growth of the resident memory during a job that has run before, at its highest.

    For a process that does nothing else; Linux.
    """
    _give_back()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, proc(5)
    job()
    return max(0, _status("VmHWM") - before)


def peak_bytes_in_child(
    case: Case,
    rows: int,
    provider: str,
    threads: int,
    limit: float,
    registry: str = "moso_fast.bench.providers",
) -> tuple[int | None, str | None]:
    """Peak of one provider on a CPU, or None and why there is none.

    Parameters
    ----------
    limit
        Seconds after which the process is ended.
    registry
        Module whose ``PROVIDERS`` holds the provider; see :func:`.providers.registered`.
    """
    if not sys.platform.startswith("linux"):
        return None, "peak memory is read from /proc, which only Linux has"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)  # `registry` beyond that is imported by the child
    answer = context.Queue()
    child = context.Process(target=_child, args=(case, rows, provider, threads, registry, answer))
    child.start()
    try:
        return _wait(child, answer, limit)
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def _wait(child: Any, answer: Any, limit: float) -> tuple[int | None, str | None]:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            return answer.get(timeout=0.1)
        except queue.Empty:
            if not child.is_alive():
                try:
                    return answer.get(timeout=0.2)
                except queue.Empty:
                    return None, f"the process ended with exit code {child.exitcode}"
    return None, f"not done within {limit:.0f} s"


def _child(case: Case, rows: int, provider: str, threads: int, registry: str, answer: Any) -> None:
    # Large blocks come from the system and go back there as soon as they are freed.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # progress bars of libraries
    torch.set_num_threads(threads)
    from .inputs import make_inputs
    from .providers import providers_for

    try:
        inputs = make_inputs(case, rows)
        chosen = next(p for p in providers_for(case, registry) if p.name == provider)
        job = chosen.prepare(case, inputs)
        job()
        answer.put((resident_peak(job), None))
    except Exception as error:  # whatever a library raises is the answer
        answer.put((None, f"failed: {type(error).__name__}: {error}"[:200]))


def _give_back() -> None:
    import gc

    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
