"""`moso-fast prune` and `moso-fast report`: what they make of a table of scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import run

from moso_fast.tables.table import ScoreTable


def test_prune_writes_data_set_indices(scored, capsys):
    text = run(capsys, "prune --scores s.npz --keep 0.25 -o kept.npy").out
    best = table_indices(scored, scored.scores.nan_to_num(nan=-9e9), 5)
    assert np.load("kept.npy").tolist() == best and np.load("kept.npy").dtype == np.int64
    assert "kept" in text and "5" in text
    run(capsys, "prune --scores s.npz --keep 25% -o kept.txt --quiet")
    assert [int(line) for line in Path("kept.txt").read_text().split()] == best
    run(capsys, "prune --scores s.npz --keep 5 -o kept.csv")
    lines = Path("kept.csv").read_text().splitlines()
    assert lines[0] == "index,score" and [int(w.split(",")[0]) for w in lines[1:]] == best
    value = {int(w.split(",")[0]): float(w.split(",")[1]) for w in lines[1:]}
    row = scored.index.tolist().index(best[0])
    assert value[best[0]] == pytest.approx(float(scored.scores[row]), rel=1e-7)


def test_the_table_is_an_argument_or_an_option(scored, capsys):
    run(capsys, "prune --scores s.npz --keep 5 -o one.npy")
    run(capsys, "prune s.npz --keep 5 -o other.npy")
    run(capsys, "prune --keep 5 -o third.npy s.npz")
    assert Path("one.npy").read_bytes() == Path("other.npy").read_bytes()
    assert Path("one.npy").read_bytes() == Path("third.npy").read_bytes()
    assert (
        run(capsys, "report s.npz -o plots").out
        == run(capsys, "report --scores s.npz -o plots").out
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("keep", "kept", "said"),
    [
        ("1", 1, "1 sample (a count; 1.0 or 100% keeps all)"),
        ("5", 5, "5 samples (a count)"),
        ("0.5", 10, "the fraction 0.5 of 20"),
        ("1e-1", 2, "the fraction 0.1 of 20"),
        ("25 %", 5, "the fraction 0.25 of 20"),
    ],
)
def test_prune_says_how_it_read_the_share(scored, capsys, keep, kept, said):
    words = ["prune", "s.npz", "--keep", keep, "-o", "kept.npy"]
    assert f"keep          {said}" in run(capsys, words).out
    facts = json.loads(run(capsys, [*words, "--json"]).out)
    assert (facts["keep"], facts["kept"]) == (said, kept) and len(np.load("kept.npy")) == kept
    assert run(capsys, [*words, "--quiet"]).out == ""
    assert f"keep      {said}" in run(capsys, ["report", "s.npz", "--keep", keep, "-o", "r"]).out


def test_a_table_that_low_scores_lead_is_pruned_and_drawn_that_way(scored, capsys, monkeypatch):
    from moso_fast.tables import report as plots

    table = ScoreTable(torch.arange(4.0), index=torch.tensor([8, 6, 4, 2]), higher_is_better=False)
    table.save("low.csv")
    Path("low.csv").rename("moved.csv")
    assert run(capsys, "prune moved.csv --keep 0.5 -o kept.npy").err == ""
    assert np.load("kept.npy").tolist() == [6, 8]
    seen = {}
    monkeypatch.setattr(plots, "score_histogram", lambda _, path, **how: seen.update(how) or path)
    run(capsys, "report moved.csv --keep 0.5 -o r")
    assert seen == {"cut": 1.0, "xlabel": "score (low = keep)"}


def test_another_column_keeps_its_direction_in_a_table_that_low_scores_lead(folder, capsys):
    """The table says of its score that low means keep; top of a metric is still its highest."""
    table = ScoreTable(torch.arange(6.0), {"el2n": torch.arange(6.0)}, higher_is_better=False)
    table.save("low.npz")
    for words, kept in (
        ("--by el2n", [4, 5]),
        ("--by el2n --method bottom", [0, 1]),
        ("--by score", [0, 1]),
        ("--by score --method bottom", [4, 5]),
    ):
        run(capsys, f"prune low.npz --keep 2 -o kept.npy {words}")
        assert np.load("kept.npy").tolist() == kept


def test_warnings_about_a_table_take_one_line_on_stderr(folder, capsys):
    Path("bare.csv").write_text("index,score,file\n3,0.5,a.png\n1,0.25,b.png\n")
    result = run(capsys, "prune bare.csv --keep 1 -o kept.npy --json --quiet")
    lines = result.err.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("moso-fast: warning: bare.csv: ") for line in lines
    )
    assert "'file' holds text" in lines[0] and "high is assumed" in lines[1]
    assert json.loads(result.out)["kept"] == 1 and np.load("kept.npy").tolist() == [3]


def table_indices(table, values, count):
    return sorted(table.index[values.argsort(descending=True)[:count]].tolist())


def test_prune_by_another_column_and_direction(scored, capsys):
    words = "prune --scores s.npz --keep 5 --by el2n --method bottom -o kept.npy --json"
    facts = json.loads(run(capsys, words).out)
    assert np.load("kept.npy").tolist() == table_indices(scored, -scored.metrics["el2n"], 5)
    assert facts["highest_kept"] == pytest.approx(float(scored.metrics["el2n"].sort().values[4]))


def test_prune_balances_by_labels_of_the_data_set(scored, capsys):
    labels = np.arange(60) % 3
    np.save("all.npy", labels)
    words = "prune --scores s.npz --keep 9 --labels all.npy --balance equal -o kept.npy --json"
    facts = json.loads(run(capsys, words).out)
    kept = np.load("kept.npy")
    assert np.bincount(labels[kept]).tolist() == [3, 3, 3]
    assert facts["kept_per_class"] == {"0": 3, "1": 3, "2": 3}


@pytest.mark.exhaustive
def test_report_draws_what_the_input_allows(scored, capsys):
    facts = json.loads(run(capsys, "report --scores s.npz -o plots --keep 0.5 --json").out)
    names = ["score_histogram.png", "metrics.png", "checkpoints.png"]
    assert facts["wrote"] == [f"plots/{name}" for name in names]
    assert sorted(p.name for p in Path("plots").iterdir()) == sorted(names)
    np.save("images.npy", np.random.default_rng(0).random((60, 5, 5)))
    np.save("wrong.npy", np.arange(60) % 2)
    words = "report --scores s.npz -o more --images images.npy --labels wrong.npy"
    run(capsys, words + " --errors wrong.npy --quiet")
    assert {p.name for p in Path("more").iterdir()} == {*names, "extremes.png", "label_errors.png"}


def test_no_image_is_drawn_twice_where_there_are_few(folder, capsys, monkeypatch):
    from moso_fast.tables import report as plots

    np.save("images.npy", np.random.default_rng(0).random((60, 4, 4)))
    given = []
    monkeypatch.setattr(plots, "score_histogram", lambda _, path, **how: path)
    monkeypatch.setattr(
        plots, "extremes", lambda pictures, captions, scores, path: given.append(captions) or path
    )
    for count in (1, 2, 9, 10, 11, 19, 20, 21, 40):
        index = torch.randperm(60, generator=torch.Generator().manual_seed(count))[: count + 1]
        scores = torch.randperm(count + 1, generator=torch.Generator().manual_seed(0)).float()
        scores[count // 2] = torch.nan
        ScoreTable(scores, index=index).save("few.npz")
        run(capsys, "report few.npz --images images.npy -o r")
        order = index[scores.nan_to_num(-1).argsort()[1:]].tolist()
        expected = order if count <= 20 else order[:10] + order[-10:]
        assert sorted(given.pop().tolist()) == sorted(expected)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("prune s.npz --keep 1 -o k.npy --balance equal --labels {}", "labels"),
        ("report s.npz -o r --labels {}", "labels"),
        ("report s.npz -o r --images {}", "images"),
        ("report s.npz -o r --errors {}", "flags"),
    ],
)
def test_a_file_of_the_data_set_that_is_one_entry_short(scored, capsys, words, what, monkeypatch):
    from moso_fast.tables import report as plots

    drawings = ("score_histogram", "metric_panels", "checkpoint_bands", "extremes")
    for name in (*drawings, "label_error_curve"):
        monkeypatch.setattr(plots, name, lambda *given, **how: Path("r"))
    last = int(scored.index.max())
    entries = np.arange(last + 1) % 2
    if what == "images":
        entries = np.random.default_rng(0).random((last + 1, 4, 4))
    np.save("whole.npy", entries)
    np.save("short.npy", entries[:-1])
    run(capsys, words.format("whole.npy"))
    error = run(capsys, words.format("short.npy"), code=2).err
    said = f"the scores refer to index {last}, the file has {last}"
    assert f"short.npy must hold {what} of the whole data set: {said}" in error
