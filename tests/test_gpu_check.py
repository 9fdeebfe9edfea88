"""benches/gpu_check.py on this machine's CPU: it ends, says what it skipped, and counts errors."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
