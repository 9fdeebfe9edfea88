"""Holds what :mod:`.counts` finds against the numbers of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moso_fast.bench.cases import CASES, Case
from moso_fast.util.files import atomic_path
from moso_fast.util.native import build_info, load_native

from . import counts

__all__ = ["LEAST_RATIOS", "TOLERANCES", "Finding", "check", "measure", "read", "write"]

# Classes, columns and rows: both code paths, with a tail of rows and of columns in each.
_JOBS = {"c10": (10, 200, 130), "c100": (100, 200, 130)}
# Instructions and calls may grow by this share before the gate fails.
TOLERANCES = {"instructions": 0.03, "calls": 0.10}
# The least ratio to plain PyTorch in chunks: far under what quiet machines show (2 and more), so
# that only a lost kernel fails, not a busy machine.
LEAST_RATIOS = {"c10-d512": 1.3, "c100-d512": 1.0}
_ATTEMPTS = 3
_FIELDS = ("compiler", "torch", "instructions", "calls", "least_ratios")  # of the file


@dataclass(frozen=True)
class Finding:
    """One number held against its bound."""

    name: str
    measured: float
    bound: float
    passed: bool
    why: str


def measure(tick: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Everything the gate holds, with what it depends on; numbers it cannot have are reasons."""
    instructions: dict[str, Any] = {}
    for name, sizes in _JOBS.items():
        tick(f"instructions, {name}")
        found = counts.count_instructions(*sizes)
        instructions[name] = found if isinstance(found, str) else round(found[0])
        if not isinstance(found, str):
            instructions[f"{name}_instruction_set"] = found[1]
    tick("calls")
    return {
        "compiler": str(build_info().get("cxx", "unknown")),
        "torch": torch.__version__,
        "instructions": instructions,
        "calls": counts.count_calls(),
        "least_ratios": LEAST_RATIOS,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Keep what :func:`measure` found as the bounds of later runs."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write` has written.

    Raises
    ------
    OSError
        No such file.
    ValueError
        It is no gate file.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no gate file of moso_fast: {error}") from None
    missing = [name for name in _FIELDS if not isinstance(held, dict) or name not in held]
    if missing:
        raise ValueError(f"{path} is no gate file of moso_fast: it lacks {', '.join(missing)}")
    return dict(held)


def check(
    held: dict[str, Any], tick: Callable[[str], None] = lambda _: None
) -> tuple[list[Finding], list[str]]:
    """Measure now and hold it against what :func:`read` returned.

    Returns
    -------
    tuple
        Findings, and what was skipped with the reason.
    """
    found = measure(tick)
    findings, skipped = _hold_instructions(held, found)
    if held["torch"] == found["torch"]:
        for name, kept in held["calls"].items():
            findings.append(_at_most("calls", name, found["calls"][name], kept))
    else:
        skipped.append(f"calls: counted with torch {held['torch']}, this is {found['torch']}")
    built = load_native("_cpu").module is not None
    if not built:
        skipped.append("ratios: the C++ backend is not built")
    for name, bound in held["least_ratios"].items() if built else ():
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
        best = max(best, counts.ratio(case))
        if best >= bound:
            break
    return Finding(
        f"ratio, {case.name}", best, bound, best >= bound, f"times as fast as {counts.RIVAL}"
    )
