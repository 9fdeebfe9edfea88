"""The product kernels (gradient sum, alignments) in Triton's interpreter.

test_truncation.py has every kernel with a matrix product do its sums as tensor cores do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file",
    [
        "test_gradient_sum.py",
        "test_stored_alignment.py",
        "test_stacked_alignment.py",
        "test_truncation.py",
    ],
)
def test_in_interpreter(file: str, tmp_path: Path) -> None:
    run_interpreted(file, tmp_path)
