"""What a regime of the Triton backend is: one way through the two passes, for some problems."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ...core.passes import Passes, Plan
from ...core.problem import Problem

# Bytes of one chunk's logits, products and copies, at most. Large on a GPU, where a chunk costs
# some thirty launches, and with many classes a sweep over gradients of the size of the head; small
# in the interpreter, whose only purpose is to test.
CHUNK_BYTES = {"cuda": 2**33, "cpu": 2**17}
# Of the memory of a GPU that is no larger than most.
_CHUNK_SHARE = 8

# Rows of one float32 partial of the mean gradient by cuBLAS; the kernels here have their own
# (``kernels.operands.MOST_ROWS``). float32 products are added one after the other, and where rows
# are equal each sum is rounded the same way: 512 lose 8e-6 at most, 2048 would lose 3e-5. With
# rounded operands that matters less than their rounding does.
SLAB_ROWS = {"highest": 512, "high": 8192, "medium": 8192}

# Shared memory of a block that a kernel may ask for (CUDA C++ Programming Guide, table of
# technical specifications): what the interpreter stands in for, compute capability 9.0.
_SHARED_BYTES_OF_90 = 227 * 1024

# A number of the mean gradient, as the engine keeps it: float64, and float32 for the second pass.
_GRADIENT_BYTES = 12

# Major compute capabilities that tests/kernels/compiled/test_triton_aot*.py compile every tile for.
TESTED_MAJORS = (8, 9, 10)


@dataclass(frozen=True)
class Limits:
    """What a device offers a block: bytes of shared memory, and its compute capability."""

    shared_bytes: int
    capability: tuple[int, int]

    @property
    def major(self) -> int:
        """Major capability whose tiles it takes: its own if tests compile for it, else 8."""
        return self.capability[0] if self.capability[0] in TESTED_MAJORS else 8


class Regime(Passes):
    """One way through the two passes, for some problems; an instance is one job.

    Both passes of a job run in the same regime; the choice is made in ``choice.py``.

    Parameters
    ----------
    problem, plan
        The job, which :meth:`fits`, and what may be kept in memory.
    reasons
        Why this regime was chosen, and the others not: for those who ask.
    """

    name: str
    #: Times the features are read from device memory, both passes together.
    feature_reads: int
    #: Whether it uses residuals that are kept between the passes.
    stores_residuals = True

    def __init__(self, problem: Problem, plan: Plan, reasons: Sequence[str] = ()) -> None:
        super().__init__(problem, plan)
        self.reasons = tuple(reasons)
        self.operand = operand_dtype(problem)
        # Rows whose working memory fits the chunk's budget.
        self.chunk_rows = max(1, chunk_bytes(problem.device) // max(1, self.row_bytes()))
        self._tiles: dict[str, Any] = {}

    @classmethod
    @abstractmethod
    def fits(cls, problem: Problem) -> str | None:
        """Why this problem cannot run in this regime, or None."""

    def row_bytes(self) -> int:
        """Bytes of working memory that every row of a chunk takes.

        Its logits, and a copy of the features where cuBLAS cannot take them as they are.
        """
        problem = self.problem
        a_row = 4 * problem.heads * problem.classes
        if self.operand != problem.features.dtype:
            a_row += 4 * problem.dim
        return a_row

    def fixed_bytes(self) -> int:
        """Bytes of working memory that a chunk takes whatever its rows: partial sums."""
        return 0

    def state_bytes(self) -> int:
        """Bytes that stay from the first pass to the second, beside residuals."""
        return 0

    @abstractmethod
    def kernels(self) -> str:
        """Operands, kernels and tiles, in one line."""

    def describe(self) -> str:
        """Regime, operands and tiles."""
        return f"triton: regime {self.name}, {self.kernels()}"

    def explain(self, chunk_rows: int) -> list[str]:
        """Regime, tiles, sweeps over the features, peak memory, and the reasons."""
        problem, plan = self.problem, self.plan
        rows = min(chunk_rows, problem.rows)
        stored = self.stores_residuals and plan.keep_residual
        kept = self.state_bytes() + (plan.residual_bytes if stored else 0)
        peak = kept + self.fixed_bytes() + rows * self.row_bytes()
        peak += _GRADIENT_BYTES * problem.weight.numel()
        if problem.streamed:
            row = problem.dim * problem.features.dtype.itemsize
            peak += min(plan.resident_bytes, row * problem.rows) + 2 * rows * row
        return [
            self.describe(),
            *self.reasons,
            f"features read {self.feature_reads} times in all; at most about "
            f"{peak / 2**20:.1f} MiB beyond inputs and results",
        ]

    def tile(self, kernel: str, pick: Callable[[], Any]) -> Any:
        """Return the tile that ``pick`` gave when this job first launched ``kernel``."""
        if kernel not in self._tiles:
            self._tiles[kernel] = pick()
        return self._tiles[kernel]

    @cached_property
    def heads(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K * C, D) in the dtype of the operands, and bias (K * C,) in float32 or None."""
        problem = self.problem
        weight = problem.weight.reshape(-1, problem.dim).to(self.operand).contiguous()
        return weight, None if problem.bias is None else problem.bias.reshape(-1).contiguous()

    @cached_property
    def float_heads(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K, C, D) and bias (K, C) in float32 for kernels that split or round them."""
        bias = self.problem.bias
        return self.problem.weight.contiguous(), None if bias is None else bias.contiguous()

    @cached_property
    def narrow_heads(self) -> tuple[Tensor, Tensor | None]:
        """The heads with as many rows as cuBLAS has its newest kernels for, see `padded`."""
        weight, bias = self.heads
        return padded(weight), bias

    def begin_second(self, mean_grad: Tensor, mean_bias_grad: Tensor | None) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        super().begin_second(mean_grad, mean_bias_grad)
        gradient = mean_grad.reshape(-1, self.problem.dim).to(self.operand).contiguous()
        bias = None if mean_bias_grad is None else mean_bias_grad.reshape(-1).contiguous()
        #: G (K * C, D) in the dtype of the operands, and its bias part (K * C,) or None.
        self.gradient = gradient, bias

    @cached_property
    def lost(self) -> Tensor:
        """(rows,) float32: what rounding the stored residuals of a row took from its |r|^2."""
        return torch.empty(self.problem.rows, device=self.problem.device)


def chunk_bytes(device: torch.device) -> int:
    """Bytes that a chunk may take on a device: ``CHUNK_BYTES``, and an eighth of its memory.

    A power of two, so that GPUs that differ by what their driver keeps cut the rows alike.
    """
    most = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    if device.type != "cuda" or not torch.cuda.is_available():
        return most
    share = torch.cuda.get_device_properties(device).total_memory // _CHUNK_SHARE
    return min(most, 1 << max(0, share.bit_length() - 1))


def operand_dtype(problem: Problem) -> torch.dtype:
    """Return the dtype in which this problem's features enter the products."""
    if problem.precision == "medium" and problem.features.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def operand_name(problem: Problem) -> str:
    """Return what cuBLAS multiplies: bfloat16, tf32 or float32."""
    if operand_dtype(problem) == torch.bfloat16:
        return "bfloat16"
    return "float32" if problem.precision == "highest" else "tf32"


def padded(heads: Tensor) -> Tensor:
    """``heads`` (C, D) with rows of zeros up to a multiple of 8.

    cuBLAS has kernels of the newest kind only for results whose rows begin at multiples of 16
    bytes: the logits of 100 classes took 1.7 times as long as those of 104 on an H200.
    """
    missing = -heads.shape[0] % 8
    return torch.nn.functional.pad(heads, (0, 0, 0, missing)) if missing else heads


def tile_shape(tile: Any) -> str:
    """Rows x classes x D block, and warps, of a ``moso_fast.kernels.tiles.Tile``."""
    return f"{tile.rows} x {tile.classes} x {tile.dim}, {tile.num_warps} warps"


@cache
def limits_of(device: torch.device) -> Limits:
    """Return the limits of a CUDA device; of compute capability 9.0 where there is none."""
    if device.type != "cuda":
        return Limits(_SHARED_BYTES_OF_90, (9, 0))
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Limits(shared, torch.cuda.get_device_capability(device))


def kernel_targets(problem: Problem, rows: slice) -> Tensor:
    """Labels or targets of the rows as the kernels read them: contiguous, floating if soft."""
    labels = problem.labels[rows]
    if problem.soft_labels and not labels.is_floating_point():
        labels = labels.to(torch.float32)
    return labels.contiguous()


def kernel_weights(problem: Problem, rows: slice) -> Tensor | None:
    """Sample weights of the rows, contiguous, or None."""
    return None if problem.sample_weight is None else problem.sample_weight[rows].contiguous()


def capturing(problem: Problem) -> bool:
    """Whether this runs under CUDA graph capture, where nothing may wait for the device."""
    return problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor version of the Triton that is imported."""
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
