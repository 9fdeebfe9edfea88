"""Every kernel once, in Triton's interpreter: what plain pytest sees of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import FOLDER, child_environment

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def test_every_kernel_and_regime(tmp_path: Path) -> None:
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton"]
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            *options,
            "-k",
            "matches_float64 or every_loss",
            str(FOLDER),
        ],
        cwd=tmp_path,
        env=child_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-4000:]
    passed = re.search(r"^(\d+) passed", child.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 60, child.stdout[-2000:]


def test_every_file_of_the_folder_is_run() -> None:
    """In a process of its own: nobody else collects them."""
    runners = "".join(file.read_text() for file in FOLDER.parent.glob("test_*.py"))
    run = set(re.findall(r'"(test_\w+\.py)"', runners))
    assert {file.name for file in FOLDER.glob("test_*.py")} - run == set()
