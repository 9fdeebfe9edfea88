"""The tests that need a GPU, file by file, and compute-sanitizer over the small ones."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...build import cuda_program
from ..worker import Skipped, stream_child

ROOT = Path(__file__).resolve().parents[4]
CUDA_TESTS = "tests/gpu/test_gpu_cuda.py"
PROCESSES = 12
TEST_SECONDS = 20  # of one test: it is named, and the others go on
# Processes side by side: none takes all cores for itself.
ALONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
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
    others = [
        {
            "name": f"memcheck {Path(name).stem}",
            "tool": "memcheck",
            "tests": [name, "-k", "small and (ids or bfloat16 or rows)"],
            "environment": apart,
            "informs": False,
        }
        for name in files()
        if name != CUDA_TESTS
    ]
    return [*found, *others]


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Run pytest, under compute-sanitizer where the unit names a tool; failures raise."""
    prefix: list[str] = []
    if "tool" in unit:
        program = cuda_program("compute-sanitizer")
        if program is None:
            raise Skipped("compute-sanitizer is not installed")
        prefix = [program, "--tool", unit["tool"], "--error-exitcode", "9"]
    together: list[str] = []
    if unit.get("together") and installed("xdist"):
        together = ["-n", str(PROCESSES)]
        if installed("pytest_timeout"):
            # By a thread: a signal is heard when the call that hangs returns.
            together += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    junit = Path(unit["scratch"], f"{unit['name'].replace('/', '-').replace(' ', '-')}.xml")
    command = [*prefix, *PYTEST, "-v", "-rfE", *together, f"--junitxml={junit}", *unit["tests"]]
    environment = {**os.environ, **ALONE, **unit.get("environment", {})}
    seen = Seen(emit)
    code = stream_child(command, seen.line, cwd=ROOT, env=environment)
    counts, failed = outcome(junit) if junit.exists() else ({}, [])
    emit(**counts, failed=failed[:50])
    if code == 9 and prefix:
        raise RuntimeError(f"{unit['tool']} has found something; the log has it")
    if code or failed:  # also where nothing was found to run
        named = ", ".join(name for name, _ in failed[:3])
        raise RuntimeError(f"{len(failed)} failed: {named}" if failed else f"exit {code}")


class Seen:
    """What pytest -v says of each test, as it says it: a run that is killed writes no more."""

    _LINE = re.compile(r"\b(PASSED|FAILED|ERROR)\b")
    _NAME = re.compile(r"(\S+::\S+)")

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit, self._passed, self._failed = emit, 0, list[str]()

    def line(self, text: str) -> None:
        """Count one line; emit what failed at once, and how many passed now and then."""
        said, name = self._LINE.search(text), self._NAME.search(text)
        if said is None or name is None or text.startswith(("FAILED", "ERROR")):
            return  # the last: pytest's summary, which repeats
        if said[1] == "PASSED":
            self._passed += 1
            if self._passed % 20 == 0:
                self._emit(passed_so_far=self._passed)
        else:
            self._failed.append(name[1].rpartition("/")[2])
            self._emit(failed_so_far=self._failed[:50])


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
