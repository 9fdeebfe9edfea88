"""benches/gpu_check.py on this machine's CPU: it ends, says what it skipped, and counts errors."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moso_fast.backends import Availability

BENCHES = Path(__file__).resolve().parents[1] / "benches"


@pytest.fixture
def gpu_timing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module("gpu_timing")


def test_quick_run_without_a_gpu(tmp_path: Path) -> None:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--quick", "--out", str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stdout + child.stderr
    for name in ("build", "tests/gpu", "memcheck", "timing"):
        assert f"--- {name}: skipped, " in child.stdout
    assert "nothing above is a GPU measurement" in child.stdout
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["dry_run"] and report["conditions"]["gpu"] is None
    assert report["conditions"]["torch"] == torch.__version__
    rows = report["timing"]["rows"]
    assert {row["contender"] for row in rows} >= {"torch", "eager"}
    assert {row["precision"] for row in rows} == {"highest", "high", "medium"}
    for row in rows:
        assert row["problem"] is None, row
        assert row["milliseconds"] > 0 and len(row["all_milliseconds"]) == 2
        assert 0 <= row["relative_error"] < 0.1


def test_a_wrong_result_gets_no_number(gpu_timing, monkeypatch) -> None:
    honest = gpu_timing.naive

    def wrong(*data):
        loss, alignment, norms = honest(*data)
        return loss, 1.01 * alignment, norms

    def silent(*data):
        return tuple(value * float("nan") for value in honest(*data))

    device = torch.device("cpu")
    roof = dict.fromkeys(("read", "copy", *gpu_timing.OURS), 1e9)
    for broken in (wrong, silent):
        monkeypatch.setattr(gpu_timing, "naive", broken)
        found = gpu_timing.time_row(
            (300, 10, 16), torch.float32, device, roof, float("inf"), compiled=False, rounds=2
        )
        for contender in found:
            if contender.name == "eager" and contender.precision == "highest":
                assert contender.problem.startswith("wrong: ") and not contender.seconds
            elif contender.ours:
                assert not contender.problem and len(contender.seconds) == 2


def test_floor_is_the_longer_of_reading_and_multiplying(gpu_timing) -> None:
    contender = gpu_timing.Contender("x", "medium", torch.bfloat16, gpu_timing.naive, False)
    roof = {"read": 4e12, "copy": 3e12, "medium": 8e14}
    few = gpu_timing.floor_seconds((1_280_000, 10, 512), contender, roof)
    assert few == pytest.approx(2 * 1_280_000 * 512 * 2 / 4e12)
    many = gpu_timing.floor_seconds((1_280_000, 1000, 2048), contender, roof)
    assert many == pytest.approx(6 * 1_280_000 * 1000 * 2048 / 8e14)


def test_a_stage_that_hangs_is_ended_with_its_children(gpu_timing, tmp_path: Path) -> None:
    gpu_check = importlib.import_module("gpu_check")
    mark = tmp_path / "still-alive"
    script = f"sh -c 'sleep 3; touch {mark}' & echo started; wait"
    done = gpu_check.stage("hang", ["sh", "-c", script], limit=1.0)
    assert done["outcome"] == "failed: not done within 1 s" and done["last"] == ["started"]
    assert gpu_check.stage("bad", ["sh", "-c", "exit 3"], limit=5.0)["outcome"] == "failed"
    assert gpu_check.stage("good", ["true"], limit=5.0)["outcome"] == "passed"
    time.sleep(2.5)
    assert not mark.exists()


def test_a_graph_is_captured_once_for_each_set_of_tensors(gpu_timing, monkeypatch) -> None:
    """Every later call replays, and nothing is captured before it ran once."""
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph):
        events.append("capture")
        yield
        events.append("captured")

    def work(features):
        events.append("run")
        return (features, features, features)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    run, one, two = gpu_timing.Graphed(work), torch.ones(3), torch.zeros(3)
    first = ["run", "wait", "capture", "run", "captured", "replay"]
    for data in (one, one, two, one, two):
        assert run(data)[0] is data
    assert events == [*first, "replay", *first, "replay", "replay"]


def test_checks_cover_the_cuda_kernels_with_three_tools(gpu_timing, monkeypatch) -> None:
    gpu_check = importlib.import_module("gpu_check")
    for available in (True, False):
        found = {"cuda": Availability(available, "pretended")}
        monkeypatch.setattr(gpu_check, "backends", lambda found=found: found)
        checks = {name: rest for name, *rest in gpu_check.checks(["pytest"])}
        names = {"cuda memcheck", "cuda racecheck", "cuda initcheck"} if available else set()
        assert set(checks) == names | {"memcheck"}
        for name in names:
            tool, _, command, environment = checks[name]
            assert name == f"cuda {tool}" and gpu_check.CUDA_TESTS in command
            # Filled memory would hide what initcheck looks for.
            assert ("MOSO_FAST_RAW_MEMORY" in environment) == (tool == "initcheck")
    assert (BENCHES.parent / gpu_check.CUDA_TESTS).is_file()


def test_a_check_that_the_clock_cuts_short_is_no_failure(gpu_timing, monkeypatch) -> None:
    gpu_check = importlib.import_module("gpu_check")
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.5)
    start = time.monotonic()
    cut = gpu_check.bounded("cut", ["sleep", "9"], 30.0, start + 1.0)
    assert cut["outcome"].startswith("cut short")
    hung = gpu_check.bounded("hung", ["sleep", "9"], 0.5, start + 60.0)
    assert hung["outcome"].startswith("failed")
    late = gpu_check.bounded("late", ["false"], 30.0, start)
    assert late["outcome"] == "skipped"
