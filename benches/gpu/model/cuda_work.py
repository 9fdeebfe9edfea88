"""What the CUDA C++ kernels for few classes issue, load and wait for, tile by tile.

Counted by hand in the disassembly of the built module (sm_90a): instructions a warp of the loops'
bodies, times their turns in csrc/cuda/few_classes_*.cuh; tests/tools/test_gpu_counts.py counts the
loops that multiply again. One instruction a cycle and scheduler is the best case, so is shared
memory without conflicts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .occupancy import barriers
from .roofline import MEMORY_SECONDS, Gpu, Phase

_WARPS, _SCHEDULERS, _LANES = 8, 4, 32
_THREADS = _WARPS * _LANES


class Loop(NamedTuple):
    """One turn of a loop, a warp."""

    instructions: float
    shared: float  # cycles in which its loads have the multiprocessor's shared memory to themselves


# By bytes of a feature, whether operands keep every digit, and tiles of 16 classes; of others only
# softmax and copies are counted. A turn of the logits is a group of columns, 64 bytes of a row; of
# the gradient 16 rows and as many columns as the registers have sums for.
LOGITS = {
    (2, False, 1): Loop(24, 16),
    (2, False, 7): Loop(143, 80),
    (4, False, 1): Loop(64, 16),
    (4, True, 1): Loop(142, 16),
}
GRADIENT = {
    (2, False, 1): Loop(117, 68),
    (2, False, 7): Loop(84, 80),
    (4, False, 1): Loop(695, 136),
    (4, True, 1): Loop(1294, 140),
}
_BY_ROW = 32  # classes of one head whose softmax stays in registers
_MOST_COLUMNS = {1: 2048, 2: 1024}  # of the gradient in registers, by tiles; 512 above


class Kernel(NamedTuple):
    """A kernel's job: the plan of csrc/cuda/few_classes_plan.cpp and what it was made for."""

    plan: dict[str, Any]
    classes: int
    dim: int
    item: int
    exact: bool

    @property
    def key(self) -> tuple[int, bool, int]:
        """Of the tables above."""
        return self.item, self.exact, int(self.plan["tiles"])

    @property
    def counted(self) -> bool:
        """Whether the instructions of the products are known."""
        return self.key in LOGITS


def first_phases(
    kernel: Kernel, turns: float, gpu: Gpu, logits_flops: float, gradient_flops: float
) -> tuple[Phase, ...]:
    """Phases of the first pass, for ``turns`` tiles of a multiprocessor's blocks together."""
    plan, classes = kernel.plan, kernel.classes
    rows = int(plan["tile_rows"])
    slices = _WARPS // (rows // 16)
    none = Loop(0, 0)

    # 64 bytes of a row are a group of columns; the slices share them.
    groups = kernel.dim * kernel.item / 64 / slices
    body = LOGITS.get(kernel.key, none)
    logits = _cycles(body.instructions * groups + 75, body.shared * groups)

    most = _MOST_COLUMNS.get(int(plan["tiles"]), 512)
    body, share = GRADIENT.get(kernel.key, none), min(1.0, -(-kernel.dim // 128) * 128 / most)
    steps = rows / 16
    added, loads = 40.0, 1.0
    if classes <= _BY_ROW:
        # Four lanes a row, which had asked for its label; what half of the warps issue counts half.
        slots = -(-classes // 4)
        each = 286 + 48 * slots + slices * (10 + 4 * slots)
        softmax = _cycles(each * rows / (8 * _WARPS), 0)
        loads = 0.0
    else:
        lanes = 4
        while lanes < _LANES and 2 * lanes * rows <= _THREADS:
            lanes *= 2
        softmax_turns = -(-rows * lanes // _THREADS)
        # Three walks over a lane's classes, the first with a sum over the slices; shuffles; the
        # rest.
        walks = -(-classes // lanes) * (112 + 7 * slices) + 57 * (lanes.bit_length() - 1) + 350
        softmax = _cycles(walks * softmax_turns, 0)
        loads = float(softmax_turns)  # of labels, which nobody staged
        added += 28 * -(-rows * classes // _THREADS)  # residuals to memory
        added += -(-classes // _LANES) * (20 + 4.5 * rows / _WARPS)  # sums for the bias
    waits = MEMORY_SECONDS * loads + barriers(3, gpu)
    gradient = _cycles(body.instructions * share * steps + added, body.shared * share * steps)
    # Bulk copies, by half of the warps, a row at a time; and the loop itself.
    staging = _cycles((60 + 8 * rows / (_WARPS / 2)) / 2 + 30, 0)
    hmma = {"rate": "bfloat16", "by": "HMMA"}
    return (
        Phase("logits", logits_flops, cycles=turns * (logits + staging), **hmma),
        Phase("softmax", cycles=turns * softmax, stalls=turns * waits),
        Phase("gradient", gradient_flops, cycles=turns * gradient, **hmma),
    )


def second_phase(kernel: Kernel, row_tiles: float, grad_terms: int, flops: float) -> Phase:
    """Work of the second pass, whose warps take 16 rows each without a barrier."""
    tiles = -(-kernel.classes // 8)
    groups = kernel.dim * kernel.item / 64
    split = 32 if kernel.item == 4 else 0  # of float32 features into terms, a group
    batches = -(-groups // 4)
    # Loads ahead, then for each class tile of a group the operand and its products; at the end
    # residuals of all classes.
    issued = batches * 100 + groups * (8 + split + 23 * tiles) + 150 + 110 * tiles
    # 16 bytes a lane and term of G, or the float32 elements of a step: four cycles.
    shared = groups * tiles * (4 * grad_terms if kernel.item == 2 and grad_terms < 3 else 4)
    cycles = row_tiles * max(issued / _SCHEDULERS, shared)
    return Phase("product", flops, "bfloat16", "HMMA", cycles)


def _cycles(instructions: float, shared: float) -> float:
    """Cycles of a block: four schedulers issue for eight warps, which share one shared memory."""
    return max(_WARPS * instructions / _SCHEDULERS, _WARPS * shared)
