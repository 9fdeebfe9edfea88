"""The residual kernels in Triton's interpreter: numbers, edges, bad input, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file",
    [
        "test_softmax_residual.py",
        "test_narrow_residual.py",
        "test_elementwise_residual.py",
        "test_residual_memory.py",
    ],
)
def test_in_interpreter(file: str, tmp_path: Path) -> None:
    run_interpreted(file, tmp_path)
