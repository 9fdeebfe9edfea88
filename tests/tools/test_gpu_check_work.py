"""What the units of benches/gpu/check do, on this machine's CPU: the real work, not a stand-in."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# tests/gpu in a pytest of its own, and the demo's study, have tests of their own.
STAGES = ("smoke", "ceilings", "kernels", "profile", "calls", "compile", "sanitizer", "network")


def work(name: str) -> Any:
    return importlib.import_module(f"benches.gpu.check.work.{name}")


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    chosen = [word for stage in STAGES for word in ("--stage", stage)]
    command = [sys.executable, "-m", "benches.gpu", "check", "--out", str(folder), *chosen]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.exhaustive
def test_a_dry_run_ends_and_the_next_goes_on(tmp_path: Path) -> None:
    done = run_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("nothing is left")
    assert "nothing above is a GPU measurement" in done.stdout
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["dry_run"] and report["conditions"]["gpu"] is None
    assert report["conditions"]["torch"] == torch.__version__
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        by_stage.setdefault(result["stage"], []).append(result)
        skipped = result["stage"] in ("profile", "sanitizer")
        assert result["outcome"] == ("skipped" if skipped else "done"), result
    assert by_stage.keys() == set(STAGES)
    for result in by_stage["smoke"]:
        assert result["data"].keys() == {"errors at 64", "errors at 304"}
        assert all(0 <= e < 1e-2 for each in result["data"].values() for e in each.values())
    for result in by_stage["kernels"]:
        data = result["data"]
        assert data["first_milliseconds"] > 0 and data["second_milliseconds"] > 0
        assert data["kernels"] and data["kernels"][0]["microseconds"] > 0
    for result in [*by_stage["calls"], *by_stage["compile"]]:
        data = result["data"]
        assert data["milliseconds"] > 0 and len(data["all_milliseconds"]) == 2
        assert 0 <= data["relative_error"] < 0.1 and data["copy_before"] > 0
    rows = report["rows"].values()
    assert {row["contender"] for row in rows} >= {"torch", "eager", "compile"}
    assert {row["precision"] for row in rows} == {"highest", "high", "medium"}
    plain = {f"{name} {kind}" for name in ("eager", "compile") for kind in ("fp32", "tf32", "bf16")}
    for row in rows:
        assert row["percent_of_floor"] > 0
        if row["contender"] == "torch":
            assert row["times"].keys() == plain
    assert {aim["met"] for aim in report["aims"]} == {None}
    (network,) = by_stage["network"]
    assert network["data"]["fraction_of_setting"] == pytest.approx(4 / 500_000)

    again = run_check(tmp_path)
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert again.returncode == 0 and "going on with" in again.stdout
    redone = {result["stage"] for result in found["results"] if result["run"] == 1}
    assert redone == {"profile", "sanitizer"}, "what was skipped is tried again, nothing else"
    assert found["rows"] == report["rows"] and len(found["runs"]) == 2


def planned(stages: list[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, Any] = {}
    work("plan").run({"stages": stages}, lambda **data: found.update(data))
    assert not [name for name in found if name.startswith("fault")], found
    return {stage: found[f"units of {stage}"] for stage in stages}


def test_every_unit_has_a_limit_a_name_and_sources() -> None:
    names = [stage.name for stage in importlib.import_module("benches.gpu.check.stages").STAGES]
    sources = importlib.import_module("benches.gpu.check.sources")
    units = planned(names)
    most = {"smoke": 20, "kernels": 30, "calls": 30, "profile": 60, "tests": 90}
    for stage, each in units.items():
        assert each, stage
        for unit in each:
            assert unit["key"].startswith(f"{stage} ") and 0 < unit["limit"] <= most.get(stage, 280)
            assert sources.closure(p for s in unit["sources"] for p in sources.of_contender(s))
    keys = [unit["key"] for each in units.values() for unit in each]
    assert len(keys) == len(set(keys))
    json.dumps(units)  # they go through a pipe, and what is found of them into a file


def test_a_stage_without_a_plan_costs_no_other(monkeypatch) -> None:
    plan = work("plan")

    def broken(gpu: bool) -> Any:
        yield {"key": "first"}
        raise KeyError("sm_90")

    monkeypatch.setitem(plan.UNITS, "smoke", broken)
    found: dict[str, Any] = {}
    plan.run({"stages": ["smoke", "ceilings"]}, lambda **data: found.update(data))
    assert found["fault of smoke"] == "KeyError: 'sm_90'" and "units of smoke" not in found
    assert len(found["units of ceilings"]) == 4


def test_what_says_the_most_is_planned_first(monkeypatch) -> None:
    """As with a GPU: five minutes never reach the end of a stage."""
    pytest.importorskip("triton", reason="cases ask the Triton kernels' tables")
    plan = work("plan")
    there = ("cuda", "triton", "triton/stored", "torch")
    monkeypatch.setattr(plan.timing, "contenders", lambda *job: iter(there))
    monkeypatch.setattr(plan.timing, "sources", lambda name, *job: name)
    rows = [",".join(map(str, shape)) for shape in plan.KERNEL_ROWS]
    kernels = [unit["key"] for unit in plan._kernels(True)]
    assert len(kernels) == len(set(kernels))
    first = [f"{row} bfloat16 medium {name}" for row in rows for name in there[:2]]
    assert kernels[:10] == first
    assert kernels[10:20] == [name.replace("bfloat16 medium", "float32 highest") for name in first]
    sweeps = [key for key in kernels if key.endswith(", tiles")]
    assert len(sweeps) == 8 and kernels.index(sweeps[-1]) < kernels.index(
        f"{first[0]}".replace("cuda", "triton/stored")
    )
    assert all(key.endswith(" torch") for key in kernels[-15:])
    calls = [unit["key"] for unit in plan._calls(True)]
    assert all(key.endswith(("cuda", "triton")) for key in calls[:22])
    # Not ours: plain PyTorch for every row, other libraries where there are many classes.
    behind = 33 + len(plan.VOCABULARY_ROWS) * len(plan.PEERS)
    plain = [f"bfloat16 medium {name}" for name in ("eager", *plan.PEERS)]
    assert all(key.endswith(tuple(plain)) for key in calls[22:behind])
    assert all("float32 highest" in key for key in calls[behind : behind + 33])
    with importlib.import_module("benches.gpu.compile_times").as_on_a_gpu():
        smoke = list(plan._smoke(True))
    assert len(smoke) > 50 and all(unit["limit"] <= 20 for unit in smoke)
    (profile,) = plan._profile(True)
    wanted = [(job["shape"][1], job["contender"]) for job in profile["jobs"]]
    assert wanted == [(10, "cuda"), (10, "triton"), (100, "cuda"), (100, "triton")]


def test_a_prediction_that_fails_costs_no_timing(monkeypatch) -> None:
    plan = work("plan")
    job = ((300, 10, 16), "float32", "highest", "triton")
    assert plan._prediction("predicted_seconds", *job) == {}
    said = work("timing").predictions({"no_prediction": "KeyError: 'read'", "predicted": None})
    assert said == {"no_prediction": "KeyError: 'read'"}, "it stands beside the time"
    unit = {"predicted": [1.0, 0.5], "predicted_graph": 0.25}
    told = {"predicted_milliseconds": [1000.0, 500.0], "predicted_graph_milliseconds": 250.0}
    assert work("timing").predictions(unit) == told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA of tomorrow")
    found = plan._prediction("predicted_seconds", *job)
    assert found.keys() == {"no_prediction"} and found["no_prediction"]
    pytest.importorskip("triton", reason="predictions ask the Triton kernels' tables")
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = plan._prediction("predicted_seconds", *job)
        assert 0 < found["predicted"] < 1, found
        first, second = plan._prediction("pass_seconds", *job)["predicted"]
        assert second > 0 and first > 0


def test_the_smoke_stage_fits_its_time() -> None:
    """By compile times of one core, with the Triton that torch 2.11 brings along."""
    found = json.loads((ROOT / "benches" / "results" / "gpu_smoke_compile.json").read_text())
    stages = importlib.import_module("benches.gpu.check.stages").STAGES
    assert found["triton"].startswith("3.6") and found["workers"] == stages[0].workers
    tool = importlib.import_module("benches.gpu.compile_times")
    others = [0.0] * (2 * 3 * len(tool.OURS))
    seconds = [case["seconds"] for case in found["cases"]]
    wall = tool.estimate([*seconds, *others], found["workers"])
    assert wall == pytest.approx(found["estimated_seconds"], abs=0.1) and wall < 35


def serve(layer: Any, *units: dict[str, Any]) -> list[dict[str, Any]]:
    """Run units as the worker process does; return its messages."""
    worker = importlib.import_module("benches.gpu.check.worker")
    sent, waiting = [], list(units)

    def receive() -> dict[str, Any]:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    sys.modules["layer_of_a_test"] = layer
    try:
        worker.serve("layer_of_a_test", SimpleNamespace(send=sent.append, recv=receive))
    finally:
        del sys.modules["layer_of_a_test"]
    return sent


JOB = {"stage": "calls", "shape": (300, 10, 16), "dtype": "float32", "precision": "highest"}


def call(contender: str, **more: Any) -> dict[str, Any]:
    return {**JOB, "key": f"calls {contender}", "work": "calls", "contender": contender, **more}


def outcome(*units: dict[str, Any]) -> list[dict[str, Any]]:
    messages = serve(importlib.import_module("benches.gpu.check.layer"), *units)
    return [message for message in messages if "outcome" in message]


@pytest.mark.parametrize("name", ["naive", "last_layer_stats"])
@pytest.mark.parametrize("field", ["alignment", "grad_sqnorm"])
@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_a_wrong_result_gets_no_number(value, field, name, monkeypatch) -> None:
    timing = work("timing")
    honest = getattr(timing, name)

    def wrong(*data: Any, **options: Any) -> Any:
        found = honest(*data, **options)
        names = ("loss", "alignment", "grad_sqnorm")
        if name != "naive":
            found = [getattr(found, each) for each in names]
        factors = [value if each == field else 1.0 for each in names]
        fields = [a * b for a, b in zip(factors, found, strict=True)]
        return (
            fields if name == "naive" else SimpleNamespace(**dict(zip(names, fields, strict=True)))
        )

    monkeypatch.setattr(timing, name, wrong)
    contender = "eager" if name == "naive" else "torch"
    messages = serve(importlib.import_module("benches.gpu.check.layer"), call(contender))
    (last,) = [message for message in messages if "outcome" in message]
    assert last["outcome"] == "wrong" and last["why"].startswith("relative error ")
    assert not any("milliseconds" in message.get("data", {}) for message in messages)
    other = "torch" if name == "naive" else "eager"
    assert outcome(call(other)) == [{"outcome": "done", "why": ""}]


def test_an_error_of_the_compiler_is_an_outcome_and_ends_the_process(monkeypatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton's own errors")

    def refuse(*data: Any, **options: Any) -> Any:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    assert not isinstance(errors.OutOfResources(1, 0, ""), (ValueError, RuntimeError))
    monkeypatch.setattr(work("timing"), "last_layer_stats", refuse)
    found = outcome(call("torch"), call("eager"))
    assert [each["outcome"] for each in found] == ["failed"], "the next unit has a fresh process"
    assert found[0]["why"].startswith("OutOfResources: out of resource: shared memory")


def test_the_smoke_test_finds_every_wrong_field(monkeypatch) -> None:
    smoke = work("smoke")
    unit = {"contender": "torch", "head": (3, 10, 16), "dtype": "float32", "precision": "highest"}
    smoke.run(unit, lambda **data: None)
    honest = smoke.last_layer_stats
    for name in (*smoke.FIELDS, "mean_grad_sqnorm"):

        def wrong(*data: Any, name: str = name, **options: Any) -> Any:
            found = honest(*data, **options)
            fields = {f: getattr(found, f) for f in (*smoke.FIELDS, "mean_grad_sqnorm")}
            return SimpleNamespace(**{**fields, name: fields[name] * (1 + 5e-5)})

        monkeypatch.setattr(smoke, "last_layer_stats", wrong)
        with pytest.raises(Exception, match=f"64 rows, {name}: relative error 5e-05"):
            smoke.run(unit, lambda **data: None)


def test_smoke_has_every_regime_dtype_and_precision() -> None:
    pytest.importorskip("triton", reason="regimes ask the Triton kernels' tables")
    from moso_fast.backends.triton.regime import triton_version

    with importlib.import_module("benches.gpu.compile_times").as_on_a_gpu() as smoke:
        found = list(smoke.cases(torch.device("cpu")))
    kinds = {(case["contender"], case["dtype"], case["precision"]) for case in found}
    regimes = {f"triton/{name}" for name in smoke.REGIMES}
    assert {contender for contender, _, _ in kinds} == regimes
    old = triton_version() < (3, 9)  # whose compiler spills in the tf32 tiles of few classes
    for contender in regimes:
        for dtype in ("bfloat16", "float32", "float16"):
            expected = set(smoke.OURS)
            if old and contender == "triton/few_classes" and dtype != "bfloat16":
                expected.remove("medium")
            assert {p for c, d, p in kinds if (c, d) == (contender, dtype)} == expected
    heads = {case["head"] for case in found if case["contender"] == "triton/few_classes"}
    assert any(head[0] for head in heads), "several heads: the batched product"


def test_a_graph_is_captured_once_for_each_set_of_tensors(monkeypatch) -> None:
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

    def compute(features):
        events.append("run")
        return (features, features, features)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    run, one, two = work("timing").Graphed(compute), torch.ones(3), torch.zeros(3)
    first = ["run", "wait", "capture", "run", "captured", "replay"]
    for data in (one, one, two, one, two):
        assert run(data)[0] is data
    assert events == [*first, "replay", *first, "replay", "replay"]


def test_passes_are_those_of_the_engine() -> None:
    """What the kernel stage runs gives the alignment of a whole call, chunk by chunk too."""
    timing, kernels = work("timing"), work("kernels")
    data = timing.inputs((500, 10, 16), torch.float32, torch.device("cpu"))
    job = kernels.Passes("torch", "highest", data)
    job.chunks = [slice(0, 500)]
    job.first()
    job.grad /= 500
    job.bias_grad /= 500
    job.second()
    expected = timing.last_layer_stats(*data, backend="torch").alignment
    torch.testing.assert_close(job.alignment[0], expected)


def test_times_stand_where_the_profiler_fails(monkeypatch) -> None:
    kernels = work("kernels")

    def fail(job: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(kernels, "by_name", fail)
    told: dict[str, Any] = {}
    unit = {**JOB, "contender": "torch", "sources": []}
    kernels.run(unit, lambda **data: told.update(data))
    assert told["first_milliseconds"] > 0 and told["second_milliseconds"] > 0
    assert told["no kernels"] == "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert "kernels" not in told


def test_a_tile_that_is_refused_does_not_end_the_sweep(monkeypatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton's own errors")
    few = importlib.import_module("moso_fast.backends.triton.regimes.few_classes")
    sweep = work("sweep")
    told: dict[str, Any] = {}

    def launch(tile: str) -> None:
        if tile == "large":
            raise errors.OutOfResources(300_000, 232_448, "shared memory")
        if tile == "bad":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before = few.tile_for
    with sweep.every_tile(lambda work: work() or 0.002, told.__setitem__):
        where = torch.device("cuda")
        assert few.tile_for(where, "a", ["small", "large", "wide"], "wide", launch) == "wide"
        with pytest.raises(RuntimeError, match="illegal memory access"):
            few.tile_for(where, "b", ["small", "bad", "wide"], "wide", launch)
    assert few.tile_for is before
    assert [line.get("milliseconds") for line in told["a"]] == [2.0, None, 2.0]
    assert told["a"][1]["why"].startswith("OutOfResources: out of resource")
    assert [line["default"] for line in told["a"]] == [False, False, True]
    assert [line["tile"] for line in told["b"]] == ["small", "bad"], "kept before the process ends"


def test_every_search_point_of_the_backend_is_swept() -> None:
    """Modules that import ``tile_for`` are found, by what they import."""
    autotune = importlib.import_module("moso_fast.backends.triton.autotune")
    folder = Path(autotune.__file__).parent
    asking = [p for p in folder.rglob("*.py") if "tile_for(" in p.read_text()]
    names = [".".join(p.relative_to(folder).with_suffix("").parts) for p in asking]
    modules = [importlib.import_module(f"moso_fast.backends.triton.{name}") for name in names]
    assert len(modules) > 2
    with work("sweep").every_tile(lambda work: 0.0, lambda key, lines: None):
        left = [m for m in modules if m is not autotune and m.tile_for is autotune.tile_for]
    assert not left
