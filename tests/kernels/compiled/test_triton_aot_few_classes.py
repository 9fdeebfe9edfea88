"""Every tile of the kernels for few classes compiles without spills and within its budget.

``python tests/support/aot_few_classes.py`` prints the table, with more variants.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from aot import ARCHITECTURES
from aot_few_classes import cases
from aot_products import ProductCase, instructions, sums_leave_tensor_cores

pytestmark = pytest.mark.quick(1)

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
CASES = [
    pytest.param(case, arch, id=f"{case.name}-sm_{arch}")
    for case in cases()
    if case.since <= VERSION
    for arch in ARCHITECTURES
] + [
    # One head of class ids, nothing optional: fewer masks, other code.
    pytest.param(case, 90, id=f"{case.name}-sm_90")
    for case in cases(plain=True)
    if case.since <= VERSION
    if case.name.startswith("first") and "unaligned" not in case.name
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
