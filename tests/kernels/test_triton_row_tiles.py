"""The rows kernel, row norms, row dots and column sums in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file",
    ["test_row_tiles.py", "test_row_tiles_operands.py", "test_row_norms.py", "test_row_dots.py"],
)
def test_in_interpreter(file: str, tmp_path: Path) -> None:
    run_interpreted(file, tmp_path)
