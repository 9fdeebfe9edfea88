"""What a job may keep: shares of the memory, to the byte, on machines that are made up."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import random_case

from moso_fast.core import memory
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem

GPU = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 80 GiB of which some are free; the driver is told which device it is asked about."""
    state = SimpleNamespace(free=10 * GIB, held={}, reserved=0, total=80 * GIB, capturing=False)

    def of_gpu(answer: Any) -> Any:
        def asked(device: torch.device) -> Any:
            assert device == GPU
            return answer()

        return asked

    answers = {
        "mem_get_info": of_gpu(lambda: (state.free, state.total)),
        "memory_stats": of_gpu(lambda: state.held),
        "memory_reserved": of_gpu(lambda: state.reserved),
        "get_device_properties": of_gpu(lambda: SimpleNamespace(total_memory=state.total)),
        "is_current_stream_capturing": lambda: state.capturing,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(memory, "_last_budget", {})
    return state


def on_gpu(rows: int, streamed: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """What the plan asks of a job with 5 classes, 2 heads and 7 columns."""
    return SimpleNamespace(
        rows=rows, heads=2, classes=5, dim=7, device=GPU, streamed=streamed,
        compute_dtype=torch.float32, features=torch.empty(0, dtype=dtype),
    )  # fmt: skip


def test_of_main_memory_a_quarter(monkeypatch) -> None:
    physical = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_003}
    monkeypatch.setattr(os, "sysconf", physical.__getitem__)
    monkeypatch.setattr(os, "sysconf_names", physical)
    assert memory._cpu_budget.__wrapped__() == 1_000_003 * 1024
    monkeypatch.setattr(os, "sysconf_names", {"SC_PAGE_SIZE": 1})
    assert memory._cpu_budget.__wrapped__() == GIB
    monkeypatch.delattr(os, "sysconf")
    assert memory._cpu_budget.__wrapped__() == GIB
    monkeypatch.setattr(memory, "_cpu_budget", lambda: 77)
    assert memory.residual_budget(torch.device("cpu")) == 77


def test_of_a_gpu_half_of_what_is_free_and_never_less_than_half_a_gib(gpu) -> None:
    for free, budget in ((10 * GIB, 5 * GIB), (GIB + 2, GIB // 2 + 1), (GIB - 2, GIB // 2)):
        gpu.free = free
        assert memory.residual_budget(GPU) == budget == memory._last_budget[GPU]


def test_what_pytorch_holds_and_does_not_use_is_free(gpu) -> None:
    assert memory._free_bytes(GPU) == 10 * GIB  # before the first allocation there are no counts
    counts = {"reserved": 9, "active": 5, "inactive_split": 1}
    for name, size in counts.items():
        gpu.held[f"{name}_bytes.all.current"] = size
        gpu.held[f"{name}_bytes.all.peak"] = gpu.held[name] = 1000
    assert memory._free_bytes(GPU) == 10 * GIB + 3
    gpu.held["inactive_split_bytes.all.current"] = 7  # counted between two moments
    assert memory._free_bytes(GPU) == 10 * GIB


def test_under_capture_the_last_answer_holds_unless_pytorch_has_taken_more(gpu) -> None:
    gpu.capturing = True
    for reserved, last, budget in (
        (30 * GIB, None, 25 * GIB),
        (30 * GIB, 7 * GIB, 7 * GIB),
        (72 * GIB, 7 * GIB, 4 * GIB),
        (80 * GIB, 7 * GIB, GIB // 2),
        (30 * GIB, 1, GIB // 2),
    ):
        gpu.reserved = reserved
        memory._last_budget.clear()
        memory._last_budget[torch.device("cuda", 1)] = 3 * GIB  # of another one
        if last is not None:
            memory._last_budget[GPU] = last
        assert memory.residual_budget(GPU) == budget


def test_features_from_main_memory_get_what_residuals_and_a_chunk_leave(gpu) -> None:
    gpu.free = 10 * GIB
    assert memory.resident_budget(GPU, 0) == 5 * GIB  # 0.8 of 10, less 3
    assert memory.resident_budget(GPU, 2 * GIB + 5) == 3 * GIB - 5
    assert memory.resident_budget(GPU, 6 * GIB) == 0


def test_plans_of_jobs_on_a_gpu(gpu) -> None:
    a_row = 2 * 5 * 4
    few = GIB // 2 // a_row
    kept = memory.make_plan(on_gpu(few), None)
    assert kept == Plan(None, True, few * a_row, GIB // 2, 0)
    gpu.free = 2 * GIB
    rows = 3 * few
    assert memory.make_plan(on_gpu(rows), None) == Plan(None, False, rows * a_row, GIB, 0)
    # Residuals that are not kept leave their room to the features.
    gpu.free = 20 * GIB
    for rows, keep in ((2 * few, True), (30 * few, False)):
        plan = memory.make_plan(on_gpu(rows, streamed=True), None)
        resident = 13 * GIB - (rows * a_row if keep else 0)
        assert plan == Plan(None, keep, rows * a_row, 10 * GIB, resident)
    assert memory.make_plan(on_gpu(10, streamed=True), 3) == Plan(3, False, 400, 0, 0)


def test_residuals_are_counted_in_the_dtype_of_results() -> None:
    for dtype, item in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        problem = build_problem(*random_case("ids", n=11, c=3, heads=2, dtype=dtype).args)
        assert memory.make_plan(problem, None).residual_bytes == 11 * 3 * 2 * item
        assert memory.make_plan(problem, 4) == Plan(4, False, 11 * 3 * 2 * item, 0, 0)


def test_rows_of_a_chunk() -> None:
    """As the caller says; else what the backend takes, of streamed features 256 MiB at most."""
    passes: Any = SimpleNamespace(chunk_rows=10**9)
    plan = Plan(None, True, 0, 0)
    job = on_gpu(10**9, streamed=True)
    assert memory.rows_at_a_time(job, replace(plan, chunk_size=6), passes) == 6
    assert memory.rows_at_a_time(job, plan, passes) == 2**28 // 28
    half = on_gpu(10**9, streamed=True, dtype=torch.float16)
    assert memory.rows_at_a_time(half, plan, passes) == 2**28 // 14
    passes.chunk_rows = 1000
    assert memory.rows_at_a_time(job, plan, passes) == 1000
    job.streamed, job.dim = False, 2**40
    assert memory.rows_at_a_time(job, plan, passes) == 1000
    job.streamed = True
    assert memory.rows_at_a_time(job, plan, passes) == 1
    memory.check_chunk_size(1)
