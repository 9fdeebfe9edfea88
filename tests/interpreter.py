"""Run a test file of tests/interpreted in a child process with Triton's interpreter on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(file: str, cwd: Path, *, select: str | None = None) -> None:
    """Run ``file``; fail with the child's report unless every test in it passed.

    ``file`` is in tests/interpreted, or a test file of this folder with ``select``, pytest's
    expression for the tests to run, of which some may skip.
    The child imports what this process would: the search path goes along, and ``cwd`` is an
    empty folder, so that neither the source tree nor an installed package slips in.
    """
    environment = dict(
        os.environ,
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
    )
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    path = FOLDER / file if select is None else FOLDER.parent / file
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton"]
    chosen = [] if select is None else ["-k", select]
    child = subprocess.run(
        [sys.executable, "-c", command, *options, *chosen, str(path)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    report = child.stdout[-8000:] + child.stderr[-4000:]
    assert child.returncode == 0, report
    assert re.search(r"^\d+ passed", child.stdout, re.MULTILINE), report
    if select is None:
        assert not re.search(r"\d+ (skipped|deselected|xfailed)", child.stdout), report
