"""Timing, ceilings and energy, with a clock and GPUs that do as they are told."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from moso_fast.bench import energy, measure


def test_seconds_of_a_call(clock, monkeypatch) -> None:
    assert measure.timed(clock.takes(2.0, "x")) == (2.0, "x")
    waits = []

    def synchronize(device):  # what the GPU had to do before, and what the job gave it
        waits.append(device)
        clock.now += 10 if len(waits) == 1 else 3

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert measure.timed(clock.takes(2.0, "x"), "cuda:1") == (5.0, "x")
    assert waits == ["cuda:1", "cuda:1"]


def test_rounds_that_fit_the_budget() -> None:
    assert measure.plan_rounds(0.3, 1.0, 1, 20) == 3
    assert measure.plan_rounds(0.3, 1.0, 4, 20) == 4
    assert measure.plan_rounds(0.3, 1.0, 1, 2) == 2
    assert measure.plan_rounds(0.0, 1.0, 1, 20) == 20
    assert measure.plan_rounds(0.0, 1e-3, 1, 10**12) == pytest.approx(10**6, abs=1)


def test_rounds_of_jobs(clock) -> None:
    jobs = {"a": clock.takes(1.0), "b": clock.takes(2.0)}
    ticks = []
    times = measure.interleaved(jobs, 3, tick=lambda: ticks.append(clock.now))
    assert times == {"a": dict.fromkeys(range(3), 1.0), "b": dict.fromkeys(range(3), 2.0)}
    assert ticks == [103.0, 106.0, 109.0]
    assert measure.medians({"a": {0: 5.0, 1: 1.0, 4: 2.0}, "b": {3: 7.0}}) == {"a": 2.0, "b": 7.0}
    measure.interleaved(jobs, 1, warm_up=True)
    assert clock.now == 109 + 2 * 3
    assert measure.interleaved({}, {}) == {}
    spread = measure.interleaved(jobs, {"a": 5, "b": 2})
    assert list(spread["a"]) == [0, 1, 2, 3, 4] and list(spread["b"]) == [2, 4]
    assert measure.interleaved(jobs, {"a": 0, "b": 1}) == {"a": {}, "b": {0: 2.0}}


def test_jobs_on_a_gpu_are_waited_for(clock, monkeypatch) -> None:
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    measure.interleaved({"a": clock.takes(1.0)}, 2, "cuda:1")
    assert waits == ["cuda:1"] * 4


def test_quartiles() -> None:
    assert measure.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert measure.quartiles([4.0, 2.0]) == (2.5, 3.0, 3.5)
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0]) == (1.75, 2.5, 3.25)
    with pytest.raises(ValueError, match=r"^quartiles need at least one value$"):
        measure.quartiles([])


@pytest.fixture
def known_seconds(monkeypatch):
    """Small products, whose seconds are given by name; what ran is kept."""
    seconds = {"sum": 4.0, "dot": 2.0, "mv": 3.0, "mm": 0.5, "onednn": 0.25}
    ran = []

    def medians(jobs, device):
        results = {name: job() for name, job in jobs.items()}
        ran.append((device, results))
        return {name: seconds[name] for name in jobs}

    monkeypatch.setattr(measure, "_medians", medians)
    monkeypatch.setattr(measure, "_MATRIX", 64)
    monkeypatch.setattr(measure, "_PROBE", 16)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**16)
    return ran


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_ceilings_are_bytes_and_operations_by_the_fastest_way(known_seconds, monkeypatch) -> None:
    ran = known_seconds
    work = 2 * 64**3
    assert measure.ceilings() == {"read_bytes": 2**15, "flops": work / 0.25, "mm_flops": work / 0.5}
    (device, reads), (_, products) = ran
    assert device == "cpu" and set(reads) == {"sum", "dot", "mv"}
    # All bytes are read: 2**14 numbers, each of them one.
    assert float(reads["sum"]) == float(reads["dot"]) == float(reads["mv"].sum()) == 2**14
    assert reads["mv"].shape == (16,)
    ours, theirs = products["mm"], products["onednn"].to_dense()
    assert ours.shape == theirs.shape == (64, 64)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert measure.ceilings()["flops"] == work / 0.5


def test_ceilings_of_16_bits(known_seconds, monkeypatch) -> None:
    """By a small product, and by the large one where the processor has units for it."""
    ran = known_seconds
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = measure.ceilings(dtype=torch.float16)
    assert found["bf16_flops"] == 2 * 16**3 / 0.5  # a 64th of the others': far below a quarter
    assert [set(results) for _, results in ran] == [{"sum", "dot", "mv"}, {"mm"}, {"mm"}]
    narrow = ran[-1][1]["mm"]
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (16, 16)
    assert ran[1][1]["mm"].dtype == torch.float32
    rate, sides = [], []
    monkeypatch.setattr(
        measure,
        "_narrow_rate",
        lambda a, b, device: sides.append((*a.shape, *b.shape)) or rate[-1],
    )
    quarter = 2 * 64**3 / 0.5 / 4
    for found, expected in ((quarter, [(16,) * 4]), (quarter + 1, [(16,) * 4, (64,) * 4])):
        sides.clear()
        rate.append(found)
        assert measure.ceilings(dtype=torch.bfloat16)["bf16_flops"] == found
        assert sides == expected
    assert "bf16_flops" not in measure.ceilings(dtype=torch.float64)


def test_a_ceiling_is_the_median_of_a_few_rounds_after_one_more(clock, monkeypatch) -> None:
    calls = []
    job = clock.takes(2.0)
    assert measure._medians({"a": lambda: calls.append(job())}, "cpu") == {"a": 2.0}
    assert len(calls) == 1 + measure._CEILING_ROUNDS


def test_energy_is_counted_over_whole_calls_with_waits_at_both_ends(clock) -> None:
    used, waits = [0.0], []

    def job():
        clock.now += 0.2
        used[0] += 3.0

    def wait():
        waits.append(clock.now)
        used[0] += 100.0 if len(waits) == 1 else 0.0  # what ran before is not counted

    assert energy.joules_per_call(job, lambda: used[0], wait) == 3.0
    assert [round(at, 1) for at in waits] == [100.0, 100.2, 100.4, 100.6]  # half a second
    assert energy.joules_per_call(job, lambda: used[0], seconds=0.1) == 3.0


def test_the_counter_of_a_gpu(monkeypatch) -> None:
    asked = []
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: asked.append("init"),
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption={"handle": 4500}.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(uuid=f"of {device}"),
    )
    counter = energy.gpu_energy_counter("cuda:1")
    assert asked == ["init", "GPU-of cuda:1"] and counter() == 4.5  # NVML counts millijoules
    del nvml.nvmlDeviceGetTotalEnergyConsumption  # a GPU older than Volta
    assert energy.gpu_energy_counter("cuda:1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.gpu_energy_counter("cuda:1") is None
