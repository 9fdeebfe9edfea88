"""What units of benches/gpu/check make of other programs: ncu, pytest, compute-sanitizer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def work(name: str) -> Any:
    return importlib.import_module(f"benches.gpu.check.work.{name}")


# --- Nsight Compute

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = (
    "ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    *(STALLED.format(name) for name in ("long_scoreboard", "selected", "barrier")),
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
COUNTERS = "\n".join(
    [
        "==PROF== Connected to process 4711",
        ",".join(f'"{name}"' for name in NAMES),
        '"","","ns","%","%","inst","inst","inst","%","register/thread"',
        '"0","first_pass(Job)","1,234,500","71.25","12.5","3.5","9.9","4.25","48.1","255"',
        '"1","second_pass(Job)","400,000","88","","1.0","9.9","0.5","","128"',
        "",
    ]
)


def test_counters_are_read_as_numbers() -> None:
    first, second = work("profile").kernels(COUNTERS)
    assert first == {
        "kernel": "first_pass(Job)",
        "microseconds": 1234.5,
        "dram_percent": 71.25,
        "tensor_percent": 12.5,
        "occupancy_percent": 48.1,
        "registers": 255.0,
        "grid": None,
        "stalls": [("barrier", 4.25), ("long_scoreboard", 3.5)],
    }
    assert second["dram_percent"] == 88.0 and second["tensor_percent"] is None
    assert work("profile").kernels("==ERROR== nothing was profiled") == []


def test_ncu_leaves_the_clocks_alone_and_its_failure_is_one(monkeypatch, tmp_path) -> None:
    profile = work("profile")
    job = {"stage": "calls", "shape": (300, 10, 16), "dtype": "float32", "precision": "highest"}
    unit = {"jobs": [{**job, "contender": "cuda"}]}
    command = profile.command("/usr/local/cuda/bin/ncu", unit, tmp_path / "c.csv")
    assert command[command.index("--clock-control") + 1] == "none"
    assert json.loads(command[-1])["jobs"][0]["contender"] == "cuda"
    fake = tmp_path / "ncu"
    fake.write_text(
        '#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\n'
        f"cat > \"$2\" <<'END'\n{COUNTERS}END\nexit ${{FAKE_NCU:-0}}\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(profile, "cuda_program", lambda name: str(fake))
    told: dict[str, Any] = {}
    profile.run(unit, lambda **data: told.update(data))
    assert [kernel["microseconds"] for kernel in told["kernels"]] == [1234.5, 400.0]
    assert told["counters 0"]["gpu__time_duration.sum"] == "1,234,500", "all, whatever its name"
    monkeypatch.setenv("FAKE_NCU", "9")
    with pytest.raises(RuntimeError, match="exit code 9"):
        profile.run(unit, lambda **data: None)


# --- tests and compute-sanitizer


def suite(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "test_made_up.py"
    path.write_text(text)
    return {"name": "made/up", "tests": [str(path)], "scratch": str(tmp_path)}


@pytest.mark.exhaustive
def test_a_lost_context_costs_the_tests_of_one_process_no_more(tmp_path, monkeypatch) -> None:
    """An error that stays with the process would fail every test behind it."""
    suites = work("suites")
    text = (ROOT / "tests" / "gpu" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(text)
    body = "import pytest\nLOST = []\n"
    body += "@pytest.mark.parametrize('n', range(6))\ndef test_a(n):\n"
    body += "    if n == 1: LOST.append(n)\n"
    body += "    if LOST: raise RuntimeError('CUDA error: an illegal memory access')\n"
    unit = suite(tmp_path, body) | {"together": True}
    monkeypatch.setattr(suites, "PROCESSES", 1)
    told: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="failed"):
        suites.run(unit, lambda **data: told.update(data))
    passed = told["tests"] - told["skipped"] - len(told["failed"])
    assert passed >= 4, told


@pytest.mark.exhaustive
def test_failing_tests_are_named_and_counted(tmp_path) -> None:
    text = "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2, 'not alike'\n"
    text += "@pytest.mark.skip\ndef test_c(): pass\n"
    told: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="1 failed: test_b"):
        work("suites").run(suite(tmp_path, text), lambda **data: told.update(data))
    assert (told["tests"], told["skipped"]) == (3, 1)
    assert told["failed"] == [("test_b", "AssertionError: not alike")]
    work("suites").run(suite(tmp_path, "def test_a(): pass\n"), lambda **data: told.update(data))
    assert told["tests"] == 1 and told["failed"] == []


def test_what_fails_is_said_before_the_end() -> None:
    """As pytest -v prints it, alone and in several processes; its summary says it again."""
    told: dict[str, Any] = {}
    seen = work("suites").Seen(lambda **data: told.update(data))
    for _ in range(20):
        seen.line("[gw3] [ 12%] PASSED tests/gpu/test_gpu_cuda.py::test_a[x y-1] ")
    seen.line("[gw1] [ 13%] FAILED tests/gpu/test_gpu_cuda.py::test_b[torch.float32]")
    seen.line("tests/gpu/test_gpu_cuda.py::test_c ERROR                    [ 14%]")
    seen.line("FAILED tests/gpu/test_gpu_cuda.py::test_b[torch.float32] - AssertionError")
    seen.line("E   RuntimeError: FAILED to launch")
    failed = ["test_gpu_cuda.py::test_b[torch.float32]", "test_gpu_cuda.py::test_c"]
    assert told == {"passed_so_far": 20, "failed_so_far": failed}


def test_a_file_without_a_test_is_a_failure(tmp_path) -> None:
    """A name that was changed must not pass for tests that passed."""
    with pytest.raises(RuntimeError, match="exit 5"):
        work("suites").run(suite(tmp_path, "def helper(): pass\n"), lambda **data: None)


@pytest.mark.exhaustive
def test_tests_run_where_a_plugin_of_this_project_is_missing(tmp_path, monkeypatch) -> None:
    """pyproject.toml has a setting of pytest-timeout, and asks to be strict about settings."""
    suites = work("suites")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # may ask for a plugin that is missing
    monkeypatch.setattr(suites, "installed", lambda name: False)
    monkeypatch.setattr(suites, "PYTEST", (*suites.PYTEST, "-p", "no:timeout", "-p", "no:xdist"))
    unit = suite(tmp_path, "def test_a(): pass\n")
    unit["tests"] += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    suites.run(unit, lambda **data: None)


def test_checks_cover_the_cuda_kernels_with_three_tools() -> None:
    suites = work("suites")
    for available in (True, False):
        checks = {each["name"]: each for each in suites.checks(available)}
        names = {"cuda memcheck", "cuda racecheck", "cuda initcheck"} if available else set()
        others = {"memcheck test_gpu_backends", "memcheck test_gpu_triton_regimes"}
        assert set(checks) == names | others
        for name in names:
            assert name == f"cuda {checks[name]['tool']}"
            assert suites.CUDA_TESTS in checks[name]["tests"]
            # Filled memory would hide what initcheck looks for.
            raw = "MOSO_FAST_RAW_MEMORY" in checks[name]["environment"]
            assert raw == (checks[name]["tool"] == "initcheck")
            assert checks[name]["informs"] == (checks[name]["tool"] != "memcheck")
        assert not any(checks[name]["informs"] for name in others)
    assert suites.files()[0] == suites.CUDA_TESTS and len(suites.files()) >= 3
    assert all((ROOT / name).is_file() for name in suites.files())


def test_what_the_sanitizer_finds_is_a_failure(tmp_path, monkeypatch) -> None:
    suites = work("suites")
    fake = tmp_path / "compute-sanitizer"
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setattr(suites, "cuda_program", lambda name: str(fake))
    unit = {**suite(tmp_path, ""), "tool": "memcheck"}
    with pytest.raises(RuntimeError, match="memcheck has found something"):
        suites.run(unit, lambda **data: None)


# --- the network


@pytest.mark.exhaustive
def test_a_wrong_network_gets_no_number(monkeypatch) -> None:
    network = work("network")
    honest = network.authors_loop
    monkeypatch.setattr(network, "authors_loop", lambda *data: 1.1 * honest(*data))
    told: dict[str, Any] = {}
    with pytest.raises(Exception, match=r"^ours"):
        network.run({"gpu": False}, lambda **data: told.update(data))
    assert told and "times_loop" not in told


def test_resnet_50_has_the_parameters_of_the_published_one() -> None:
    with torch.device("meta"):
        model = work("network").ResNet50(classes=1000)
    count = sum(p.numel() for p in model.parameters())
    # 25,557,032 with a 7 x 7 stem, which has 64 x 3 x (49 - 9) elements more.
    assert count == 25_557_032 - 64 * 3 * 40
