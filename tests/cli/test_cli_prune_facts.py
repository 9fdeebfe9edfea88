"""`moso-fast prune` and `report` to the last character: files, facts, refusals, what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import run

from moso_fast.cli.prune import describe_keep, parse_keep
from moso_fast.tables import report as plots
from moso_fast.tables.table import ScoreTable

SCORES = [0.125, float("nan"), 3.5, -1.0, 2.0, 1.0]
INDEX = [9, 1, 4, 0, 6, 2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six samples of ten, one without a score, in order of neither score nor index."""
    monkeypatch.chdir(tmp_path)
    el2n, margin = torch.tensor([6.0, 5, 4, 3, 2, 1]), -torch.arange(6.0)
    more = {"loss": torch.full((6,), 0.5), "self_influence": torch.full((6,), 0.25)}
    metrics = {"el2n": el2n, "margin": margin, **more}
    ScoreTable(torch.tensor(SCORES), metrics, index=torch.tensor(INDEX)).save("s.npz")
    np.save("y.npy", np.array([5, 8, 5, 5, 5, 5, 8, 5, 5, 8]))
    return tmp_path


def test_kept_indices_in_every_format(folder, capsys) -> None:
    run(capsys, "prune s.npz --keep 3 -o k.npy")
    assert np.load("k.npy").tolist() == [2, 4, 6] and np.load("k.npy").dtype == np.int64
    run(capsys, "prune s.npz --keep 3 -o k.txt")
    assert Path("k.txt").read_text() == "2\n4\n6\n"
    run(capsys, "prune s.npz --keep 4 -o k.csv")
    assert Path("k.csv").read_text() == "index,score\n2,1\n4,3.5\n6,2\n9,0.125\n"
    run(capsys, "prune s.npz --keep 2 --by el2n -o k.csv")
    assert Path("k.csv").read_text() == "index,el2n\n1,5\n9,6\n"
    run(capsys, "prune s.npz --keep 0 -o k.csv")
    assert Path("k.csv").read_text() == "index,score\n"


def test_facts_of_a_pruned_table(folder, capsys) -> None:
    assert run(capsys, "prune s.npz --keep 3 -o k.npy").out == (
        "output        k.npy\nkeep          3 samples (a count)\nkept          3\nof            6\n"
        "unscored      1\nmethod        top\nby            score\nbalance       none\n"
        "lowest kept   1\nhighest kept  3.5\n"
    )
    common = {"output": "k.npy", "of": 6, "by": "score", "balance": None}
    facts = json.loads(run(capsys, "prune s.npz --keep 0.5 --method bottom -o k.npy --json").out)
    assert facts == {
        **common, "keep": "the fraction 0.5 of 6", "kept": 3, "unscored": 1, "method": "bottom",
        "lowest_kept": -1.0, "highest_kept": 1.0,
    }  # fmt: skip
    facts = json.loads(run(capsys, "prune s.npz --keep 0 --by el2n -o k.npy --json").out)
    assert facts == {
        **common, "by": "el2n", "keep": "0 samples (a count)", "kept": 0, "unscored": 0,
        "method": "top", "lowest_kept": None, "highest_kept": None,
    }  # fmt: skip


def test_facts_by_class(folder, capsys) -> None:
    words = "prune s.npz --keep 2 --labels y.npy -o k.npy"
    facts = json.loads(run(capsys, f"{words} --json").out)
    assert facts["kept_per_class"] == {"5": 1, "8": 1} and facts["balance"] is None
    facts = json.loads(run(capsys, f"{words} --by el2n --json").out)
    assert facts["kept_per_class"] == {"5": 0, "8": 2}  # a class that lost all is said too
    assert "kept per class  classes 2, min 0, max 2\n" in run(capsys, f"{words} --by el2n").out
    facts = json.loads(run(capsys, f"{words} --by el2n --balance equal --json").out)
    assert facts["kept_per_class"] == {"5": 1, "8": 1} and facts["balance"] == "equal"


def test_random_picks_go_by_the_seed(folder, capsys) -> None:
    kept = set()
    for seed in ("", *(f" --seed {k}" for k in range(12))):
        run(capsys, f"prune s.npz --keep 2 --method random -o k.txt{seed}")
        kept.add(Path("k.txt").read_text())
        if seed == " --seed 0":
            assert len(kept) == 1
    assert len(kept) > 3


def test_shares_and_how_they_are_read() -> None:
    for text, value in (("25000", 25000), ("1", 1), ("0", 0), ("1.0", 1.0), ("0.0", 0.0),
                        ("50%", 0.5), ("100%", 1.0), ("5 %", 0.05), ("1e-2", 0.01)):  # fmt: skip
        assert parse_keep(text) == value and type(parse_keep(text)) is type(value)
    for text in ("1.01", "101%", "-0.5", "-1", "x", "", "%", "nan", "5.0"):
        with pytest.raises(ValueError) as refused:
            parse_keep(text)
        assert str(refused.value) == (
            "--keep must be a fraction in [0, 1] (0.5), a percentage (50%) or a count (25000); "
            f"got {text!r}"
        )
    for wanted, said in (
        (1, "1 sample (a count; 1.0 or 100% keeps all)"),
        (12345, "12,345 samples (a count)"),
        (0.125, "the fraction 0.125 of 9,999"),
        (1.0, "the fraction 1 of 9,999"),
    ):
        assert describe_keep(wanted, 9999) == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune s.npz --keep 1 -o k.xyz", "--output must end in .npy, .txt, .csv; got 'k.xyz'"),
        ("prune s.npz --keep 1 --balance equal -o k.npy", "--balance equal needs --labels FILE"),
        ("report s.npz -o s.npz", "--output s.npz is a file; it must be a folder"),
        (
            "report s.npz -o r --images y.npy",
            "y.npy must hold (N, H, W) or (N, H, W, 3); got (10,)",
        ),
        (
            "report s.npz -o r --images four.npy",
            "four.npy must hold (N, H, W) or (N, H, W, 3); got (10, 2, 2, 4)",
        ),
        ("report none.npz -o r", "the table has no finite score: nothing to draw"),
        (
            "report s.npz -o r --errors none.npy",
            "none.npy must mark some but not all samples, shape (N,)",
        ),
        (
            "report s.npz -o r --errors all.npy",
            "all.npy must mark some but not all samples, shape (N,)",
        ),
        (
            "report s.npz -o r --errors square.npy",
            "square.npy must mark some but not all samples, shape (N,)",
        ),
    ],
)
def test_a_refusal_is_one_line_and_no_file(folder, capsys, words, message) -> None:
    ScoreTable(torch.tensor([float("nan"), float("inf")])).save("none.npz")
    np.save("four.npy", np.zeros((10, 2, 2, 4)))
    np.save("none.npy", np.zeros(10, dtype=int))
    np.save("all.npy", np.ones(10, dtype=int))
    np.save("square.npy", np.eye(10, dtype=int))
    before = set(Path().iterdir())
    assert run(capsys, words, code=2) == ("", f"moso-fast: {message}\n")
    assert set(Path().iterdir()) == before


@pytest.fixture
def drawn(monkeypatch):
    """Have every plot write down what it is given."""
    seen = {}
    for name in ("score_histogram", "metric_panels", "checkpoint_bands", "extremes",
                 "label_error_curve"):  # fmt: skip

        def draw(*given, name=name, **options):
            path = next(entry for entry in given if isinstance(entry, Path))
            seen[name] = ([entry for entry in given if entry is not path], options)
            return path

        monkeypatch.setattr(plots, name, draw)
    return seen


def listed(value):
    if isinstance(value, dict):
        return {name: listed(entry) for name, entry in value.items()}
    return value.nan_to_num(-9).tolist()


def test_what_the_plots_are_given(folder, capsys, drawn) -> None:
    pictures = np.arange(10.0)[:, None, None, None] * np.ones((10, 2, 2, 3))
    np.save("images.npy", pictures)
    np.save("wrong.npy", np.arange(10) % 2)
    words = "--images images.npy --labels y.npy --errors wrong.npy --keep 0.5"
    facts = json.loads(run(capsys, f"report s.npz -o new/r {words} --json").out)
    names = ["score_histogram", "metrics", "extremes", "label_errors"]
    assert facts == {
        "wrote": [f"new/r/{name}.png" for name in names], "samples": 6, "scored": 5, "unscored": 1,
        "score": {"min": -1.0, "median": 1.0, "max": 3.5}, "keep": "the fraction 0.5 of 6",
    }  # fmt: skip
    assert Path("new/r").is_dir()
    scores = [0.125, -9.0, 3.5, -1.0, 2.0, 1.0]
    (values,), how = drawn["score_histogram"]
    assert listed(values) == {"all samples": scores}
    assert how == {"cut": 1.0, "xlabel": "score (high = informative = keep)"}
    ((given,), how) = drawn["metric_panels"]
    assert given.index.tolist() == INDEX and how == {} and "checkpoint_bands" not in drawn
    (images, captions, values), how = drawn["extremes"]
    assert [float(image[0, 0, 0]) for image in images] == [9, 4, 0, 6, 2] and how == {}
    assert captions.tolist() == [8, 5, 5, 8, 5] and values.tolist() == [0.125, 3.5, -1, 2, 1]
    (suspicion, wrong), how = drawn["label_error_curve"]
    assert wrong.tolist() == [True, True, False, False, False, False] and how == {}
    assert listed(suspicion) == {
        "MoSo score (low first)": [-0.125, -9.0, -3.5, 1.0, -2.0, -1.0],
        "margin (low first)": [0.0, 1, 2, 3, 4, 5],
        "self_influence": [0.25] * 6, "el2n": [6.0, 5, 4, 3, 2, 1], "loss": [0.5] * 6,
    }  # fmt: skip
    assert run(capsys, "report s.npz -o r").out == (
        "wrote     r/score_histogram.png, r/metrics.png\nsamples   6\nscored    5\nunscored  1\n"
        "score     min -1, median 1, max 3.5\n"
    )
    assert drawn["score_histogram"][1]["cut"] is None
    run(capsys, "report s.npz -o r --images images.npy --keep 0")
    assert drawn["extremes"][0][1].tolist() == [9, 4, 0, 6, 2]  # without labels, the indices
    assert drawn["score_histogram"][1]["cut"] is None


def test_a_table_that_low_scores_lead(folder, capsys, drawn) -> None:
    low = ScoreTable(torch.tensor([1.0, 2.0, 3.0]), {"loss": torch.ones(3)}, higher_is_better=False)
    low.save("low.npz")
    np.save("wrong.npy", np.array([1, 0, 0]))
    run(capsys, "report low.npz -o r --keep 2 --errors wrong.npy")
    assert drawn["score_histogram"][1] == {"cut": 2.0, "xlabel": "score (low = keep)"}
    (suspicion, _), _ = drawn["label_error_curve"]
    assert listed(suspicion) == {"MoSo score (low first)": [1.0, 2.0, 3.0], "loss": [1.0] * 3}


def test_only_what_has_enough_values_is_drawn(folder, capsys, drawn) -> None:
    nan = float("nan")
    for metrics, checkpoints, names in (
        ({}, 0, []),
        ({"loss": torch.tensor([1.0, nan, 1.0])}, 1, []),
        ({"loss": torch.tensor([1.0, 1.0, nan])}, 2, ["metric_panels", "checkpoint_bands"]),
        ({"loss": torch.full((3,), nan), "el2n": torch.ones(3)}, 1, ["metric_panels"]),
    ):
        drawn.clear()
        each = {"score": torch.zeros(checkpoints, 3)} if checkpoints else {}
        ScoreTable(torch.tensor([1.0, 2.0, nan]), metrics, each).save("few.npz")
        run(capsys, "report few.npz -o r")
        assert [*drawn] == ["score_histogram", *names]
