"""How many blocks of a kernel share a multiprocessor, and what keeps it waiting.

Registers, shared memory and the multiplying instruction are the compiler's, of
results/triton_aot.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moso_fast.core.problem import Problem

from .roofline import BARRIER_CYCLES, MEMORY_SECONDS, RESULTS, Gpu

_THREADS_A_MULTIPROCESSOR = 2048
_REGISTERS = 65536
INSTRUCTIONS = RESULTS / "gpu_instructions.json"


@dataclass(frozen=True)
class Fit:
    """A kernel under a tile on a GPU, in a grid of so many blocks."""

    instruction: str  # HGMMA, HMMA or FFMA
    blocks: int  # that a multiprocessor holds
    turns: int  # blocks that the busiest multiprocessor works through
    note: str
    in_flight: float | None = None  # bytes requested at a time by all blocks of a multiprocessor


def aligned(problem: Problem, padded: bool = False) -> bool:
    """Whether rows of features and residuals begin at multiples of 16 bytes.

    ``padded``: residuals lie in rows that always do.
    """
    whole = padded or problem.classes % 4 == 0
    return problem.dim * problem.features.dtype.itemsize % 16 == 0 and whole


def case_of(
    kernel: str,
    tile: Any,
    problem: Problem,
    *,
    aligned_rows: bool | None = None,
    narrow: bool = False,
) -> str:
    """Return the name of a product kernel's case in the compiler's report.

    ``aligned_rows``: rows as in ``aligned``, whose answer is the default.
    """
    dtype = "bf16" if problem.features.dtype == torch.bfloat16 else "fp32"
    kind = f"{dtype}-narrow" if narrow else dtype
    odd = "" if (aligned(problem) if aligned_rows is None else aligned_rows) else "-unaligned"
    return f"{kernel}-{tile.rows}x{tile.classes}x{tile.dim}-{kind}{odd}"


def fit(
    case: str,
    tile: Any,
    programs: float,
    gpu: Gpu,
    version: tuple[int, ...],
    staged: float | None = None,
) -> Fit:
    """Say how many blocks fit, by the compiler's report, and in how many rounds they are done.

    ``staged``: bytes that a block has requested at a time; None: not looked at.
    """
    registers, _, shared, instruction = _report(case, version)
    threads = 32 * tile.num_warps
    blocks = min(
        _REGISTERS // (8 * -(-registers // 8) * threads),
        (gpu.shared_bytes + 1024) // (shared + 1024),
        _THREADS_A_MULTIPROCESSOR // threads,
    )
    words = [f"{instruction}, {registers} registers x {threads}, {shared / 1024:.0f} KiB shared"]
    in_flight = None if staged is None else blocks * staged
    if in_flight is not None:
        words.append(bytes_in_flight(in_flight, gpu))
    at_once = blocks * gpu.multiprocessors
    words.append(last_wave(programs / at_once))
    turns = blocks * -int(-programs // at_once)
    return Fit(instruction, blocks, turns, ", ".join(words), in_flight)


def bytes_in_flight(asked: float, gpu: Gpu) -> str:
    """Bytes under way on a multiprocessor, beside what the memory's latency asks for."""
    wanted = gpu.read * MEMORY_SECONDS / gpu.multiprocessors
    return f"{asked / 1024:.0f} of {wanted / 1024:.0f} KiB in flight"


def last_wave(waves: float) -> str:
    """How much of the last round of blocks is idle."""
    rounds = -(-waves // 1)
    idle = 0 if not rounds else 100 * (1 - waves / rounds)
    return f"{waves:.2f} waves ({idle:.0f}% idle)"


def loop_phases(case: str, version: tuple[int, ...]) -> dict[str, list[int]] | None:
    """Instructions and barriers of a turn of a kernel's loop, by phase; None: not counted."""
    return _of_version(_counted(), version).get(case)


def barriers(count: float, gpu: Gpu) -> float:
    """Seconds that so many barriers hold a block up."""
    return count * BARRIER_CYCLES / gpu.clock


def _report(case: str, version: tuple[int, ...]) -> list[Any]:
    found = _of_version(_figures(), version).get(case) or _of_version(_figures(), ()).get(case)
    if found is None:
        raise KeyError(f"{case} is not in triton_aot.json: run python benches/triton_resources.py")
    report: list[Any] = found["sm_90"]
    return report


def _of_version(figures: dict[str, Any], version: tuple[int, ...]) -> dict[str, Any]:
    """Figures of this Triton, else of the newest."""

    def parts(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in name.split("."))

    same = [name for name in figures if parts(name)[:2] == tuple(version)[:2]]
    newest = max(same or figures, key=parts, default=None)
    return {} if newest is None else dict(figures[newest])


@cache
def _figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "triton_aot.json").read_text(encoding="utf-8"))
    return found


@cache
def _counted() -> dict[str, Any]:
    if not INSTRUCTIONS.exists():
        return {}
    found: dict[str, Any] = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))
    return found
