"""Tests of the core that run every backend, with the Triton backend in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

# Left out, each with its reason: the interpreter keeps the program it runs in global variables
# (simultaneous), products by BLAS on a CPU round by the number of threads (thread_counts), and
# the others take it many seconds: thousands of rows, or dozens of shapes that the folder
# interpreted has in its own way, or they test what the kernels have no part in.
LEFT_OUT = (
    "simultaneous",
    "thread_counts",
    "many_rows",
    "own_chunk",
    "expanded_features",
    "offending_row_counts",
    "equals_explicit",
    "shapes_off_every_tile",
    "torch_compile",
    "opcheck",
    "empty_input",
    "views_give",
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file",
    [
        "test_engine.py",
        "test_engine_verdict.py",
        "test_engine_waits.py",
        "test_functional.py",
        "test_operator.py",
    ],
)
def test_in_interpreter(file: str, tmp_path: Path) -> None:
    run_interpreted(file, tmp_path, select=f"triton and not ({' or '.join(LEFT_OUT)})")
