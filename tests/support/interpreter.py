"""Child processes that import what this one does; test files under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import moso_fast

FOLDER = Path(__file__).parents[1] / "kernels" / "interpreted"


def child_environment(**variables: str) -> dict[str, str]:
    """Return an environment in which a child imports what this process would, plus ``variables``.

    The moso_fast that this process has imported comes first: of an installed package and a source
    tree on the search path, the child takes the one under test.
    """
    paths = [str(Path(moso_fast.__file__).parents[1]), *(path or os.getcwd() for path in sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def run_python(code: str, cwd: Path, *arguments: str) -> str:
    """Run ``code`` in a child of this kind in the empty folder ``cwd``; return what it printed."""
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def run_interpreted(file: str, cwd: Path, *, select: str | None = None) -> None:
    """Run ``file``; fail with the child's report unless every test in it passed.

    ``file`` is in tests/kernels/interpreted, or in tests/core with ``select``, pytest's expression
    for the tests to run, of which some may skip. All their parameter sets are run.
    ``cwd`` is an empty folder: the source tree does not slip in for the package under test.
    """
    environment = child_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    path = FOLDER / file if select is None else FOLDER.parents[1] / "core" / file
    options = [
        "-q",
        "--tb=short",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning:triton",
    ]
    chosen = [] if select is None else ["-k", select]
    # Each test is one thread's work, for seconds. Processes of pytest-xdist have the cores already.
    if importlib.util.find_spec("xdist") and "PYTEST_XDIST_WORKER" not in os.environ:
        options += ["-n", str(min(4, os.cpu_count() or 1)), "-p", "no:benchmark"]
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
