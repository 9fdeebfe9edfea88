"""Two small cases in place of the registry's; the source tree's ``benches`` on the path."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moso_fast.bench import cases, runner
from moso_fast.bench.providers import registered

# Last, so that plain `pytest` still tests the installed moso_fast.
sys.path.append(str(Path(__file__).resolve().parents[2]))

TINY = replace(cases.CASES["c10-d512"], name="tiny", small=48, full=96, dim=16)
HEAVY = replace(TINY, name="tiny-heavy", heavy=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Sequence[cases.Case]:
    """Two cases of milliseconds and settings to match; no ceilings to wait for."""
    monkeypatch.setattr(cases, "CASES", {c.name: c for c in (TINY, HEAVY)})
    monkeypatch.setattr("moso_fast.bench.store.CASES", cases.CASES)
    quick = {"least": 2, "most": 2, "budget": 0.0, "memory_limit": 30.0}
    monkeypatch.setattr(
        runner.Settings,
        "of_profile",
        classmethod(lambda cls, profile, **o: cls(profile, **{**quick, **o})),
    )
    roof = {"read_bytes": 1e10, "flops": 1e11, "mm_flops": 5e10, "bf16_flops": 2e11}
    monkeypatch.setattr(runner, "ceilings", lambda device, dtype: roof)

    def without_compiling(case: cases.Case, registry: str) -> list:
        return [p for p in registered(registry) if p.takes(case) and not p.compiles]

    monkeypatch.setattr(runner, "providers_for", without_compiling)
    return TINY, HEAVY


class Clock:
    """Seconds that pass when something is said to take them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def takes(self, seconds, result=None):
        def job():
            self.now += seconds
            return result

        return job


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)
