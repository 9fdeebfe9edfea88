"""Every tile of the rows kernel compiles without spills, for tensor cores, within its budget.

So do row norms, row dots and column sums. ``python tests/support/aot_row_tiles.py`` prints the
table, with more variants.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from aot_products import ProductCase, instructions, spilled, sums_leave_tensor_cores
from aot_row_tiles import column_cases, plain_cases, row_tiles_cases

pytestmark = pytest.mark.quick(1)

CASES = (
    [
        pytest.param(case, arch, id=f"{case.name}-sm_{arch}")
        for case in row_tiles_cases()
        for arch in case.architectures
    ]
    + [
        # No kernel that only reads rows needs more of float16 than of bfloat16.
        pytest.param(case, arch, id=f"{case.name}-sm_{arch}")
        for case in column_cases()
        for arch in (case.architectures if "fp16" not in case.name else (90,))
    ]
    + [
        # Class ids, nothing optional: fewer masks, other code.
        pytest.param(case, 90, id=f"{case.name}-{case.tile.num_warps}-sm_90")
        for case in plain_cases()
    ]
)


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_keeps_to_its_budget_and_uses_tensor_cores(case: ProductCase, arch: int) -> None:
    used = case.compile(arch)
    assert not spilled(used), f"spills {used.stack} bytes"
    assert used.registers <= case.tile.registers
    assert used.shared <= case.tile.shared_bytes
    if "PRECISION" not in case.constants:  # no product
        return
    if arch == 90:
        assert case.tile.instruction in instructions(used.cubin)
    if case.constants["PRECISION"] == "tf32x3" and not case.constants["ROUND"]:
        assert sums_leave_tensor_cores(used.ttgir)
