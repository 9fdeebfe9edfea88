"""What a GPU can do at the most, what a step asks of it, and the time that follows from both.

A job is a row of steps, a step a row of sweeps: kernels one after the other, whose times add.
Within one sweep bytes, products and instructions overlap and the longest decides, unless too few
blocks share a multiprocessor to hide each other: what a block does one after the other (load,
logits, softmax, gradient; the first load and the last of a program) adds up as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[2] / "results"

# Of a launch inside a CUDA graph behind the one before it, and of one from Python, which costs
# nothing while the GPU is still busy with those before: assumptions, to be measured.
LAUNCH_SECONDS = 2e-6
HOST_SECONDS = 5e-6
# Of a load from device memory, of one from the L2 cache, and cycles that a barrier of a block keeps
# all of its warps from issuing: assumptions too, of the usual size for this generation.
MEMORY_SECONDS = 600e-9
L2_SECONDS = 270e-9
BARRIER_CYCLES = 30
# Of the rate of wgmma (HGMMA in the compiler's report): mma.sync reaches half to two thirds.
SHARE = {"HGMMA": 1.0, "HMMA": 0.6}


@dataclass(frozen=True)
class Gpu:
    """Ceilings of a GPU; ``flops`` by what is multiplied."""

    name: str
    read: float  # bytes/s that large copies reach
    flops: Mapping[str, float]  # of large products by cuBLAS
    multiprocessors: int
    shared_bytes: int  # a block may have; a multiprocessor has 1 KiB more
    l2_bytes: int
    memory_bytes: float
    clock: float = 1.755e9  # Hz under load


# bfloat16 and the bytes were measured by large products and copies on such GPUs; tf32 and float32
# are nominal rates less what products of this size usually lose.
H200 = Gpu(
    "H200",
    read=4.3e12,
    flops={"bfloat16": 788e12, "tf32": 400e12, "float32": 63e12},
    multiprocessors=132,
    shared_bytes=232_448,
    l2_bytes=60 * 10**6,
    memory_bytes=139 * 2**30,
)
H100 = Gpu(
    "H100",
    read=3.0e12,
    flops={"bfloat16": 798e12, "tf32": 400e12, "float32": 63e12},
    multiprocessors=132,
    shared_bytes=232_448,
    l2_bytes=50 * 10**6,
    memory_bytes=79 * 2**30,
)
GPUS = (H200, H100)
# Of the same names, but with fewer multiprocessors, slower memory or less power.
_OTHER = {"PCIe", "NVL", "MIG"}


@dataclass(frozen=True)
class Phase:
    """What a block does before its next barrier, summed over all blocks of the sweep."""

    name: str
    flops: float = 0.0  # as executed: padded classes and extra products of terms count
    rate: str = "bfloat16"  # which of Gpu.flops
    by: str = "HGMMA"  # what multiplies, of SHARE
    cycles: float = 0.0  # a multiprocessor needs to issue the instructions; 0: not counted
    stalls: float = (
        0.0  # seconds in which a block waits for a barrier, or a load nobody asked ahead
    )

    def products(self, gpu: Gpu) -> float:
        """Seconds of the multiplications."""
        return self.flops / (gpu.flops[self.rate] * SHARE[self.by])

    def alone(self, gpu: Gpu) -> float:
        """Seconds where no other block has anything to do meanwhile."""
        return max(self.products(gpu), self.cycles / gpu.clock) + self.stalls


@dataclass(frozen=True)
class Sweep:
    """One kernel, or one operation of PyTorch, over its operands.

    ``blocks`` that share a multiprocessor each go through the phases at their own pace; None: so
    many that they hide each other. ``staged``: the next tile is under way while a block works on
    this one; else each block loads, works and only then loads again. ``idle``: seconds in which a
    block has neither work nor loads for it under way, as at the ends of every program.
    """

    bytes: float  # from and to device memory
    phases: tuple[Phase, ...] = ()
    in_flight: float | None = None  # bytes requested at a time a multiprocessor; None: enough
    blocks: int | None = None
    staged: bool = True
    idle: float = 0.0

    def memory(self, gpu: Gpu) -> float:
        """Seconds of the bytes: at the memory's rate, or what its latency makes of those asked."""
        rate = gpu.read
        if self.in_flight is not None:
            rate = min(rate, gpu.multiprocessors * self.in_flight / MEMORY_SECONDS)
        return self.bytes / rate

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """Seconds by what may decide; the longest does."""
        found = {
            "memory": self.memory(gpu),
            "products": sum(phase.products(gpu) for phase in self.phases),
            "issue": sum(phase.cycles for phase in self.phases) / gpu.clock,
        }
        if self.blocks is not None:
            work, load = sum(phase.alone(gpu) for phase in self.phases), self.memory(gpu)
            chain = max(work, load) if self.staged else work + load
            found["phases"] = (chain + self.idle) / self.blocks
        return found

    def seconds(self, gpu: Gpu) -> float:
        """Return the longest of the parts."""
        return max(self.parts(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """Which of them it waits for."""
        parts = self.parts(gpu)
        return max(parts, key=lambda name: parts[name])


def product(size: float, flops: float, rate: str) -> Sweep:
    """One product by cuBLAS, which moves so many bytes."""
    return Sweep(size, (Phase("product", flops, rate),))


@dataclass(frozen=True)
class Step:
    """One kernel of ours, or one product by cuBLAS, with the operations of PyTorch it brings."""

    name: str
    part: str  # "first" or "second" pass, or "around" both
    sweeps: tuple[Sweep, ...]
    feature_reads: float = 0.0  # how often the features pass by, for the check with the regime
    note: str = ""  # occupancy, tail: what would explain a miss
    blocks: int | None = None  # of its kernel that a multiprocessor holds, where it is ours

    @property
    def bytes(self) -> float:
        """Of all sweeps."""
        return sum(sweep.bytes for sweep in self.sweeps)

    @property
    def flops(self) -> float:
        """Of all sweeps."""
        return sum(phase.flops for sweep in self.sweeps for phase in sweep.phases)

    def seconds(self, gpu: Gpu) -> float:
        """Sum of the sweeps, without launches."""
        return sum(sweep.seconds(gpu) for sweep in self.sweeps)

    def bound(self, gpu: Gpu) -> str:
        """Name what the longest sweep waits for."""
        return max(self.sweeps, key=lambda sweep: sweep.seconds(gpu)).bound(gpu)


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

    def pass_seconds(self, gpu: Gpu) -> tuple[float, float]:
        """Sum up what the first and the second pass run on the GPU, without launches."""
        first, second = (
            sum(step.seconds(gpu) for step in self.steps if step.part == part)
            for part in ("first", "second")
        )
        return first, second


def measured(name: str, roof: Mapping[str, float], device: torch.device) -> Gpu:
    """Return the committed ceilings of an H100 or H200, else those that were just measured.

    ``name`` is the driver's, ``roof`` has bytes/s under "read" and "copy" and FLOP/s under each
    precision.
    """
    words = set(name.split())
    for gpu in GPUS:
        if gpu.name in words and not words & _OTHER:
            return gpu
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
