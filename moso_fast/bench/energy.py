"""Energy of a job, where the GPU keeps a counter of it (NVML, from Volta on)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["gpu_energy_counter", "joules_per_call"]

_SECONDS = 0.5  # the counter moves a few times in a tenth of a second


def gpu_energy_counter(device: str) -> Callable[[], float] | None:
    """Return a function that reads the joules a GPU has used; None without NVML's counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # absent, or without permission: energy is then not reported
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def joules_per_call(
    job: Callable[[], Any],
    counter: Callable[[], float],
    wait: Callable[[], None] = lambda: None,
    seconds: float = _SECONDS,
) -> float:
    """Energy of one call: the job repeated for at least ``seconds``, ``wait`` at both ends."""
    wait()
    before, start, calls = counter(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        job()
        calls += 1
        wait()
    return (counter() - before) / calls
