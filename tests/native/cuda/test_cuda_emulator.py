"""The emulator of the CUDA kernels finds mistakes."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]


@pytest.mark.parametrize(
    "fault, words",
    [
        ("race", "race: write after a read"),
        ("late write", "race: read after a write"),
        ("unwritten", "nobody wrote"),
        ("beyond shared memory", "is beyond 1024"),
        ("misaligned", "misaligned"),
        ("beyond the array", "not part of any array"),
        ("write to an input", "write to an address"),
        ("copy not waited for", "copy that is under way"),
        ("copy left under way", "ended with copies under way"),
        ("copy not published", "race: read after a write|nobody wrote"),
        ("lanes part ways", "waits for threads that never come"),
        ("different instructions", "different instructions"),
        ("barrier missed", "waits for threads that never come"),
        ("bulk not waited for", "bulk copy is under way|did not wait for"),
        ("bulk touched under way", "a bulk copy is under way"),
        ("bulk wrong parity", "a bulk copy is under way"),
        ("bulk waited for by others", "this thread did not wait for"),
        ("bulk without a fence", "not fenced"),
        ("bulk barrier unknown", "race|not yet known|no barrier"),
        ("bulk bytes missing", "waits for threads that never come"),
        ("bulk beyond the array", "not part of any array"),
        ("bulk left under way", "ended with copies under way"),
    ],
)
def test_emulator_reports(emulator, fault, words) -> None:
    numbers = torch.zeros(64)
    emulator.register_array(numbers.data_ptr(), 256, False)
    try:
        for right in ("none", "bulk without fault", "bulk without fault, half waits"):
            assert emulator.run_fault(right, numbers.data_ptr()) == ""
        report = emulator.run_fault(fault, numbers.data_ptr())
    finally:
        emulator.forget_arrays()
    assert any(part in report for part in words.split("|")), report
