"""Results on disk, the runs that fill them, and what is said of the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import types
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import pytest
import torch
from bench_cases import HEAD, HEADS

import moso_fast
from moso_fast.bench import facts, session, store
from moso_fast.bench.session import Session

MACHINE = {"processor": "A CPU", "cpus": 2, "threads": 1, "device": "cpu"}


def results(*names, seconds=1.0, **other):
    cases = {name: {"rows": [], "seconds": seconds} for name in names}
    return {"schema": 1, "profile": "small", "machine": MACHINE, "cases": cases, **other}


def test_a_file_is_text_of_five_digits(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "small.json"
    value = {"a": 1 / 3, "b": [2e10 / 3, (math.inf, -math.inf, math.nan)], "c": {"d": 123456},
             "e": None, "f": "é", "g": True}  # fmt: skip
    assert store.save(value, path) == path
    assert path.read_text(encoding="utf-8") == (
        '{\n "a": 0.33333,\n "b": [\n  6666700000.0,\n  [\n   null,\n   null,\n   null\n  ]\n ],\n'
        ' "c": {\n  "d": 123456\n },\n "e": null,\n "f": "\\u00e9",\n "g": true\n}\n'
    )
    store.save(results("c"), path)  # over an old one, in a folder that is there
    assert store.load(str(path)) == results("c") and [p.name for p in path.parent.iterdir()] == [
        "small.json"
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "'schema'"),
        ("[]", "list indices must be integers or slices, not str"),
    ],
)
def test_what_is_no_results_file_is_named(tmp_path, text, why) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        store.load(path)
    assert str(refused.value) == f"{path} is no results file of moso-fast bench: {why}"
    path.write_text('{"schema": "7"}')
    with pytest.raises(ValueError) as refused:
        store.load(path)
    assert str(refused.value) == f"{path} has schema '7'; this version reads 1"


def test_merged_results_keep_the_registrys_order() -> None:
    path = Path("there.json")
    new = results("few-rows", "mine")
    assert store.merge(None, new, path) is new
    old = results("yours", "c100-d512", "few-rows", seconds=2.0, growth={"N": 1, "C": 1})
    found = store.merge(old, {**results("c10-d512", "few-rows", "mine"), "growth": {"N": 2}}, path)
    order = ["c10-d512", "c100-d512", "few-rows", "yours", "mine"]
    assert list(found["cases"]) == order and found["growth"] == {"N": 2, "C": 1}
    assert [found["cases"][name]["seconds"] for name in order] == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert store.merge(results("a"), results("b"), path)["growth"] == {}
    for key, other in (("profile", "full"), ("machine", {"cpus": 3})):
        with pytest.raises(ValueError) as refused:
            store.merge({**old, key: other}, new, path)
        assert str(refused.value) == (
            f"there.json holds results of another {key} ({other}, now {new[key]}); "
            "choose another --out"
        )


@pytest.fixture
def machine(monkeypatch):
    """Have a machine that is always the same one; what is asked about is kept."""
    asked = []
    monkeypatch.setattr(facts, "machine", lambda device="cpu": asked.append(device) or MACHINE)
    return asked


def test_a_session_adds_each_case_to_its_file(machine, monkeypatch, tmp_path) -> None:
    did = []

    def measure(case, settings, tick):
        tick(case.name)
        did.append((case.name, settings))
        return {"rows": [], "of": case.name}

    monkeypatch.setattr(session, "measure_case", measure)
    path, ticks = tmp_path / "small.json", []
    running = Session(path, "small", "cuda:1", "all", "my.registry", ticks.append)
    running.check([HEAD, HEADS])
    assert not path.exists() and machine == ["cuda:1"]
    assert running.measure(HEAD) == {"rows": [], "of": "head"}
    first = {"schema": 1, "profile": "small", "machine": MACHINE}
    assert store.load(path) == {**first, "cases": {"head": {"rows": [], "of": "head"}}}
    running.measure(HEADS)
    running.keep({"cases": {}, "growth": {"N": 3}})
    kept = store.load(path)
    assert list(kept["cases"]) == ["head", "heads"] and kept["growth"] == {"N": 3}
    assert ticks == ["head", "heads"]
    (_, settings), _ = did
    assert (settings.profile, settings.device, settings.registry) == (
        "small",
        "cuda:1",
        "my.registry",
    )
    assert settings.memory_limit == 10.0
    timed = Session(path, "full", measure="time").settings
    assert timed == replace(timed, profile="full", device="cpu", memory_limit=0.0, most=15)
    assert timed.registry == "moso_fast.bench.providers"
    Session(path, "small").measure(HEAD)  # nothing is shown


def test_memory_alone_is_added_to_the_times_that_are_there(machine, monkeypatch, tmp_path) -> None:
    path = tmp_path / "small.json"
    running = Session(path, "small", measure="memory", tick=print)
    message = f"--measure memory: {path} has no times of heads; measure all or time first"
    with pytest.raises(ValueError) as refused:
        running.check([HEADS])
    assert str(refused.value) == message
    store.save(results("head", growth={"N": 1}), path)
    running.check([HEAD])
    with pytest.raises(ValueError) as refused:
        running.check([HEAD, HEADS])
    assert str(refused.value) == message
    Session(path, "small").check([HEADS])  # times need none

    def add(case, record, settings, tick):
        record["memory"] = (case.name, settings is running.settings, tick is print)

    monkeypatch.setattr(session, "add_memory", add)
    assert running.measure(HEAD) == {"rows": [], "seconds": 1.0, "memory": ("head", True, True)}
    kept = store.load(path)
    assert kept["cases"]["head"]["memory"] == ["head", True, True] and kept["growth"] == {"N": 1}
    path.write_text(json.dumps({**results(), "profile": "full"}))
    with pytest.raises(ValueError, match="results of another profile"):
        running.check([])


def test_threads_are_given_for_a_while() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), session.given_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
    with session.given_threads(None):
        assert torch.get_num_threads() == before


def test_where_results_go(machine, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert session.results_path(Path("mine"), "full") == Path("mine/full.json")
    assert session.results_path(None, "small") == Path("moso_fast_bench/a-cpu-2-cpus/small.json")
    Path("benches/results").mkdir(parents=True)
    assert session.results_path(None, "full", "cuda:1") == Path(
        "benches/results/a-cpu-2-cpus/full.json"
    )
    assert machine == ["cpu", "cuda:1"]


def test_devices_that_are_not_there_are_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session.check_device("cpu")
    for device in ("tpu", "meta", ""):
        with pytest.raises(ValueError) as refused:
            session.check_device(device)
        assert str(refused.value) == f"--device must be cpu, cuda or cuda:N; got {device!r}"
    with pytest.raises(ValueError) as refused:
        session.check_device("cuda:1")
    assert str(refused.value) == "--device cuda:1: PyTorch sees no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    session.check_device("cuda:1")


def test_only_wrong_results_of_ours_are_faults() -> None:
    def row(family, provider, problem):
        return {"family": family, "provider": provider, "problem": problem}

    records = {
        "a": {"rows": [row("ours", "x", None), row("plain", "y", "off"), row("ours", "z", "bad")]},
        "b": {"rows": [row("ours", "x", "worse")]},
    }
    assert session.wrong_results(records) == ["a, z: bad", "b, x: worse"]


def test_the_machine_is_named_after_its_gpu_or_its_processor(monkeypatch) -> None:
    monkeypatch.setattr(facts, "_processor", lambda: "AMD (R) EPYC_7, x2 ")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = facts.machine()
    threads = torch.get_num_threads()
    assert found == {
        "processor": "AMD (R) EPYC_7, x2 ",
        "cpus": 2,
        "threads": threads,
        "device": "cpu",
    }
    assert facts.machine_name(found) == "amd-r-epyc-7-x2-2-cpus"
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:1": "NVIDIA H100!"}.get)
    found = facts.machine("cuda:1")
    assert (found["gpu"], found["device"]) == ("NVIDIA H100!", "cuda:1")
    assert facts.machine_name(found) == "nvidia-h100"


def test_the_processor_is_that_of_the_system(monkeypatch) -> None:
    text = "processor\t: 0\nmodel name\t: A CPU: fast \nmodel name\t: another\n"

    def read(self, encoding):
        if text is None:
            raise FileNotFoundError
        return {"/proc/cpuinfo": text}[str(self)]

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    monkeypatch.setattr(platform, "processor", lambda: "ARM of an older system")
    assert facts._processor() == "A CPU: fast"
    text = "processor\t: 0\n"
    assert facts._processor() == "arm"
    text = None
    assert facts._processor() == "ARM of an older system"
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert facts._processor() == "arm"


def test_conditions_of_a_number(monkeypatch) -> None:
    versions = {"opacus": "1.5", "triton": "3.9"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(facts, "_commit", lambda: "abc")
    found = facts.conditions()
    date = found.pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", date)
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(date)) < timedelta(minutes=5)
    assert found == {
        "commit": "abc",
        "moso_fast": moso_fast.__version__,
        "backend": moso_fast.backends()["cpu"].reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": versions,
    }


def test_the_commit_says_whether_the_sources_have_changed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(moso_fast, "__file__", str(tmp_path / "moso_fast" / "__init__.py"))
    answers, asked = {}, []

    def run(command, capture_output, text):
        assert capture_output and text and command[:3] == ["git", "-C", str(tmp_path)]
        asked.append(command[3:])
        answer = answers[command[3]]
        if isinstance(answer, OSError):
            raise answer
        return types.SimpleNamespace(stdout=answer, returncode=int(answer is None))

    monkeypatch.setattr(subprocess, "run", run)
    assert facts._commit() is None and not asked  # installed: whose commit it would be is unknown
    (tmp_path / "setup.py").touch()
    answers.update({"rev-parse": "abc\n", "status": ""})
    assert facts._commit() == "abc"
    # Files that git does not know change no number.
    status = ["status", "--porcelain", "--untracked-files=no", "--", "moso_fast", "csrc"]
    assert asked == [["rev-parse", "HEAD"], status]
    answers["status"] = " M moso_fast/x.py\n"
    assert facts._commit() == "abc+changes"
    answers["rev-parse"] = None
    assert facts._commit() is None
    answers["rev-parse"] = FileNotFoundError("git")
    assert facts._commit() is None
