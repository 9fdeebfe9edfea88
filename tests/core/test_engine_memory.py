"""When a GPU's driver is asked how much memory is free, and how a captured call is planned.

A device must be named for this, not be there: fake tensors have one without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import chunk_rows, random_case
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.backends import get
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.core import engine, memory
from moso_fast.core.passes import Plan
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.verdict import Reading
from moso_fast.functional import explain

GIB = 2**30


@contextmanager
def on_gpu(classes: int, rows: int = 2**20, host: bool = False) -> Iterator[Problem]:
    """A problem on a GPU with 4 MiB of residuals a class; features elsewhere with ``host``."""
    with FakeTensorMode():
        features = torch.empty(rows, 8, device="cpu" if host else "cuda")
        labels = torch.empty(rows, dtype=torch.long, device="cuda")
        yield build_problem(features, torch.empty(classes, 8, device="cuda"), labels)


class Gpu:
    """80 GiB of memory; counts how often the driver is asked how much is free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reserved, self.capturing, self.asked = 70 * GIB, 0, False, 0
        total = SimpleNamespace(total_memory=80 * GIB)
        for name, answer in (
            ("mem_get_info", lambda device=None: (self._ask(self.free), 80 * GIB)),
            ("memory_stats", lambda device=None: self._ask({})),
            ("memory_reserved", lambda device=None: self.reserved),
            ("get_device_properties", lambda device=None: total),
            ("is_current_stream_capturing", lambda: self.capturing),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(memory, "_last_budget", {})

    def _ask(self, answer: Any) -> Any:
        assert not self.capturing, "a query that may fail the capture"
        self.asked += 1
        return answer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def plan_of(problem: Problem, chunk_size: int | None = None) -> Plan:
    plan = memory.make_plan(problem, chunk_size)
    TritonBackend("blas").prepare(problem, plan)  # asks nobody anything else
    return plan


def test_nobody_asks_what_is_free_for_few_residuals(gpu) -> None:
    gpu.free = 0
    with on_gpu(classes=128) as problem:
        plan = plan_of(problem)
        assert plan.keep_residual and plan.residual_bytes == plan.budget_bytes == GIB // 2
        assert gpu.asked == 0
    with on_gpu(classes=129) as problem:
        plan = plan_of(problem)
        assert not plan.keep_residual and gpu.asked > 0
        assert plan.budget_bytes == memory.residual_budget(problem.device) == GIB // 2


def test_nobody_asks_what_is_free_for_chunks_that_the_caller_fixed(gpu) -> None:
    with on_gpu(classes=4096) as problem:
        assert chunk_rows("torch", problem, 1000) == 1000
    assert gpu.asked == 0


def test_explain_says_the_whole_budget(gpu) -> None:
    with on_gpu(classes=128) as problem:
        text = explain(problem.features, problem.weight, problem.labels, backend="torch")
    assert "residuals kept between the passes (512.0 MiB); budget 35840 MiB" in text


@pytest.mark.parametrize("classes", [128, 8 * 1024, 9 * 1024])
def test_a_captured_call_is_planned_like_its_warm_up(gpu, classes) -> None:
    """35 GiB of 70 free ones: 32 fit, 36 do not, although half of the whole GPU would take them."""
    with on_gpu(classes) as problem:
        warm_up = plan_of(problem)
        assert warm_up.keep_residual == (classes < 9 * 1024)
        gpu.capturing, gpu.reserved = True, 2 * GIB  # what the warm-up has returned
        assert plan_of(problem) == warm_up


def test_a_captured_call_does_not_count_on_memory_that_is_gone(gpu) -> None:
    with on_gpu(classes=8 * 1024) as problem:
        assert plan_of(problem).budget_bytes == 35 * GIB
        gpu.capturing, gpu.reserved = True, 60 * GIB
        plan = plan_of(problem)
        assert (plan.keep_residual, plan.budget_bytes) == (False, 10 * GIB)
        gpu.reserved = 80 * GIB
        assert plan_of(problem).budget_bytes == GIB // 2


def test_a_captured_call_without_warm_up_asks_pytorch_alone(gpu) -> None:
    gpu.capturing, gpu.reserved = True, 10 * GIB
    with on_gpu(classes=9 * 1024) as problem:
        plan = plan_of(problem)
        assert not plan.keep_residual and plan.budget_bytes == 35 * GIB


def test_features_in_main_memory_are_refused_under_capture_and_nobody_is_asked(gpu) -> None:
    gpu.capturing = True
    refused = pytest.raises(ValueError, match=r"^features must be on cuda:0 under CUDA graph")
    with on_gpu(classes=4096, host=True) as problem, refused:
        engine.run(problem, get("torch"))


def test_when_the_host_reads(gpu) -> None:
    case = random_case("ids")
    assert engine._reading(build_problem(*case.args)) is Reading.AT_ONCE
    with on_gpu(classes=4, rows=8) as problem:
        assert engine._reading(problem) is Reading.TOGETHER
        gpu.capturing = True
        assert engine._reading(problem) is Reading.NEVER
    gpu.capturing = False
    with on_gpu(classes=4, rows=8, host=True) as problem:
        assert problem.asynchronous and engine._reading(problem) is Reading.AT_ONCE
