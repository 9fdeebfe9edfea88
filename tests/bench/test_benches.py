"""`python -m benches`: a run with charts and page, comparison, growth, other libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benches import compare, growth, run
from benches.__main__ import COMMANDS
from benches.charts import page
from benches.charts.figures import draw_all, speed
from benches.peers import PROVIDERS
from moso_fast.bench import memory, runner, store
from moso_fast.bench.cases import CASES
from moso_fast.bench.providers import providers_for
from moso_fast.bench.providers.ours import OURS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.exhaustive
def test_a_run_writes_json_charts_and_page(tiny, tmp_path, capsys) -> None:
    command = ["--out", str(tmp_path), "--measure", "time"]
    assert run.main([*command, "--case", "tiny", "--no-charts"]) == 0
    assert f"\n{OURS} " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]
    assert run.main([*command, "--case", "tiny-heavy", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["cases"]) == ["tiny-heavy"]
    files = ("small.json", "small_speed.png", "small_roofline.png", "small.html")
    assert answer["wrote"] == [str(tmp_path / name) for name in files]
    for name in files[1:3]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "small.html").read_text()
    assert text.count("data:image/png;base64,") == 2 and "<h2>tiny-heavy</h2>" in text
    assert "src='http" not in text and "<script" not in text
    assert "<h2>tiny</h2>" in text

    (tmp_path / "small.html").unlink()
    assert page.main([str(tmp_path / "small.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["wrote"] == answer["wrote"][1:]
    assert (tmp_path / "small.html").read_text() == text


@pytest.mark.exhaustive
def test_a_run_has_the_libraries_where_asked(tiny, tmp_path) -> None:
    command = ["--out", str(tmp_path), "--measure", "time", "--case", "tiny-heavy", "--quiet"]
    named = {}
    for against in ("plain", "peers"):
        assert run.main([*command, "--no-charts", "--against", against]) == 0
        record = store.load(tmp_path / "small.json")["cases"]["tiny-heavy"]
        named[against] = {row["provider"] for row in (*record["rows"], *record["skipped"])}
    more = {p.name for p in PROVIDERS if p.family == "peer" and "head" in p.kinds}
    assert len(more) == 5 and named["peers"] - named["plain"] == more


def test_a_wrong_result_of_ours_is_exit_code_1(tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("moso_fast.bench.runner.errors_of", lambda result, truth: {"loss": 1.0})
    command = ["--out", str(tmp_path), "--measure", "time", "--case", "tiny", "--no-charts"]
    assert run.main(command) == 1
    assert f"wrong: tiny, {OURS}: wrong: relative error 1" in capsys.readouterr().err


def test_other_libraries_are_providers() -> None:
    for case in CASES.values():
        own = providers_for(case)
        every = providers_for(case, "benches.peers")
        names = [p.name for p in every]
        assert every[: len(own)] == own and len(names) == len(set(names))
        assert {p.family for p in every[len(own) :]} <= {"peer"}
        assert bool(every[len(own) :]) == (case.heavy and case.kind in ("head", "sequences"))


def test_memory_of_a_provider_of_another_registry(tmp_path, monkeypatch) -> None:
    """The process that measures imports the registry, from the path of the one that asks."""
    (tmp_path / "more_providers.py").write_text(
        "from dataclasses import replace\n"
        "from moso_fast.bench.providers.plain import PROVIDERS as PLAIN\n"
        "PROVIDERS = (replace(PLAIN[0], name='only there'),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = replace(CASES["c10-d512"], dim=8)
    peak, why = memory.peak_bytes_in_child(small, 64, "only there", 1, 60, "more_providers")
    assert why is None and peak is not None
    peak, why = memory.peak_bytes_in_child(small, 64, "only there", 1, 60)
    assert peak is None and why.startswith("failed: StopIteration")
    row = {"provider": "only there", "family": "peer", "seconds": 1.0, "errors": {}}
    record = {"rows_scored": 64, "rows": [row]}
    runner.add_memory(small, record, runner.Settings(registry="more_providers"))
    assert row["no_peak"] is None and row["peak_bytes"] is not None


def test_bad_input_is_exit_code_2(tiny, tmp_path, capsys) -> None:
    """Also where the file is another kind of file, or has not what is asked for."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    for main, words, message in (
        (run.main, ["--profile", "huge"], "invalid choice: 'huge'"),
        (run.main, ["--case", "nothing"], "benches: no case matches 'nothing'; known: tiny"),
        (run.main, ["--device", "tpu"], "benches: --device must be cpu, cuda or cuda:N"),
        (
            run.main,
            ["--out", str(tmp_path), "--case", "tiny", "--measure", "memory"],
            "has no times of tiny; measure all or time first",
        ),
        (compare.main, ["a.json", "b.json"], "benches: a.json: No such file or directory"),
        (compare.main, [str(other), str(other)], "other.json is no results file"),
        (page.main, ["a.json"], "benches: a.json: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2, words
        assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_two_runs_are_compared(tiny, tmp_path, capsys) -> None:
    for folder in ("a", "b"):
        command = ["--case", "tiny", "--measure", "time", "--quiet", "--no-charts", "--out"]
        assert run.main([*command, str(tmp_path / folder)]) == 0
    assert not capsys.readouterr().out
    files = [str(tmp_path / folder / "small.json") for folder in ("a", "b")]
    assert compare.main([*files, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["case"] for row in answer["rows"]} == {"tiny"}
    assert compare.main([files[0], files[0]]) == 0
    assert "ratios within 15%; largest change +0%" in capsys.readouterr().out


def _results(speed: float) -> dict:
    row = {"provider": "naive", "family": "plain", "seconds": speed, "times_ours": speed,
           "quartiles": [speed, speed], "rounds": 5}  # fmt: skip
    return {"cases": {"c10-d512": {"rows": [row], "noise": 0.02}}}


def test_second_run_is_held_to_the_first() -> None:
    first = _results(2.0)
    agreed, text = compare.verdict(compare.compare(first, _results(2.2)))
    assert agreed and text.startswith("1 of 1 ratios within 15%; largest change +10%")
    rows = compare.compare(first, _results(1.0))
    agreed, text = compare.verdict(rows)
    assert not agreed and "-50% (c10-d512, naive)" in text and "in 0 of the 1 others" in text
    rows[0]["noise"] = 0.4
    assert "in 1 of the 1 others" in compare.verdict(rows)[1]
    assert compare.verdict([])[0] is False


def test_exponents() -> None:
    sizes = [1, 2, 4, 8]
    assert growth.fit_exponent(sizes, [3 * s**2 for s in sizes]) == pytest.approx(2)
    assert growth.fit_exponent(sizes, [5.0] * 4) == pytest.approx(0)
    for bad in (([1, 1], [1, 2]), ([1, 2], [1]), ([1, 2], [0, 1])):
        with pytest.raises(ValueError, match=r"exponent|positive"):
            growth.fit_exponent(*bad)


@pytest.mark.exhaustive
def test_growth_along_rows(tiny, tmp_path, monkeypatch, capsys) -> None:
    """Measured alone it has no case to draw; the run that adds one draws both."""
    small = replace(growth.AXES["N"][0], classes=10, dim=16)
    for axis in set(growth.AXES) - {"N"}:
        monkeypatch.delitem(growth.AXES, axis)
    monkeypatch.setitem(growth.AXES, "N", (small, 0, (600, 1200, 2400, 4800)))

    def by_rows(jobs, rounds):  # seconds that grow as N^1.5; the jobs run for their shapes
        rows = {name: job()["loss"].numel() for name, job in jobs.items()}
        return {name: dict.fromkeys(range(rounds), n**1.5 / 1e6) for name, n in rows.items()}

    monkeypatch.setattr(growth, "interleaved", by_rows)
    command = ["--out", str(tmp_path), "--measure", "time", "--growth", "--json"]
    assert run.main(command) == 0
    assert json.loads(capsys.readouterr().out)["cases"] == {}
    sweep = store.load(tmp_path / "small.json")["growth"]["N"]
    assert sweep["fixed"] == {"C": 10, "D": 16, "K": 1}
    assert len(sweep["providers"]) == 2
    for entry in sweep["providers"].values():
        assert entry["seconds"] == pytest.approx(
            [n**1.5 / 1e6 for n in (600, 1200, 2400, 4800)], rel=1e-4
        )
        assert entry["time_exponent"] == pytest.approx(1.5, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]
    assert run.main(["--out", str(tmp_path), "--measure", "time", "--case", "tiny", "-q"]) == 0
    assert (tmp_path / "small_growth.png").is_file()


def test_growth_chart(tmp_path) -> None:
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
    naive = {"provider": "naive", "family": "plain", "seconds": 1e-3, "times_ours": 2.0}
    record = {"speedup": 2.0, "rows_scored": 10, "rows": [naive],
              "measured": {"torch": "2", "backend": "cpu"}}  # fmt: skip
    machine = {"processor": "p", "threads": 1}
    figure = speed({"profile": "full", "machine": machine, "cases": {"c": record}})
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["best plain PyTorch", "naive closed form"]


@pytest.mark.exhaustive
def test_every_command_answers_for_itself() -> None:
    for words, code in ((["--help"], 0), ([], 0), (["nonsense"], 2), (["run", "--list"], 0)):
        child = subprocess.run(
            [sys.executable, "-m", "benches", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert child.returncode == code, child.stderr
    for name in COMMANDS:
        child = subprocess.run(
            [sys.executable, "-m", "benches", name, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0 and f"usage: python -m benches {name}" in child.stdout
