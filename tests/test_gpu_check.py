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


def run_quickly(folder: Path) -> str:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--quick", "--out", str(folder)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.rstrip().endswith("nothing is left")
    return child.stdout


def test_quick_run_without_a_gpu_and_another_that_goes_on(tmp_path: Path) -> None:
    output = run_quickly(tmp_path)
    for name in ("build", "tests/gpu/test_gpu_cuda.py", "memcheck", "timing"):
        assert f"--- {name}: skipped, " in output
    assert "nothing above is a GPU measurement" in output
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
    ours = [row for row in rows if row["contender"] == "torch"]
    assert all({"eager fp32", "eager tf32", "eager bf16"} <= row["times"].keys() for row in ours)
    network = report["timing"]["network"]
    assert network["problem"] is None and network["times_loop"] > 0
    assert network["fraction_of_setting"] == pytest.approx(4 / 500_000)
    assert {aim["met"] for aim in report["timing"]["aims"]} == {None}

    output = run_quickly(tmp_path)
    again = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "going on with" in output and "network: timed before" in output
    assert again["timing"]["rows"] == rows and again["timing"]["network"] == network
    assert len(again["runs"]) == 2 and not list(tmp_path.glob("*.part"))


CONDITIONS = dict.fromkeys(
    ("source", "gpu", "driver", "torch", "triton", "cuda", "python", "date"), "x"
)


def timed_row(dtype: str = "float32", milliseconds: float | None = 1.0, **more) -> dict:
    row = {"n": 300, "classes": 10, "dim": 16, "dtype": dtype, "precision": "highest"}
    return row | {"contender": "triton", "milliseconds": milliseconds, "problem": None} | more


def test_what_a_killed_run_had_done_is_there_for_the_next(gpu_timing, tmp_path: Path) -> None:
    record_of = importlib.import_module("gpu_record").Record
    path = tmp_path / "deep" / "gpu_check.json"
    first = record_of(path, CONDITIONS)
    assert not first.continued
    first.put_stage("tests", {"outcome": "passed"})
    first.put_stage("memcheck", {"outcome": "cut short after 3 s: the time was up"})
    first.put_rows([timed_row(), timed_row(contender="eager")])
    first.put_rows([timed_row("bfloat16"), timed_row("bfloat16", None, contender="cuda")])
    path.with_name("gpu_check.json.part").write_text("{ killed while wri")

    second = record_of(path, CONDITIONS | {"date": "later"})
    assert second.continued and len(second.report["runs"]) == 2
    assert second.passed("tests") and not second.passed("memcheck") and not second.passed("build")
    shape = (300, 10, 16)
    assert second.timed(shape, "float32")
    assert not second.timed(shape, "bfloat16"), "one contender has no number yet"
    assert not second.timed((301, 10, 16), "float32")
    second.put_rows([timed_row("bfloat16"), timed_row("bfloat16", 2.0, contender="cuda")])
    third = record_of(path, CONDITIONS)
    assert third.timed(shape, "bfloat16") and len(third.timing["rows"]) == 4
    assert [row["run"] for row in third.timing["rows"]] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["source", "gpu", "driver", "torch", "triton"])
def test_results_under_other_conditions_are_not_mixed(gpu_timing, tmp_path, name) -> None:
    record_of = importlib.import_module("gpu_record").Record
    path = tmp_path / "gpu_check.json"
    record_of(path, CONDITIONS).put_rows([timed_row()])
    assert record_of(path, CONDITIONS).continued
    for other in (record_of(path, CONDITIONS | {name: "y"}), record_of(path, CONDITIONS, True)):
        assert not other.continued and not other.timing["rows"]
    path.write_text("{}")
    assert not record_of(path, CONDITIONS).continued


def test_a_run_whose_time_is_up_leaves_the_rest_to_the_next(gpu_timing, tmp_path) -> None:
    gpu_check = importlib.import_module("gpu_check")
    record_of = importlib.import_module("gpu_record").Record
    path = tmp_path / "gpu_check.json"
    gpu_check.measure(False, time.monotonic(), record_of(path, CONDITIONS))
    short = record_of(path, CONDITIONS)
    left = gpu_check.unfinished(short)
    assert len(left) == 1 + 2 * len(gpu_timing.DRY_TABLE) and "network" in left
    gpu_check.measure(False, float("inf"), short)
    assert not gpu_check.unfinished(short) and not gpu_check.failures(short)
    assert "network" in short.timing and len(short.timing["rows"]) > 4
    short.timing["network"]["problem"] = "wrong: pretended"
    short.timing["rows"][0] |= {"problem": "wrong: pretended", "milliseconds": None}
    assert len(gpu_check.failures(short)) == 2


def test_a_lost_device_ends_the_timing_and_keeps_what_there_is(
    gpu_timing, monkeypatch, tmp_path: Path
) -> None:
    gpu_check = importlib.import_module("gpu_check")
    record = importlib.import_module("gpu_record").Record(tmp_path / "gpu_check.json", CONDITIONS)
    honest, calls = gpu_timing.time_row, []

    def lose(shape, dtype, *arguments, **options):
        calls.append(shape)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return honest(shape, dtype, *arguments, **options)

    monkeypatch.setattr(gpu_timing, "time_row", lose)
    outcome = gpu_check.timed_to_its_end(False, float("inf"), record)
    assert outcome == {"outcome": "failed: CUDA error: an illegal memory access was encountered"}
    record.put_stage("timing", outcome)
    assert gpu_check.failures(record) == ["timing"]
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len({row["dtype"] for row in saved["timing"]["rows"]}) == 2
    monkeypatch.setattr(gpu_timing, "time_row", honest)
    record.put_stage("timing", gpu_check.timed_to_its_end(False, float("inf"), record))
    assert not gpu_check.failures(record) and len(record.timing["rows"]) > 6


def test_hash_of_the_source_follows_the_source(gpu_timing, tmp_path: Path) -> None:
    source_hash = importlib.import_module("gpu_record").source_hash
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    before = source_hash(tmp_path)
    (tmp_path / "kernels" / "notes.md").write_text("no source")
    assert source_hash(tmp_path) == before
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert source_hash(tmp_path) != before


def test_aims_are_held_against_the_best_of_ours(gpu_timing) -> None:
    report = importlib.import_module("gpu_report")
    shape = {"n": 1_280_000, "classes": 10, "dim": 512}
    fast = {"dtype": "bfloat16", "precision": "medium"}
    rows = [
        timed_row(**shape, **fast, milliseconds=1.0, percent_of_floor=84.0),
        timed_row(**shape, **fast, milliseconds=0.8, percent_of_floor=90.0, contender="cuda"),
        timed_row(**shape, **fast, milliseconds=1.0, contender="compile"),
        timed_row(**shape, milliseconds=2.0, percent_of_floor=70.0),
        timed_row(**shape, milliseconds=6.0, contender="eager"),
        timed_row(n=50_000, classes=10, dim=512, **fast, milliseconds=0.09, percent_of_floor=30.0,
                  contender="triton (graph)"),
    ]  # fmt: skip
    report.ratios(rows)
    assert rows[1]["times"] == {"compile bf16": 1.25, "eager fp32": 7.5}
    assert "times" not in rows[2]
    found = {(aim["row"], aim["what"]): aim for aim in report.aims(rows)}
    row = "1280000,10,512"
    assert found[f"{row} bfloat16", "% of floor"]["met"] is True
    assert found[f"{row} bfloat16", "% of floor"]["contender"] == "cuda"
    assert found[f"{row} bfloat16", "compile bf16"]["met"] is False
    assert found[f"{row} float32", "eager fp32"]["met"] is True
    assert found["50000,10,512 bfloat16", "ms in a graph, at most"]["met"] is True
    assert found["1280000,1000,512 bfloat16", "% of floor"]["met"] is None


def test_rows_name_the_prediction_and_how_far_off_it_was(gpu_timing) -> None:
    pytest.importorskip("triton", reason="predictions ask the Triton kernels' tables")
    report = importlib.import_module("gpu_report")
    gpu = importlib.import_module("gpu_roofline").H200
    contender = gpu_timing.Contender(
        "triton/stored", "medium", torch.bfloat16, gpu_timing.naive, True, seconds=[1e-3]
    )
    roof = {"read": 4e12, "copy": 3e12, "medium": 8e14}
    (row,) = report.summary((1_280_000, 10, 512), [contender], roof, gpu)
    assert row["predicted_milliseconds"] > 1
    assert row["times_predicted"] == pytest.approx(1 / row["predicted_milliseconds"])
    (row,) = report.summary((1_280_000, 10, 512), [contender], roof, None)
    assert row["predicted_milliseconds"] is None and row["times_predicted"] is None


def test_a_wrong_network_gets_no_number(gpu_timing, monkeypatch) -> None:
    network = importlib.import_module("gpu_network")
    honest = network.authors_loop
    monkeypatch.setattr(network, "authors_loop", lambda *data: 1.1 * honest(*data))
    row = network.time_network(torch.device("cpu"), 1)
    assert row["problem"].startswith("wrong: ours") and "times_loop" not in row


def test_resnet_50_has_the_parameters_of_the_published_one(gpu_timing) -> None:
    network = importlib.import_module("gpu_network")
    with torch.device("meta"):
        model = network.ResNet50(classes=1000)
    count = sum(p.numel() for p in model.parameters())
    # 25,557,032 with a 7 x 7 stem, which has 64 x 3 x (49 - 9) numbers more.
    assert count == 25_557_032 - 64 * 3 * 40


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
