"""What a regime of the Triton backend is: one way through the two passes, for some problems."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....core.problem import Problem

if TYPE_CHECKING:
    from ....core.engine import FirstPass, RowBuffers

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

# Major compute capabilities that tests/kernels/compiled/test_triton_aot*.py compile every tile for.
PROVEN_MAJORS = (8, 9, 10)


@dataclass(frozen=True)
class Limits:
    """What a device offers a block: bytes of shared memory, and its compute capability."""

    shared_bytes: int
    capability: tuple[int, int]

    @property
    def major(self) -> int:
        """Major capability whose tiles it takes: its own if tests compile for it, else 8."""
        return self.capability[0] if self.capability[0] in PROVEN_MAJORS else 8


class Regime(ABC):
    """First and second pass over a chunk, as :class:`moso_fast.backends.base.Backend` has them.

    Both passes of one job run in the same regime; the choice is made in ``choice.py``.
    """

    name: str
    #: Times the features are read from device memory, both passes together.
    feature_reads: int
    #: Whether it uses residuals that are kept between the passes.
    stores_residuals = True

    @abstractmethod
    def fits(self, problem: Problem) -> str | None:
        """Why this problem cannot run in this regime, or None."""

    @abstractmethod
    def row_bytes(self, problem: Problem) -> int:
        """Bytes of working memory that every row of a chunk takes."""

    def fixed_bytes(self, problem: Problem) -> int:
        """Bytes of working memory that a chunk takes whatever its rows: partial sums."""
        return 0

    def state_bytes(self, problem: Problem) -> int:
        """Bytes that stay from the first pass to the second, beside residuals."""
        return 0

    def chunk_rows(self, problem: Problem) -> int:
        """Rows whose working memory fits the chunk's budget."""
        return max(1, chunk_bytes(problem.device) // max(1, self.row_bytes(problem)))

    @abstractmethod
    def describe(self, problem: Problem) -> str:
        """Operands, kernels and tiles, in one line."""

    @abstractmethod
    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""

    @abstractmethod
    def second_pass(
        self,
        problem: Problem,
        rows: slice,
        out: RowBuffers,
        mean_grad: Tensor,
        mean_bias_grad: Tensor | None,
        residual: Tensor | None,
        alignment: Tensor,
    ) -> None:
        """See :class:`moso_fast.backends.base.Backend`."""


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
