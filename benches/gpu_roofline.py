"""A GPU's ceilings, the steps of a job, and the time that follows from both.

A step takes the longer of its bytes at the memory's rate and its products at the tensor cores'
rate; a job the sum of its steps, and ``LAUNCH_SECONDS`` for each launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"

# Of a launch inside a CUDA graph behind the one before it, and of one from Python, which costs
# nothing while the GPU is still busy with those before: assumptions, to be measured.
LAUNCH_SECONDS = 2e-6
HOST_SECONDS = 5e-6


@dataclass(frozen=True)
class Gpu:
    """Ceilings of a GPU; ``flops`` by what is multiplied. H200 figures are those of its users."""

    name: str
    read: float  # bytes/s that large copies reach
    flops: Mapping[str, float]
    multiprocessors: int
    shared_bytes: int  # a block may have; a multiprocessor has 1 KiB more
    l2_bytes: int
    memory_bytes: float


H200 = Gpu(
    "H200",
    read=4.3e12,
    flops={"bfloat16": 790e12, "tf32": 400e12, "float32": 67e12},
    multiprocessors=132,
    shared_bytes=232_448,
    l2_bytes=60 * 10**6,
    memory_bytes=139 * 2**30,
)


@dataclass(frozen=True)
class Step:
    """One kernel of ours, or one product by cuBLAS, or the operations of PyTorch around them."""

    name: str
    bytes: float  # from and to device memory
    flops: float = 0.0  # as executed: padded classes and extra products of terms count
    rate: str = "bfloat16"  # which of Gpu.flops
    feature_reads: float = 0.0  # how often the features pass by, for the check with the regime
    note: str = ""  # occupancy, tail: what would explain a miss

    def seconds(self, gpu: Gpu) -> float:
        """Return the longer of the two, without launches."""
        return max(self.bytes / gpu.read, self.flops / gpu.flops[self.rate])

    def bound(self, gpu: Gpu) -> str:
        """Which of the two it waits for."""
        return (
            "memory" if self.bytes / gpu.read >= self.flops / gpu.flops[self.rate] else "products"
        )


@dataclass(frozen=True)
class Prediction:
    """A job of one backend, step by step."""

    backend: str
    described: str
    steps: tuple[Step, ...]
    kept: bool  # residuals, between the passes
    chunks: int
    launches: int

    def seconds(self, gpu: Gpu, graph: bool = True) -> float:
        """Sum of the steps and of the launches in a graph; without one, no less than Python's."""
        found = sum(s.seconds(gpu) for s in self.steps) + LAUNCH_SECONDS * self.launches
        return found if graph else max(found, HOST_SECONDS * self.launches)


def measured(name: str, roof: Mapping[str, float], device: torch.device) -> Gpu:
    """Return the H200's ceilings on an H200, else those that were just measured."""
    if "H200" in name:
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name,
        max(roof["read"], roof["copy"]),
        {"bfloat16": roof["medium"], "tf32": roof["high"], "float32": roof["highest"]},
        properties.multi_processor_count,
        H200.shared_bytes,
        properties.L2_cache_size,
        properties.total_memory,
    )
