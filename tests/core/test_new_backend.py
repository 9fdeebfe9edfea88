"""What it takes to add a backend: one file, one line of registry, and the tests know it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import child_environment

TESTS = Path(__file__).parent
BACKEND = TESTS.parent / "support" / "numpy_backend.py"
# Counts how often a device is waited for, and this has none; PyTorch's exponentials round by where
# threads cut an array.
LEFT_OUT = "reads_once or thread_counts"


@pytest.mark.exhaustive
def test_a_backend_in_one_file_passes_the_tests_of_every_backend(tmp_path: Path) -> None:
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "numpy_backend", "-p", "no:cacheprovider", "-m", "not gpu"]
    child = subprocess.run(
        [sys.executable, "-c", code, *options, "-k", f"numpy and not ({LEFT_OUT})", str(TESTS)],
        cwd=tmp_path,
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-4000:]
    passed = re.search(r"^(\d+) passed", child.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 700


def test_it_is_one_file_that_one_reads_at_a_glance() -> None:
    lines = BACKEND.read_text().splitlines()
    assert len(lines) < 100
