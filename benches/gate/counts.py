"""What the gate counts: instructions, operations and calls, and one ratio of times."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from moso_fast import last_layer_stats
from moso_fast.backends import choose
from moso_fast.bench.cases import CASES, Case
from moso_fast.bench.inputs import make_inputs
from moso_fast.bench.measure import interleaved
from moso_fast.bench.providers import providers_for
from moso_fast.bench.providers.ours import OURS
from moso_fast.core import engine
from moso_fast.core.problem import build_problem
from moso_fast.util.native import load_native

__all__ = ["RIVAL", "count_calls", "count_instructions", "ratio"]

RIVAL = "chunks of 2048"  # of plain PyTorch
_REPEATS = (1, 21)
_ROUNDS = 11


def count_instructions(classes: int, dim: int, rows: int, **job: Any) -> tuple[float, str] | str:
    """Instructions of one first and one second pass, and the instruction set; or why not.

    Two runs that differ in their repeats are subtracted, so that Python's start drops out.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return "valgrind is not installed"
    native = load_native("_cpu")
    if native.module is None or native.module.__file__ is None:
        return native.reason or "the C++ module is not a file"
    totals = []
    variant = ""
    for repeats in _REPEATS:
        sizes = json.dumps(
            {"classes": classes, "dim": dim, "rows": rows, "repeats": repeats, **job}
        )
        child = subprocess.run(
            [
                valgrind,
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                sys.executable,
                "-SB",
                str(Path(__file__).with_name("child.py")),
                native.module.__file__,
                sizes,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # or Python's own start would differ
        )
        found = re.search(r"I\s+refs:\s+([\d,]+)", child.stderr)
        if found is None:
            last = (child.stderr.splitlines() or ["no output"])[-1]
            return f"valgrind does not work here: {last}"
        if child.returncode:  # never a skip: the gate must follow the module's interface
            words = [line for line in child.stderr.splitlines() if not line.startswith("==")]
            raise RuntimeError(f"benches/gate/child.py: {(words or ['no message'])[-1]}")
        totals.append(int(found[1].replace(",", "")))
        variant = child.stdout.strip()
    return (totals[1] - totals[0]) / (_REPEATS[1] - _REPEATS[0]), variant


def count_calls() -> dict[str, int]:
    """PyTorch operations and Python calls of one scoring call of 64 rows."""
    inputs = make_inputs(CASES["c10-d512"], 64)
    problem = build_problem(*inputs.head)
    backend = choose(problem)[0]
    last_layer_stats(*inputs.head)
    with _CountedOperations() as operations:  # below the operator, which hides what it calls
        engine.run(problem, backend)
    with _counted_calls() as calls:
        last_layer_stats(*inputs.head)
    return {"operations": operations.count, "python_calls": calls[0]}


class _CountedOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def ratio(case: Case, rounds: int = _ROUNDS) -> float:
    """Time of plain PyTorch in chunks over ours, median over rounds of one run."""
    inputs = make_inputs(case, case.small)
    jobs = {p.name: p.prepare(case, inputs) for p in providers_for(case) if p.name in (OURS, RIVAL)}
    for job in jobs.values():
        job()
    times = interleaved(jobs, rounds)
    return statistics.median(times[RIVAL][number] / times[OURS][number] for number in range(rounds))


@contextmanager
def _counted_calls() -> Iterator[list[int]]:
    """Count calls of Python functions of this package and what it calls."""
    count = [0]

    def see(frame: Any, event: str, argument: Any) -> None:
        count[0] += event == "call"

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield count
    finally:
        sys.setprofile(before)
