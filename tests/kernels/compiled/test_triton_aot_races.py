"""No copy overwrites what the tensor cores still read, in any shipped tile, on sm_90."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import aot_few_classes  # noqa: E402
import aot_products  # noqa: E402
import aot_row_tiles  # noqa: E402
import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402
from aot_races import overwritten_operands  # noqa: E402

pytestmark = pytest.mark.quick(1)

CASES = [
    case
    for cases in (
        aot_products.product_cases(),
        aot_few_classes.cases(),
        aot_row_tiles.plain_cases(),
        aot_row_tiles.row_tiles_cases(),
    )
    for case in cases
    if 90 in case.architectures
]


@triton.jit
def both_ways_kernel(x, w, out, K: tl.constexpr, BOTH: tl.constexpr):
    """A product of (64, K) and (K, 64); BOTH: and the squares of its left operand."""
    row, column, k = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 64)
    z = tl.zeros([64, 64], tl.float32)
    squares = tl.zeros([64, 64], tl.float32)
    for start in range(0, K, 64):
        left = tl.load(x + row[:, None] * K + start + k[None, :])
        right = tl.load(w + (start + k)[:, None] * 64 + column[None, :])
        if BOTH:
            squares += left.to(tl.float32) * left.to(tl.float32)
        z = tl.dot(left, right, z)
    tl.store(out + row[:, None] * 64 + column[None, :], z + squares)


def compiled(both: bool) -> str:
    types = {"x": "*bf16", "w": "*bf16", "out": "*fp32"}
    constants = {"K": 512, "BOTH": both}
    options = {"arch": 90, "num_warps": 4, "num_stages": 3, "divisible": tuple(types)}
    return compile_kernel(both_ways_kernel, types, constants, **options).ttgir


def test_the_fault_is_found_where_it_is() -> None:
    assert overwritten_operands(compiled(both=False)) == []
    assert "2 buffers, 2 copies ahead" in str(overwritten_operands(compiled(both=True)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rings_are_long_enough(case) -> None:
    assert overwritten_operands(case.compile(90).ttgir) == []
