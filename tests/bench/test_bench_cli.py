"""`moso-fast bench`: results file, tables, exit codes, and where the source tree has more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from moso_fast.bench import runner
from moso_fast.bench.providers.ours import OURS
from moso_fast.cli import main


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
        (["--against", "all"], "--against must be one of plain, peers"),
        (["--measure", "speed"], "--measure must be one of all, time, memory"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N; got 'tpu'"),
        (
            ["--out", str(tmp_path), "--case", "tiny", "--measure", "memory"],
            "has no times of tiny; measure all or time first",
        ),
    ):
        assert main(["bench", *words]) == 2, words
        assert message in capsys.readouterr().err


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
    assert main(["bench", "--list"]) == 0
    assert "tiny-heavy" in capsys.readouterr().out


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
