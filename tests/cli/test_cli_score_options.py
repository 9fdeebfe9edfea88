"""`moso-fast score`: every option where it belongs, and every refusal in full."""

from __future__ import annotations

import importlib
import json
import types

import numpy as np
import pytest
import torch
from cli_support import run
from torch import nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.tables.table import ScoreTable

score = importlib.import_module("moso_fast.cli.score")

HEADS = "score --features F.npy --labels y.npy -o o.npz"
MODEL = "score --model m:net --data m:data -o o.npz"
DEFAULTS = {"device": None, "loss": "cross_entropy", "label_smoothing": 0.0, "ignore_index": -100,
            "precision": None, "backend": "auto", "chunk_size": None, "nonfinite": "raise",
            "progress": True}  # fmt: skip
HOW = {"formula": "moso", "combine": "mean", "num_steps": None, "partition": None, "seed": 0}
FULL = {"gradient": "last_layer", "scope": None, "views": 1, "autocast": None, "batch_size": 256}
WORDS = (
    "--formula official --combine zscore --partition 3 --loss mse --label-smoothing .25 "
    "--ignore-index 7 --precision high --backend torch --chunk-size 9 --nonfinite exclude "
    "--seed 5 --device cpu --quiet"
)
SET = {"device": torch.device("cpu"), "loss": "mse", "label_smoothing": 0.25, "ignore_index": 7,
       "precision": "high", "backend": "torch", "chunk_size": 9, "nonfinite": "exclude",
       "progress": False}  # fmt: skip
SET_HOW = {"formula": "official", "combine": "zscore", "num_steps": None, "partition": 3, "seed": 5}


def table():
    scores = torch.tensor([0.5, float("nan"), 2.5, -1.0])
    facts = {"checkpoints": [1, 2], "partition": {"parts": 3}, "backend": "one"}
    return ScoreTable(scores, provenance=facts)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Have scoring write down what it is asked for, and take two seconds."""
    monkeypatch.chdir(tmp_path)
    seen = []
    net = nn.Linear(2, 3)

    class Scorer:
        def __init__(self, model, **options):
            seen.append((model, options))

        def score(self, data, points, **how):
            seen.append((data, points and [vars(point) for point in points], how))
            return table()

    def score_files(*given, **options):
        seen.append((given, options))
        return table()

    def import_object(path, option, finished=None):
        seen.append((path, option, finished))
        return {"m:net": net, "m:data": "the data", "m:other": [1]}[path]

    monkeypatch.setattr("moso_fast.scoring.from_files.score_files", score_files)
    monkeypatch.setattr("moso_fast.scorer.MoSoScorer", Scorer)
    monkeypatch.setattr("moso_fast.sources.import_path.import_object", import_object)
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr(
        score, "time", types.SimpleNamespace(perf_counter=lambda: next(clock) + 0.12345)
    )
    return types.SimpleNamespace(seen=seen, net=net)


def test_options_of_files(asked, capsys) -> None:
    run(capsys, f"{HEADS} --head a.npz")
    run(
        capsys,
        f"{HEADS} --head a.npz --head b.npz --lr .5 --lr 0 --num-steps 8 {WORDS} --combine mean",
    )
    files = ("F.npy", "y.npy")
    assert asked.seen == [
        ((*files, ["a.npz"]), {"lr": None, "lr_option": "--lr", **DEFAULTS, **HOW}),
        (
            (*files, ["a.npz", "b.npz"]),
            {"lr": [0.5, 0.0], "lr_option": "--lr", **SET, **SET_HOW, "combine": "mean",
             "num_steps": 8},
        ),
    ]  # fmt: skip


def test_options_of_a_model(asked, capsys) -> None:
    run(capsys, MODEL)
    imports = [("m:net", "--model", nn.Module), ("m:data", "--data", None)]
    assert asked.seen == [
        *imports, (asked.net, {**DEFAULTS, **FULL}), ("the data", None, HOW),
    ]  # fmt: skip
    asked.seen.clear()
    more = "--gradient full --scope a --scope b.* --views 4 --autocast float16 --batch-size 7"
    points = "--checkpoint a.pt --checkpoint b.pt --entry ema.net --lr .5 --lr .25"
    run(capsys, f"{MODEL} {more} {points} {WORDS}")
    full = {"gradient": "full", "scope": ["a", "b.*"], "views": 4, "autocast": torch.float16,
            "batch_size": 7}  # fmt: skip
    made = [
        vars(Checkpoint(f"{name}.pt", lr, entry="ema.net"))
        for name, lr in zip("ab", (0.5, 0.25), strict=True)
    ]
    assert asked.seen == [
        *imports, (asked.net, {**SET, **full}), ("the data", made, SET_HOW),
    ]  # fmt: skip
    asked.seen.clear()
    run(capsys, f"{MODEL} --checkpoint a.pt --autocast bfloat16")
    assert asked.seen[2][1]["autocast"] == torch.bfloat16
    assert asked.seen[3][1] == [vars(Checkpoint("a.pt"))]


def test_what_is_said_of_a_run(asked, capsys) -> None:
    facts = {
        "output": "o.npz", "samples": 4, "scored": 3, "unscored": 1,
        "score": {"min": -1.0, "median": 0.5, "max": 2.5}, "checkpoints": 2, "formula": "moso",
        "combine": "mean", "partition": {"parts": 3}, "backend": "one", "seconds": 2.0,
    }  # fmt: skip
    assert json.loads(run(capsys, f"{MODEL} --json").out) == facts
    assert run(capsys, MODEL).out == (
        "output       o.npz\nsamples      4\nscored       3\nunscored     1\n"
        "score        min -1, median 0.5, max 2.5\ncheckpoints  2\nformula      moso\n"
        "combine      mean\npartition    parts 3\nbackend      one\nseconds      2\n"
    )
    assert run(capsys, f"{MODEL} --quiet").out == ""
    torch.testing.assert_close(ScoreTable.load("o.npz").scores, table().scores, equal_nan=True)


REFUSED = [
    (
        f"{HEADS} --head a --checkpoint c.pt",
        "--features and --checkpoint exclude each other: files or a model",
    ),
    (f"{MODEL} --head a", "--head and --model exclude each other: files or a model"),
    (
        "score -o o.npz",
        "nothing to score: give --features, --labels and --head, or --model and --data",
    ),
    ("score --labels y -o o.npz", "--features, --head must go with --labels"),
    ("score --data m:d -o o.npz", "--model must go with --data"),
    ("score --checkpoint c.pt -o o.npz", "--model, --data must go with --checkpoint"),
    (f"{MODEL} --entry x", "--entry x goes with --checkpoint, in whose files it is looked up"),
    (f"{HEADS} --head a --lr 1 --lr 2", "give one --lr for each --head: got 2 for 1"),
    (
        f"{MODEL} --checkpoint a --checkpoint b --lr 1",
        "give one --lr for each --checkpoint: got 1 for 2",
    ),
    (f"{MODEL} --lr 1", "give one --lr for each --checkpoint: got 1 for 0"),
    (f"{HEADS} --head a --lr inf", "--lr must be a number >= 0; got inf"),
    (f"{HEADS} --head a --lr nan", "--lr must be a number >= 0; got nan"),
    (f"{HEADS} --head a --head b --lr 1 --lr -0.5", "--lr must be a number >= 0; got -0.5"),
    (
        f"{HEADS} --head a --gradient full",
        "--gradient full goes with --model and --data, not with files",
    ),
    (f"{HEADS} --head a --scope x", "--scope goes with --gradient full, --model and --data"),
    (f"{HEADS} --head a --views 2", "--views goes with --gradient full, --model and --data"),
    (
        f"{HEADS} --head a --autocast float16",
        "--autocast goes with --gradient full, --model and --data",
    ),
    (f"{MODEL} --autocast half", "--autocast must be bfloat16 or float16; got 'half'"),
    (MODEL.replace("m:net", "m:other"), "--model m:other must give an nn.Module; got list"),
    (
        f"{MODEL} --partition x.txt",
        "--partition must be a number of parts or an .npy file; got 'x.txt'",
    ),
    (MODEL.replace("o.npz", "o.xlsx"), "--output must end in .parquet, .csv, .npz; got 'o.xlsx'"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_a_refusal_is_one_line(asked, capsys, words, message) -> None:
    result = run(capsys, words, code=2)
    assert result == ("", f"moso-fast: {message}\n")
    assert not any(len(entry) == 2 and isinstance(entry[1], dict) for entry in asked.seen)


def test_a_partition_is_a_number_or_a_file(tmp_path) -> None:
    assert score._partition(None) is None and score._partition("12") == 12
    np.save(tmp_path / "ids.npy", np.array([2, 0, 1]))
    assert score._partition(str(tmp_path / "ids.npy")).tolist() == [2, 0, 1]
