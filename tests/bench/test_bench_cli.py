"""`moso-fast bench`: results file, tables, exit codes, and where the source tree has more."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from moso_fast.bench import runner
from moso_fast.bench.providers import providers_for
from moso_fast.bench.providers.ours import OURS
from moso_fast.cli import main
from moso_fast.cli.bench_output import print_cases


@pytest.mark.exhaustive
def test_a_run_writes_its_results(tiny, tmp_path, capsys) -> None:
    command = ["bench", "--out", str(tmp_path), "--measure", "time"]
    assert main([*command, "--case", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert f"\n{OURS} " in shown and "times as fast as" in shown and "x ours" in shown
    assert f"wrote {tmp_path / 'small.json'}" in shown and "python -m benches page" in shown
    assert main([*command, "--case", "tiny-heavy", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["cases"]) == ["tiny-heavy"]
    kept = json.loads((tmp_path / "small.json").read_text())
    assert list(kept["cases"]) == ["tiny", "tiny-heavy"]
    record = kept["cases"]["tiny-heavy"]
    assert {"ours", "plain", "autograd"} == {row["family"] for row in record["rows"]}
    assert all(row["problem"] is None and row["peak_bytes"] is None for row in record["rows"])
    assert record["measured"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]

    # Memory of what has been timed, in a run of its own.
    assert main(["bench", "--out", str(tmp_path), "--case", "tiny", "--measure", "memory"]) == 0
    kept = json.loads((tmp_path / "small.json").read_text())
    rows = {row["provider"]: row for row in kept["cases"]["tiny"]["rows"]}
    assert rows[OURS]["peak_bytes"] is not None or rows[OURS]["no_peak"]


def test_a_wrong_result_of_ours_is_exit_code_1(tiny, tmp_path, monkeypatch, capsys) -> None:
    honest = runner.errors_of
    monkeypatch.setattr(
        runner, "errors_of", lambda result, truth: {n: 1.0 for n in honest(result, truth)}
    )
    command = ["bench", "--out", str(tmp_path), "--measure", "time", "--case", "tiny"]
    assert main(command) == 1
    assert f"tiny, {OURS}: wrong: relative error 1" in capsys.readouterr().err


def test_bad_input_is_exit_code_2(tiny, tmp_path, capsys) -> None:
    for words, message in (
        (["--profile", "huge"], "--profile must be one of small, full; got 'huge'"),
        (["--case", "nothing"], "no case matches 'nothing'; known: tiny, tiny-heavy"),
        (["--against", "all"], "--against must be one of plain, peers; got 'all'"),
        (["--measure", "speed"], "--measure must be one of all, time, memory; got 'speed'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N; got 'tpu'"),
        (
            ["--out", str(tmp_path), "--case", "tiny", "--measure", "memory"],
            f"--measure memory: {tmp_path / 'small.json'} has no times of tiny; measure all or "
            "time first",
        ),
    ):
        assert main(["bench", *words]) == 2, words
        assert capsys.readouterr().err == f"moso-fast: {message}\n"


def test_another_machines_file_is_refused_before_anything_is_measured(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    command = ["bench", "--out", str(tmp_path), "--measure", "time", "--case", "tiny", "--quiet"]
    assert main(command) == 0
    path = tmp_path / "small.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "machine": {**kept["machine"], "processor": "other"}}))
    monkeypatch.setattr("moso_fast.bench.session.measure_case", None)
    assert main(command) == 2
    assert "holds results of another machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option", "command"),
    [
        (["--against", "peers"], "--against peers", "run --against peers"),
        (["--growth"], "--growth", "run --growth"),
        (["--charts"], "--charts", "run"),
        (["--draw", "a.json"], "--draw", "page a.json"),
        (["--compare", "a.json", "b.json"], "--compare", "compare a.json b.json"),
        (["--gate", "g.json"], "--gate", "gate g.json"),
        (["--gate", "g.json", "--write-gate"], "--write-gate", "gate g.json --write"),
        (["--write-gate"], "--write-gate", "gate FILE --write"),
    ],
)
def test_what_the_source_tree_does_is_named(words, option, command, capsys) -> None:
    assert main(["bench", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert line == (
        f"moso-fast: {option} is not in the installed package; in a source tree of moso_fast "
        f"run: python -m benches {command}"
    )


def test_list(tiny, capsys) -> None:
    for words, rows in (([], 48), (["--profile", "full"], 96)):
        assert main(["bench", "--list", *words]) == 0
        counts = [len(providers_for(case)) for case in tiny]
        title = "CIFAR-10 head of a ResNet-18"
        assert capsys.readouterr().out == (
            f"case        {'what'.ljust(len(title))}  N   C   D   providers\n"
            f"tiny        {title}  {rows}  10  16  {counts[0]}\n"
            f"tiny-heavy  {title}  {rows}  10  16  {counts[1]}\n"
        )


RECORD = {
    "title": "A head",
    "rows_scored": 8192,
    "speedup": 2.345,
    "best_plain": "naive",
    "noise": 0.123,
    "rows": [
        {"provider": "naive", "seconds": 0.0025, "times_ours": 2.5, "percent_of_floor": 12.3456,
         "peak_bytes": 3 * 2**20, "errors": {"loss": 2e-7, "alignment": 1e-8}, "problem": None,
         "note": "a note", "family": "plain"},
        {"provider": "broken", "seconds": None, "peak_bytes": None, "errors": {},
         "problem": "failed: x", "note": "a note", "family": "plain"},
        {"provider": OURS, "seconds": 0.001, "times_ours": 1.0, "peak_bytes": 0,
         "errors": {"loss": 1e-6}, "problem": None, "note": "", "family": "ours"},
    ],
    "skipped": [
        {"provider": "chunks", "why": "9 rows are one chunk: the same as naive"},
        {"provider": "peer", "why": "not installed: peer"},
    ],
}  # fmt: skip
TABLE = """\
provider   ms   x ours  % of floor  peak MiB  error
moso_fast  1    1       -           0         1e-06
naive      2.5  2.5     12.3        3         2e-07  a note
broken     -    -       -           -         -      failed: x
skipped peer: not installed: peer
"""


def test_what_is_printed_of_a_case(capsys) -> None:
    print_cases({"c1": RECORD, "c2": {**RECORD, "noise": None}}, {"processor": "p", "cpus": 2})
    assert capsys.readouterr().out == (
        "processor p, cpus 2\n"
        "\nc1: A head, N=8,192\n"
        f"2.35 times as fast as naive (spread of the ratio 12%)\n{TABLE}"
        f"\nc2: A head, N=8,192\n2.35 times as fast as naive\n{TABLE}"
    )
    print_cases({"c1": {**RECORD, "speedup": None, "rows": [], "skipped": []}}, {})
    columns = "provider  ms  x ours  % of floor  peak MiB  error"
    assert capsys.readouterr().out == f"\n\nc1: A head, N=8,192\n{columns}\n"


class Recorded:
    """In place of a session: writes what it is told, and keeps how it was asked."""

    machine: ClassVar = {"cpus": 2}
    record = RECORD
    made: ClassVar[list] = []

    def __init__(self, path, *given, tick):
        self.path, self.did = path, [given, torch.get_num_threads()]
        self.made.append(self)
        self.tick = tick

    def check(self, cases):
        self.did.append([case.name for case in cases])

    def measure(self, case):
        self.did.append(case.name)
        old = json.loads(self.path.read_text())["cases"] if self.path.exists() else {"old": {}}
        cases = {**old, case.name: self.record}
        self.path.write_text(json.dumps({"schema": 1, "cases": cases}))


@pytest.fixture
def recorded(tiny, monkeypatch):
    monkeypatch.setattr("moso_fast.bench.session.Session", Recorded)
    monkeypatch.setattr("moso_fast.bench.session.check_device", lambda device: None)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def test_the_command_hands_its_options_on_and_prints_what_was_measured(
    recorded, tmp_path, capsys
) -> None:
    command = ["bench", "--out", str(tmp_path)]
    assert main(command) == 0
    path = tmp_path / "small.json"
    assert capsys.readouterr().out == (
        f"cpus 2\n\ntiny: A head, N=8,192\n2.35 times as fast as naive (spread of the ratio 12%)\n"
        f"{TABLE}\ntiny-heavy: A head, N=8,192\n"
        f"2.35 times as fast as naive (spread of the ratio 12%)\n{TABLE}"
        f"wrote {path}; charts and a page, in a source tree: python -m benches page {path}\n"
    )
    threads = torch.get_num_threads()
    names = ["tiny", "tiny-heavy"]
    (run,) = recorded
    assert run.path == path and run.did == [("small", "cpu", "all"), threads, names, *names]
    recorded.clear()
    words = ["--profile", "full", "--device", "cuda:1", "--measure", "time", "--json"]
    words += ["--case", "*-heavy", "--threads", str(threads + 2)]
    assert main([*command, *words]) == 0
    (run,) = recorded
    assert run.path == tmp_path / "full.json"
    assert run.did == [("full", "cuda:1", "time"), threads + 2, names[1:], "tiny-heavy"]
    shown = capsys.readouterr().out
    wrote = {"wrote": [str(run.path)], "cases": {"tiny-heavy": RECORD}}
    assert json.loads(shown) == wrote and shown.count("\n") == 1
    assert torch.get_num_threads() == threads
    assert main([*command, "--quiet"]) == 0 and capsys.readouterr().out == ""
    assert main([*command, "--threads", "0"]) == 2
    assert "Invalid value for '--threads'" in capsys.readouterr().err


def test_every_wrong_result_of_ours_is_named(recorded, tmp_path, capsys, monkeypatch) -> None:
    bad = {**RECORD, "rows": [{**row, "problem": "bad"} for row in RECORD["rows"]]}
    monkeypatch.setattr(Recorded, "record", bad)
    assert main(["bench", "--out", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().err == (
        f"moso-fast: RuntimeError: tiny, {OURS}: bad; tiny-heavy, {OURS}: bad (--debug shows the "
        "traceback)\n"
    )


def test_progress_is_one_step_a_case(recorded, tmp_path, monkeypatch) -> None:
    shown = []

    @contextlib.contextmanager
    def bar(caption, total, *, shown):
        steps.append((caption, total, shown))
        yield tick, lambda: steps.append("advance")

    def tick(text):
        shown.append(text)

    steps = []
    module = importlib.import_module("moso_fast.cli.bench")
    monkeypatch.setattr(module, "caption_bar", bar)
    for words, is_shown in (([], True), (["-q"], False)):
        steps.clear()
        assert main(["bench", "--out", str(tmp_path), *words]) == 0
        assert steps == [("benchmarks", 2, is_shown), "advance", "advance"]
        assert recorded[-1].tick is tick


@pytest.mark.exhaustive
def test_the_package_needs_nothing_of_the_source_tree() -> None:
    """Every module of moso_fast.bench and its command are there where `benches` is not."""
    script = (
        "import importlib, pkgutil, sys\n"
        "sys.modules['benches'] = None\n"  # an import of it is an error
        "import moso_fast.bench, moso_fast.cli.bench\n"
        "found = list(pkgutil.walk_packages(moso_fast.bench.__path__, 'moso_fast.bench.'))\n"
        "for module in found: importlib.import_module(module.name)\n"
        "print(len(found))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0 and int(child.stdout) > 12, child.stderr
