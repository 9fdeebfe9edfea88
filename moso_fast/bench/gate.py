"""A regression gate that rests on counts and on ratios inside one run, never on absolute times.

Three kinds of numbers: instructions of the C++ passes under valgrind's callgrind (exact, so that
a few per cent can be held; valgrind shows programs a processor with AVX2), PyTorch operations and
Python calls of one small scoring call, and the speed ratio to plain PyTorch. What a machine
cannot count (no valgrind, no C++ module, another compiler or torch) is skipped by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import last_layer_stats
from ..backends import choose
from ..core import engine
from ..core.problem import build_problem
from ..util import native as util_native
from ..util.files import atomic_path
from .cases import CASES, Case
from .inputs import make_inputs
from .measure import interleaved
from .providers import providers_for
from .providers.ours import OURS

__all__ = ["Finding", "check", "count_calls", "count_instructions", "measure", "ratio", "write"]

# Classes that take each of the two code paths, with rows and columns that leave rests.
_JOBS = {"c10": (10, 200, 130), "c100": (100, 200, 130)}
# Instructions and calls may grow by this share before the gate fails.
TOLERANCES = {"instructions": 0.03, "calls": 0.10}
# The least ratio to plain PyTorch in chunks: far under what quiet machines show (2 and more), so
# that only a lost kernel fails, not a busy machine.
LEAST_RATIOS = {"c10-d512": 1.3, "c100-d512": 1.0}
_REPEATS = (1, 21)
_RIVAL = "chunks of 2048"
_ROUNDS = 11
_ATTEMPTS = 3


@dataclass(frozen=True)
class Finding:
    """One number held against its bound."""

    name: str
    measured: float
    bound: float
    passed: bool
    why: str


def count_instructions(classes: int, dim: int, rows: int, **job: Any) -> tuple[float, str] | str:
    """Instructions of one first and one second pass, and the instruction set; or why not.

    Two runs that differ in their repeats are subtracted, so that Python's start drops out.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return "valgrind is not installed"
    native = util_native.load_native("_cpu")
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
                str(Path(__file__).with_name("_gate_child.py")),
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
            raise RuntimeError(f"_gate_child.py: {(words or ['no message'])[-1]}")
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
    jobs = {
        p.name: p.prepare(case, inputs) for p in providers_for(case) if p.name in (OURS, _RIVAL)
    }
    for job in jobs.values():
        job()
    times = interleaved(jobs, rounds)
    return statistics.median(
        times[_RIVAL][number] / times[OURS][number] for number in range(rounds)
    )


def measure(tick: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Everything the gate holds, with what it depends on; numbers it cannot have are reasons."""
    instructions: dict[str, Any] = {}
    for name, sizes in _JOBS.items():
        tick(f"instructions, {name}")
        found = count_instructions(*sizes)
        instructions[name] = found if isinstance(found, str) else round(found[0])
        if not isinstance(found, str):
            instructions[f"{name}_instruction_set"] = found[1]
    tick("calls")
    return {
        "compiler": str(util_native.build_info().get("cxx", "unknown")),
        "torch": torch.__version__,
        "instructions": instructions,
        "calls": count_calls(),
        "least_ratios": LEAST_RATIOS,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Keep what :func:`measure` found as the bounds of later runs."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check(
    path: Path, tick: Callable[[str], None] = lambda _: None, ratios: bool = True
) -> tuple[list[Finding], list[str]]:
    """Measure now and hold it against the file.

    Returns
    -------
    tuple
        Findings, and what was skipped with the reason.

    Raises
    ------
    ValueError
        The file is no gate.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        least, kept_calls = held["least_ratios"], held["calls"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no gate file of moso-fast bench: {error}") from None
    found = measure(tick)
    findings, skipped = _hold_instructions(held, found)
    if held["torch"] == found["torch"]:
        for name, kept in kept_calls.items():
            findings.append(_at_most("calls", name, found["calls"][name], kept))
    else:
        skipped.append(f"calls: counted with torch {held['torch']}, this is {found['torch']}")
    if not util_native.load_native("_cpu").module:
        skipped.append("ratios: the C++ backend is not built")
        ratios = False
    for name, bound in least.items() if ratios else ():
        tick(f"ratio, {name}")
        findings.append(_hold_ratio(CASES[name], bound))
    return findings, skipped


def _hold_instructions(
    held: dict[str, Any], found: dict[str, Any]
) -> tuple[list[Finding], list[str]]:
    findings, skipped = [], []
    for name in _JOBS:
        kept, now = held["instructions"].get(name), found["instructions"][name]
        sets = [d["instructions"].get(f"{name}_instruction_set") for d in (held, found)]
        if isinstance(now, str) or not isinstance(kept, int):
            why = now if isinstance(now, str) else "the file has no number"
            skipped.append(f"instructions of {name}: {why}")
        elif held["compiler"] != found["compiler"] or sets[0] != sets[1]:
            skipped.append(
                f"instructions of {name}: counted with {held['compiler']} and {sets[0]}, "
                f"this is {found['compiler']} and {sets[1]}"
            )
        else:
            findings.append(_at_most("instructions", name, now, kept))
    return findings, skipped


def _at_most(kind: str, name: str, now: float, kept: float) -> Finding:
    bound = kept * (1 + TOLERANCES[kind])
    change = f"{now / kept - 1:+.1%} against the committed {kept:,}"
    return Finding(f"{kind}, {name}", now, bound, now <= bound, change)


def _hold_ratio(case: Case, bound: float) -> Finding:
    best = 0.0
    for _ in range(_ATTEMPTS):  # other work on the machine can only take away
        best = max(best, ratio(case))
        if best >= bound:
            break
    return Finding(f"ratio, {case.name}", best, bound, best >= bound, f"times as fast as {_RIVAL}")


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
