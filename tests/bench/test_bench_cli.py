"""`moso-fast bench`: files, tables, exit codes, charts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moso_fast.bench import cases, runner
from moso_fast.bench.providers.ours import OURS
from moso_fast.cli import main

TINY = replace(cases.CASES["c10-d512"], name="tiny", small=48, full=96, dim=16)
HEAVY = replace(TINY, name="tiny-heavy", heavy=True)


@pytest.fixture
def tiny(monkeypatch):
    """Two cases of milliseconds and settings to match; no ceilings to wait for."""
    monkeypatch.setattr(cases, "CASES", {c.name: c for c in (TINY, HEAVY)})
    monkeypatch.setattr("moso_fast.bench.store.CASES", cases.CASES)
    quick = {"least": 2, "most": 2, "budget": 0.0, "memory_limit": 30.0}
    monkeypatch.setattr(
        runner.Settings,
        "of_profile",
        classmethod(lambda cls, profile, **o: cls(profile, **{**quick, **o})),
    )
    roof = {"read_bytes": 1e10, "flops": 1e11, "mm_flops": 5e10, "bf16_flops": 2e11}
    monkeypatch.setattr(runner, "ceilings", lambda device, dtype: roof)
    slow = "torch.compile"
    without = [p for p in runner.providers_for(HEAVY) if slow not in p.name]
    monkeypatch.setattr(
        runner, "providers_for", lambda case, peers: [p for p in without if p.takes(case)]
    )


def test_a_run_writes_json_charts_and_page(tiny, tmp_path, capsys) -> None:
    command = ["bench", "--out", str(tmp_path), "--measure", "time"]
    assert main([*command, "--case", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert f"\n{OURS} " in shown and "times as fast as" in shown and "x ours" in shown
    assert main([*command, "--case", "tiny-heavy", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["cases"]) == ["tiny-heavy"]
    kept = json.loads((tmp_path / "small.json").read_text())
    assert list(kept["cases"]) == ["tiny", "tiny-heavy"]
    record = kept["cases"]["tiny-heavy"]
    assert {"ours", "plain", "autograd"} == {row["family"] for row in record["rows"]}
    assert all(row["problem"] is None and row["peak_bytes"] is None for row in record["rows"])
    assert record["measured"]["torch"] == torch.__version__
    for name in ("small_speed.png", "small_roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "small.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<h2>tiny-heavy</h2>" in page
    assert "src='http" not in page and "<script" not in page

    # Memory of what has been timed, in a run of its own.
    rows = {row["provider"]: row for row in record["rows"]}
    assert main(["bench", "--out", str(tmp_path), "--case", "tiny", "--measure", "memory"]) == 0
    kept = json.loads((tmp_path / "small.json").read_text())
    rows = {row["provider"]: row for row in kept["cases"]["tiny"]["rows"]}
    assert rows[OURS]["peak_bytes"] is not None or rows[OURS]["no_peak"]
    assert (tmp_path / "small.json").is_file()


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
        (["--write-gate"], "--write-gate needs --gate FILE"),
        (["--compare", "a.json", "b.json"], "a.json: No such file or directory"),
        (["--draw", "a.json"], "a.json: No such file or directory"),
        (
            ["--out", str(tmp_path), "--case", "tiny", "--measure", "memory"],
            "has no times of tiny; measure all or time first",
        ),
    ):
        assert main(["bench", *words]) == 2, words
        assert message in capsys.readouterr().err


def test_list_and_compare(tiny, tmp_path, capsys) -> None:
    assert main(["bench", "--list"]) == 0
    assert "tiny-heavy" in capsys.readouterr().out
    command = ["bench", "--case", "tiny", "--measure", "time", "--quiet", "--out"]
    for folder in ("a", "b"):
        assert main([*command, str(tmp_path / folder)]) == 0
    assert not capsys.readouterr().out
    files = [str(tmp_path / folder / "small.json") for folder in ("a", "b")]
    assert main(["bench", "--compare", *files, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["case"] for row in answer["rows"]} == {"tiny"}
    assert main(["bench", "--compare", files[0], files[0]]) == 0
    assert "ratios within 15%; largest change +0%" in capsys.readouterr().out


def test_growth_chart(tmp_path) -> None:
    from moso_fast.bench.charts import draw_all

    entry = {"seconds": [1e-3, 2e-3], "peak_bytes": [2**21, 2**22], "time_exponent": 1.0,
             "memory_exponent": 1.0}  # fmt: skip
    sweep = {"sizes": [10, 20], "fixed": {"C": 3}, "providers": {OURS: entry}}
    measured = {"torch": "2", "backend": "cpu"}
    record = {"measured": measured, "speedup": None, "floor_seconds": None, "rows": []}
    results = {
        "profile": "full",
        "machine": {"processor": "p", "threads": 1},
        "cases": {"c": record},
        "growth": {"N": sweep, "C": sweep},
    }
    assert [p.name for p in draw_all(results, tmp_path)] == ["full_growth.png"]


def test_the_speed_chart_names_what_was_measured() -> None:
    from moso_fast.bench.charts import speed

    naive = {"provider": "naive", "family": "plain", "seconds": 1e-3, "times_ours": 2.0}
    record = {"speedup": 2.0, "rows_scored": 10, "rows": [naive],
              "measured": {"torch": "2", "backend": "cpu"}}  # fmt: skip
    machine = {"processor": "p", "threads": 1}
    figure = speed({"profile": "full", "machine": machine, "cases": {"c": record}})
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["best plain PyTorch", "naive closed form"]
