"""Operands of the matrix products: in which precision they enter, and what a launch may address.

float32 tiles are multiplied on the tensor cores as tf32 (one product; ten digits of mantissa) or
as three of them (``tf32x3``, float32-accurate to 3e-7). ``ieee`` products on tiles of this size
spill kilobytes of registers. bfloat16 tiles are multiplied as they are. Accumulators are float32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCTS = {"highest": "tf32x3", "high": "tf32x3", "medium": "tf32"}
# Rows of one float32 partial sum, at most: the errors of equal rows add up. The sums of tf32x3
# products leave the tensor cores, which cut off, after every block of rows (aot_products.py in
# tests looks), and are rounded: in 128 blocks of 16 rows they lose 4e-6 at most, in 512 2e-5. Other
# products stay there for the whole slab and lose 6e-5 at most, less than their operands did.
MOST_ROWS = {"highest": 2048, "high": 8192, "medium": 8192}


@triton.jit
def as_operand(x, ROUND: tl.constexpr, UPCAST: tl.constexpr):
    """Return ``x`` as an operand of tl.dot: bfloat16 if ROUND, else float32.

    What is loaded in a loop for a product must not be used there for anything else, such as a norm
    or a sum: the tensor cores of an H100 read it in shared memory while the loop goes on, and for
    a tile that goes to registers too Triton (3.6 and 3.9) keeps one buffer less than that takes:
    the next copy overwrites what is still being read. test_triton_aot_races.py looks for it.

    UPCAST, for the interpreter, whose bfloat16 arithmetic is wrong: the rounded values in float32.
    """
    if ROUND:
        x = x.to(tl.bfloat16)
        if UPCAST:
            x = x.to(tl.float32)
        return x
    else:
        return x.to(tl.float32)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def input_precision(precision: str) -> str:
    """Return what tl.dot calls the products of float32 tiles at this ``precision``.

    Raises
    ------
    ValueError
        ``precision`` is not one of ``"highest"``, ``"high"``, ``"medium"``.
    """
    if precision not in _PRODUCTS:
        known = ", ".join(_PRODUCTS)
        raise ValueError(f"precision must be one of {known}; got {precision!r}")
    return _PRODUCTS[precision]


def products_of(dtype: torch.dtype, precision: str) -> str:
    """Return how features of this dtype are multiplied: ``"bf16"``, ``"tf32"`` or ``"tf32x3"``."""
    if dtype == torch.bfloat16 and precision == "medium":
        return "bf16"
    return input_precision(precision)


def capability_major(device: torch.device) -> int:
    """Return the major compute capability if tests compile for it, else 8, the most modest."""
    if device.type != "cuda":
        return 8
    major = torch.cuda.get_device_capability(device)[0]
    return major if major in (8, 9, 10) else 8


def describe(tensor: Tensor) -> str:
    """Shape and dtype, for error messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_matrix(
    name: str,
    value: Tensor,
    shape: tuple[int | None, int | None],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless ``value`` is such a matrix with unit column stride.

    None in ``shape`` allows any length. Any row stride is addressed, 0 (expanded) included.
    """
    expected = tuple("any" if length is None else length for length in shape)
    fits = value.dim() == 2 and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits or value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {expected} and one of {known}; got {describe(value)}")
    if value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(f"{name} must have unit column stride, got strides {value.stride()}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with features, got {value.device}")


def check_vector(
    name: str, value: Tensor | None, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless ``value`` is None or a contiguous vector of this kind."""
    if value is None:
        return
    if value.shape != (length,) or value.dtype != dtype or not value.is_contiguous():
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be a contiguous ({length},) {kind}; got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with features, got {value.device}")


def aligned(matrix: Tensor) -> bool:
    """Whether every row of ``matrix`` begins at a multiple of 16 bytes and is so long."""
    item = matrix.element_size()
    numbers = (matrix.data_ptr(), item * matrix.stride(0), item * matrix.shape[1])
    return all(number % 16 == 0 for number in numbers)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of the columns of ``x``.

    An accumulator used half by half needs half the registers for what it is multiplied with.
    """
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
