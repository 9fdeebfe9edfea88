"""Every tile of the product kernels compiles without spills, for tensor cores, within its budget.

``python tests/support/aot_products.py`` prints the table.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from aot_products import ProductCase, instructions, product_cases, sums_leave_tensor_cores

pytestmark = pytest.mark.quick(1)

CASES = [
    pytest.param(case, arch, id=f"{case.name}-sm_{arch}")
    for case in product_cases()
    for arch in (case.architectures if case.heaviest else (90,))
]


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_keeps_to_its_budget_and_uses_tensor_cores(case: ProductCase, arch: int) -> None:
    used = case.compile(arch)
    assert used.stack == 0, f"spills {used.stack} bytes"
    assert used.registers <= case.tile.registers
    assert used.shared <= case.tile.shared_bytes
    if arch == 90:
        assert case.tile.instruction in instructions(used.cubin)
    if case.constants["PRECISION"] == "tf32x3" and not case.constants["ROUND"]:
        assert sums_leave_tensor_cores(used.ttgir)
