"""The tests that need a GPU, file by file, and compute-sanitizer over the small ones."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...build import cuda_program
from ..worker import Skipped, run_child

ROOT = Path(__file__).resolve().parents[4]
CUDA_TESTS = "tests/gpu/test_gpu_cuda.py"
PROCESSES = 12
TEST_SECONDS = 60  # of one test: it is named, and the others go on
# The project's own settings, less what asks for a plugin that may be missing where the GPU is.
SETTINGS = ("-o", "addopts=--strict-markers", "-p", "no:cacheprovider")
PYTEST = (sys.executable, "-m", "pytest", *SETTINGS)


def files() -> list[str]:
    """Return the files of tests/gpu, that of the CUDA kernels first."""
    found = sorted(f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    return sorted(found, key=lambda name: name != CUDA_TESTS)


def installed(name: str) -> bool:
    """Whether a plugin of pytest is there."""
    return importlib.util.find_spec(name) is not None


def checks(cuda: bool) -> list[dict[str, Any]]:
    """Describe the checks of compute-sanitizer; ``cuda``: whether the CUDA kernels are there.

    What racecheck and initcheck report may be in bulk copies, which they do not know, or in
    PyTorch's kernels: they are there to be read.
    """
    # Without PyTorch's pool every tensor is an allocation of its own, with watched borders.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    kernels = [CUDA_TESTS, "-k", "small"]
    raw = {**apart, "MOSO_FAST_RAW_MEMORY": "1"}  # filled memory would hide reads of nothing
    of_cuda = [
        ("memcheck", apart, False),
        ("racecheck", {}, True),
        ("initcheck", raw, True),
    ]
    found = [
        {"name": f"cuda {tool}", "tool": tool, "tests": kernels, "environment": e, "informs": i}
        for tool, e, i in (of_cuda if cuda else ())
    ]
    others = ["tests/gpu", f"--ignore={CUDA_TESTS}", "-k", "small"]
    rest = {"name": "memcheck", "tool": "memcheck", "tests": others, "environment": apart}
    return [*found, {**rest, "informs": False}]


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Run pytest, under compute-sanitizer where the unit names a tool; failures raise."""
    prefix: list[str] = []
    if "tool" in unit:
        program = cuda_program("compute-sanitizer")
        if program is None:
            raise Skipped("compute-sanitizer is not installed")
        prefix = [program, "--tool", unit["tool"], "--error-exitcode", "9"]
    together: list[str] = []
    if not prefix and unit["gpu"] and installed("xdist"):
        # Tests of one group, those that take most of the memory, run one after the other.
        together = ["-n", str(PROCESSES), "--dist", "loadgroup"]
    if installed("pytest_timeout"):
        together += ["--timeout", str(TEST_SECONDS)]
    junit = Path(unit["scratch"], f"{unit['name'].replace('/', '-').replace(' ', '-')}.xml")
    command = [*prefix, *PYTEST, "-v", "-rfE", *together, f"--junitxml={junit}", *unit["tests"]]
    environment = {**os.environ, **unit.get("environment", {})}
    code = run_child(command, cwd=ROOT, env=environment)
    counts, failed = outcome(junit) if junit.exists() else ({}, [])
    emit(**counts, failed=failed[:50])
    if code == 9 and prefix:
        raise RuntimeError(f"{unit['tool']} has found something; the log has it")
    if code not in (0, 5) or failed:
        named = ", ".join(name for name, _ in failed[:3])
        raise RuntimeError(f"{len(failed)} failed: {named}" if failed else f"exit {code}")


def outcome(junit: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return counts of a run, and name and first line of what failed."""
    counts = {"tests": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        counts["tests"] += 1
        counts["skipped"] += case.find("skipped") is not None
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                first = (found.get("message") or "").strip().splitlines()[:1]
                failed.append((str(case.get("name")), first[0][:200] if first else kind))
    return counts, failed
