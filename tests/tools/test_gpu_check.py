"""benches/gpu/check: no fault of a unit costs another's result, and each run goes on from the last.

Most of it runs with fake_gpu_layer.py in place of the work: units that fail in every way.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check_support import ROOT, environment

START = (
    f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
    "from benches.gpu.check.main import main\n"
    "sys.exit(main(sys.argv[1:], 'fake_gpu_layer'))"
)
KINDS = ("triton", "cuda", "hang", "nan", "signal", "exit", "flood")
OUTCOMES = {
    "triton": ("failed", "OutOfResources: out of resource: shared memory, Required: 262144"),
    "cuda": ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    "hang": ("hung", "not done within 0.7 s; last line: working on "),
    "nan": ("wrong", "relative error nan, at most 0.01 is right"),
    "signal": ("died", "SIGSEGV; last line: working on "),
    "exit": ("died", "exit code 3; last line: terminate called without an active exception"),
    "flood": ("died", "SIGABRT; last line: PTX PTX"),
}


@pytest.fixture
def stages() -> tuple[str, ...]:
    return tuple(stage.name for stage in importlib.import_module("benches.gpu.check.stages").STAGES)


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", START, "--out", str(folder), *arguments]


def check(
    folder: Path, faults: dict[str, str] | None = None, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the check with the fake layer."""
    return subprocess.run(
        command(folder, *arguments),
        env=environment(folder, faults or {}, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def results(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "gpu_check.json").read_text())
    return {each["unit"]: each for each in report["results"]}


@pytest.mark.quick(1)
@pytest.mark.parametrize("gpu", ["Fake GPU", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_every_stage_costs_no_other_result(kind, gpu, stages, tmp_path) -> None:
    """Ten faults a run, one a stage; with a process for each unit, and with processes kept."""
    faults = {f"{stage} two": kind for stage in stages}
    done = check(tmp_path, faults, FAKE_GPU_NAME=gpu)
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(tmp_path)
    assert len(found) == 3 * len(stages)
    outcome, why = OUTCOMES[kind]
    for unit, result in found.items():
        if unit in faults:
            assert result["outcome"] == outcome and result["why"].startswith(why), result
            assert result["data"]["before"] and "after" not in result["data"]
            # Named where the stage stands and once more at the end.
            assert f"FAILED {unit}: {outcome}: {why}" in done.stdout
        else:
            assert result["outcome"] == "done" and result["data"]["after"], result
            assert result["data"]["milliseconds"] == 1.5
    table = (tmp_path / "tables.txt").read_text()
    for stage in stages:
        part = table.split(f"--- {stage}:")[1].split("---")[0].splitlines()
        lines = {line.split()[0]: line for line in part[1:] if line[:1].strip()}
        assert lines["two"].split(maxsplit=1)[1].startswith(f"{outcome}: {why}")
        assert "0." in lines["one"] and "0." in lines["three"]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum("begun" in line for line in lines) == len(found), "what fails is not tried again"
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {"results.jsonl", "gpu_check.json", "tables.txt", "log.txt"}
    assert sum(files.values()) < 8 * 2**20
    assert done.stdout.rstrip().endswith("nothing is left")


def test_a_wrong_or_failed_unit_has_no_row_and_no_aim(tmp_path) -> None:
    check(tmp_path, {"calls one": "nan", "calls two": "cuda"}, "--stage", "calls")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["rows"].keys() == {"calls three"}
    assert results(tmp_path)["calls one"]["data"]["milliseconds"] is None  # infinity is no number


def test_a_hung_unit_leaves_no_process(tmp_path) -> None:
    check(tmp_path, {"smoke two": "stray"}, "--stage", "smoke")
    assert results(tmp_path)["smoke two"]["outcome"] == "hung"
    assert not left_over(tmp_path)


def left_over(folder: Path) -> list[int]:
    """Processes that a check with results in ``folder`` has started, and that still run."""
    tag = f"FAKE_GPU_TAG={folder}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if tag in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.exhaustive
def test_the_next_run_does_what_was_not_done_and_nothing_else(stages, tmp_path) -> None:
    faults = {"kernels two": "signal", "calls three": "triton"}
    assert check(tmp_path, faults).returncode == 1
    before = results(tmp_path)
    again = check(tmp_path)
    assert again.returncode == 0 and f"going on with {tmp_path}, run 2" in again.stdout
    found = results(tmp_path)
    assert {unit for unit, result in found.items() if result["run"] == 1} == faults.keys()
    assert all(result["outcome"] == "done" for result in found.values())
    kept = {unit: result for unit, result in before.items() if unit not in faults}
    assert kept == {unit: result for unit, result in found.items() if unit not in faults}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    third = check(tmp_path, None, "--fresh")
    assert third.returncode == 0 and "going on" not in third.stdout
    assert {result["run"] for result in results(tmp_path).values()} == {2}
    all_lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all_lines[: len(lines)] == lines, "what was found once is never thrown away"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["FAKE_GPU_NAME", "FAKE_GPU_TORCH"])
def test_results_under_other_conditions_are_not_mixed(name, tmp_path) -> None:
    check(tmp_path, {"smoke one": "nan"}, "--stage", "smoke")
    other = check(tmp_path, None, "--stage", "smoke", **{name: "another"})
    assert other.returncode == 0 and "going on" not in other.stdout
    assert {result["run"] for result in results(tmp_path).values()} == {1}


def test_a_killed_run_loses_what_was_under_way_and_no_more(tmp_path) -> None:
    """Killed outright: its lines are there, its processes are not, the next run goes on."""
    child = subprocess.Popen(
        command(tmp_path, "--stage", "kernels"),
        env=environment(tmp_path, {"kernels two": "hang"}, FAKE_GPU_LIMIT="30"),
        stdout=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "log.txt", "working on kernels two")
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while left_over(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"run": 0, "stage": "kern')  # as if it had been killed while it wrote
    assert check(tmp_path, None, "--stage", "kernels").returncode == 0
    runs = {unit: result["run"] for unit, result in results(tmp_path).items()}
    assert runs == {"kernels one": 0, "kernels two": 1, "kernels three": 1}


def test_a_run_that_is_told_to_end_takes_its_processes_along(tmp_path) -> None:
    child = subprocess.Popen(
        command(tmp_path, "--stage", "kernels"),
        env=environment(tmp_path, {"kernels two": "stray"}, FAKE_GPU_LIMIT="30"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "log.txt", "working on kernels two")
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 128 + signal.SIGTERM
    assert not left_over(tmp_path)


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{text!r} never came")


@pytest.mark.exhaustive
def test_what_the_time_did_not_suffice_for_is_left_and_no_failure(stages, tmp_path) -> None:
    faults = {"smoke two": "hang", "smoke three": "hang"}
    first = check(tmp_path, faults, "--seconds", "8.5", FAKE_GPU_LIMIT="30")
    assert first.returncode == 0, first.stdout
    found = results(tmp_path)
    assert found["smoke two"]["outcome"] == "late"
    assert found["smoke two"]["why"].startswith("cut short after ")
    # Not even begun.
    assert (found["pruning one"]["outcome"], found["pruning one"]["why"]) == (
        "late",
        "the time is up",
    )
    left = re.search(r"to be done by another run: (\d+)", first.stdout)
    assert left and 3 * len(stages) - 11 < int(left[1]) < 3 * len(stages)
    second = check(tmp_path)
    assert second.returncode == 0 and second.stdout.rstrip().endswith("nothing is left")


@pytest.mark.exhaustive
def test_a_stage_has_its_share_and_goes_on_when_the_others_had_theirs(tmp_path) -> None:
    script = START.replace(
        "sys.exit(",
        "from benches.gpu.check import main as module, stages\n"
        "module.STAGES = (stages.Stage('kernels', '', 0.8), stages.Stage('calls', '', 60))\n"
        "sys.exit(",
    )
    command = [sys.executable, "-c", script, "--out", str(tmp_path)]
    given = environment(tmp_path, {}, FAKE_GPU_SECONDS="0.5", FAKE_GPU_LIMIT="30")
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    order = [line.split()[2:4] for line in done.stdout.splitlines() if line.endswith("  done")]
    # What runs when the share is over has its time; nothing more is begun.
    assert order[:2] == [["kernels", "one"], ["kernels", "two"]]
    assert [stage for stage, _ in order[2:5]] == ["calls"] * 3
    assert order[5:] == [["kernels", "three"]]
    assert done.stdout.rstrip().endswith("nothing is left")


@pytest.mark.exhaustive
def test_what_hangs_or_dies_twice_is_not_run_again(tmp_path) -> None:
    faults = {"kernels one": "hang", "kernels two": "signal"}
    done = check(tmp_path, faults, FAKE_GPU_CONTENDER="cuda")
    found = results(tmp_path)
    assert done.returncode == 1
    assert all(result["outcome"] == "done" for unit, result in found.items() if "smoke" in unit)
    for unit in ("kernels three", "calls one", "pruning three"):
        assert found[unit]["outcome"] == "skipped"
        assert found[unit]["why"] == "2 units of cuda have hung or died in this run"
    again = check(tmp_path, FAKE_GPU_CONTENDER="cuda")
    assert again.returncode == 0, "a fix gets another chance"
    assert {result["outcome"] for result in results(tmp_path).values()} == {"done"}


@pytest.mark.exhaustive
def test_results_of_another_folder_are_gone_on_with(tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    check(first, {"kernels two": "exit"}, "--stage", "kernels")
    done = check(second, None, "--stage", "kernels", "--continue", str(first))
    assert done.returncode == 0 and "run 2" in done.stdout
    runs = {unit: result["run"] for unit, result in results(second).items()}
    assert runs == {"kernels one": 0, "kernels two": 1, "kernels three": 0}
    absent = check(second, None, "--continue", str(tmp_path / "nowhere"))
    assert absent.returncode == 1 and "there is no results.jsonl in it" in absent.stderr


@pytest.mark.exhaustive
def test_a_table_that_cannot_be_made_ends_no_run(stages, tmp_path) -> None:
    """What is printed must never cost what is measured."""
    script = START.replace(
        "sys.exit(",
        "from benches.gpu.check import run as module\n"
        "made = module.table\n"
        "def table(stage, *rest):\n"
        "    return 1 / 0 if stage.name == 'kernels' else made(stage, *rest)\n"
        "module.table = table\n"
        "sys.exit(",
    )
    command = [sys.executable, "-c", script, "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=environment(tmp_path, {}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "FAILED table of kernels: failed: ZeroDivisionError: division by zero" in done.stdout
    found = results(tmp_path)
    assert found.pop("table of kernels")["outcome"] == "failed"
    assert {result["outcome"] for result in found.values()} == {"done"}
    assert len(found) == 3 * len(stages)


KERNEL = {"kernel": "first_pass", "launches": 1, "microseconds": 812.5}
FOUND_ON_A_GPU: dict[str, dict[str, Any]] = {
    "smoke": {"errors at 608": {"loss": 1e-7}, "errors at 20000": {"loss": 2e-7, "el2n": None}},
    "ceilings": {"read": 3.1e12, "copy": 3.0e12},
    "kernels": {
        "predicted_milliseconds": [0.5, 0.4],
        "first_milliseconds": 0.6,
        "all_milliseconds": {"first": [0.6], "second": [0.5]},
        "kernels": [KERNEL],
        "plans": [{"plan": "64 rows x 3 stages", "first_milliseconds": 0.7}],
        "few_classes_first,16,512": [
            {"tile": "Tile(16)", "milliseconds": 0.9, "default": True},
            {"tile": "Tile(32)", "why": "OutOfResources", "default": False},
        ],
    },
    "profile": {
        "kernels": [{**KERNEL, "dram_percent": 71.0, "tensor_percent": None, "stalls": []}],
        "counters 0": {"Kernel Name": "first_pass"},
    },
    "calls": {
        "milliseconds": 1.0,
        "predicted_milliseconds": 0.9,
        "graph_milliseconds": 0.95,
        "predicted_graph_milliseconds": 0.8125,
        "item_bytes": 2,
        "joules": 0.1,
    },
    "tests": {"tests": 60, "skipped": 1, "failed": [], "passed_so_far": 40},
    "compile": {"milliseconds": 2.0, "item_bytes": 2, "peak_bytes": 2**20},
    "sanitizer": {"tests": 30},
    "network": {"milliseconds_a_sample": {"ours": 0.2}, "times_loop": 40.0},
    "pruning": {"spearman_with_cpu": 1.0, "random": {"0.2": 0.8}},
}


def test_tables_are_made_of_what_a_gpu_gives(stages) -> None:
    """Predictions, graphs, tiles and counters are never there without one."""
    tables = importlib.import_module("benches.gpu.check.tables")
    record = importlib.import_module("benches.gpu.check.record")
    assert FOUND_ON_A_GPU.keys() == set(stages)
    text = {}
    for stage in importlib.import_module("benches.gpu.check.stages").STAGES:
        given = FOUND_ON_A_GPU[stage.name]
        found = [
            record.Result(stage.name, f"{stage.name} one", "", 0, "done", data=given),
            record.Result(stage.name, f"{stage.name} two", "", 0, "done", data={}),
            record.Result(stage.name, f"{stage.name} three", "", 0, "died", "SIGSEGV"),
        ]
        text[stage.name] = "\n".join(tables.table(stage, found, {}))
        assert "died: SIGSEGV" in text[stage.name]
    assert "few_classes_first: Tile(16) 0.9 ms; 64 rows x 3 stages: 0.7 ms" in text["kernels"]
    assert "dram 71%, tensor %, ?" in text["profile"] and "1.111" in text["calls"]
    assert "0.8125" in text["calls"]


@pytest.mark.exhaustive
def test_a_stage_that_cannot_be_planned_fails_alone(stages, tmp_path) -> None:
    done = check(tmp_path, FAKE_GPU_PLAN="profile")
    assert done.returncode == 1
    assert "FAILED profile plan: failed: KeyError: 'sm_90'" in done.stdout
    found = results(tmp_path)
    assert sum(result["outcome"] == "done" for result in found.values()) == 3 * (len(stages) - 1)


def test_a_machine_where_nothing_can_be_imported_is_told_why(tmp_path) -> None:
    done = check(tmp_path, FAKE_GPU_IMPORT="fails")
    assert done.returncode == 1
    assert "FAILED plan: died: exit code 1; last line: ImportError: libcuda.so.1" in done.stdout


def test_what_is_for_information_is_no_failure(tmp_path) -> None:
    done = check(tmp_path, {"sanitizer two": "exit"}, "--stage", "sanitizer", FAKE_GPU_INFORMS="1")
    assert done.returncode == 0 and "died: exit code 3" in done.stdout


def test_out_is_where_the_variable_says(tmp_path) -> None:
    start = [part for part in command(tmp_path, "--stage", "ceilings") if part != "--out"]
    start.remove(str(tmp_path))
    given = environment(tmp_path, {}, OUT=str(tmp_path / "there"))
    assert subprocess.run(start, env=given, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    assert len(results(tmp_path / "there")) == 3


def test_bad_arguments_are_one_line(tmp_path) -> None:
    done = check(tmp_path, None, "--stage", "smokey")
    assert done.returncode == 2 and "invalid choice: 'smokey'" in done.stderr
    assert not list(tmp_path.iterdir())
