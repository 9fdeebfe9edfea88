"""Every shipped configuration compiles for every architecture, without spills, within its budget.

No device is needed: ptxas and cuobjdump come with Triton. ``python tests/support/aot.py`` prints
the whole table.
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from aot import ARCHITECTURES, Case, Resources, compile_kernel, residual_cases

FULL = [case for case in residual_cases() if case.name.endswith(("full", "narrow"))]
PLAIN = [case for case in residual_cases() if case.name.endswith("IDS-plain")]


def check(case: Case, arch: int) -> Resources:
    used = case.compile(arch)
    assert used.stack == 0, f"{case.name} spills {used.stack} bytes on sm_{arch}"
    assert used.registers <= case.config.registers, f"{case.name}, sm_{arch}: {used.registers}"
    assert used.shared <= case.config.shared_bytes, f"{case.name}, sm_{arch}: {used.shared}"
    return used


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_fullest_variant_keeps_to_its_budget(case: Case, arch: int) -> None:
    check(case, arch)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_plain_variant_is_lean_and_moves_16_bytes_at_a_time(case: Case) -> None:
    ptx = check(case, 90).ptx
    if case.constants["CLASSES"] >= 128:
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert re.search(r"st\.global\S*\.v4\.b32", ptx)


def test_logarithm_is_the_accurate_one() -> None:
    # log1p stands on the relative accuracy of tl.log near 1, which lg2.approx does not have.
    for case in residual_cases():
        if case.name.endswith("full") and case.config.max_classes == 32:
            assert "lg2.approx" not in case.compile(90).ptx


def test_barrier_lies_between_reading_and_overwriting() -> None:
    # In Triton's own code, before layout changes add barriers of theirs that may come and go.
    case = next(c for c in PLAIN if c.kernel.__name__.startswith("softmax"))
    code = case.compile(90).ttgir
    before = code[: code.index("tt.store")]
    assert "barrier" in before[before.rindex("tt.load") :]


def test_spills_are_seen() -> None:
    # The gate itself must be able to fail: a row of 16384 logits in one tile spills.
    case = next(c for c in FULL if c.config.max_classes == 8192 and c.name.endswith("full"))
    constants = {**case.constants, "CLASSES": 16383, "BLOCK_CLASSES": 16384}
    used = compile_kernel(case.kernel, case.types, constants, arch=90, num_warps=32)
    assert used.stack > 0


def test_tile_covers_the_block() -> None:
    # With fewer elements than threads, two threads would hold, and overwrite, the same logit.
    for case in residual_cases():
        config = case.config
        assert config.block_rows * config.block_classes >= 32 * config.num_warps
        assert config.max_classes is None or config.max_classes <= config.block_classes
