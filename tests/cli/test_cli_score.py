"""`moso-fast score`: what it computes of files, and of a model and its data."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import SCORE, C, D, N, inputs, run
from safetensors.torch import save_file

import moso_fast
from moso_fast.functional import last_layer_stats
from moso_fast.scoring.partition import partition_ids
from moso_fast.tables.table import ScoreTable


def test_score_equals_the_library(folder, capsys):
    words = SCORE + " --head h1.safetensors:fc.weight,fc.bias --head c2.pt --lr 1 --lr .5 --lr .25"
    facts = json.loads(run(capsys, words + " --num-steps 40 --json").out)
    table = ScoreTable.load("o.parquet")
    stats = last_layer_stats(*inputs())
    expected = sum(stats.scores(scale=0.5**k)[k].double() for k in range(3)) * 40 / (3 * N)
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(table.per_checkpoint["el2n"], stats.el2n)
    assert facts["samples"] == facts["scored"] == N and facts["checkpoints"] == 3
    assert facts["backend"] == stats.backend == table.provenance["backend"]
    assert [c["lr"] for c in table.provenance["checkpoints"]] == [1.0, 0.5, 0.25]


def test_score_within_parts_and_by_zscore(folder, capsys):
    heads = " --head h1.safetensors --combine zscore"
    run(capsys, SCORE + heads + " --partition 3 --seed 5")
    features, weight, labels, bias = inputs()
    ids = partition_ids(N, 3, 5)
    expected = torch.zeros(N, dtype=torch.float64)
    for part in range(3):
        rows = ids == part
        scores = last_layer_stats(features[rows], weight[:2], labels[rows], bias[:2]).scores()
        scores = scores.double()
        scaled = (scores - scores.mean(1, True)) / scores.std(1, correction=0, keepdim=True)
        expected[rows] = scaled.mean(0)
    table = ScoreTable.load("o.parquet")
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-5, atol=1e-6)
    np.save("ids.npy", ids.numpy())
    run(capsys, SCORE + heads + " --partition ids.npy")
    assert torch.equal(ScoreTable.load("o.parquet").scores, table.scores)


def test_heads_of_different_shape_are_checkpoints_too(folder, capsys):
    save_file({"w": torch.randn(C + 2, D), "b": torch.randn(C + 2)}, "wide.safetensors")
    run(capsys, SCORE + " --head wide.safetensors:w,b --head h1.safetensors")
    table = ScoreTable.load("o.parquet")
    stats = last_layer_stats(*inputs())
    assert table.per_checkpoint["loss"].shape == (3, N)
    torch.testing.assert_close(table.per_checkpoint["loss"][0], stats.loss[0])
    torch.testing.assert_close(table.per_checkpoint["loss"][2], stats.loss[1])


def test_model_mode_equals_file_mode(folder, capsys):
    heads = " ".join(f"--head c{k}.pt" for k in range(3))
    run(capsys, f"score --features F.npy --labels y.npy {heads} -o files.npz")
    points = " ".join(f"--checkpoint c{k}.pt" for k in range(3))
    source = "--model cli_user_module:net --data cli_user_module:data"
    run(capsys, f"score {source} {points} -o model.npz")
    one, other = ScoreTable.load("files.npz"), ScoreTable.load("model.npz")
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-8)
    assert [c["lr"] for c in other.provenance["checkpoints"]] == [1.0, 0.5, 0.25]
    run(capsys, "score --model cli_user_module:ready --data cli_user_module:data -o now.csv")
    assert ScoreTable.load("now.csv").per_checkpoint["score"].shape == (1, N)


def test_safetensors_features_and_ignored_labels(folder, capsys):
    features = torch.from_numpy(np.load("F.npy"))
    save_file({"x": features.bfloat16(), "y": torch.zeros(1)}, "F.safetensors")
    labels = np.load("y.npy").astype(np.uint16)
    labels[7] = 999
    np.save("y16.npy", labels)
    words = SCORE.replace("F.npy", "F.safetensors:x").replace("y.npy", "y16.npy")
    facts = json.loads(run(capsys, words + " --ignore-index 999 --json").out)
    assert (facts["scored"], facts["unscored"]) == (N - 1, 1)
    assert ScoreTable.load("o.parquet").provenance["precision"] == "medium"


def test_nonfinite_rows_can_be_excluded(folder, capsys):
    features = np.load("F.npy")
    features[11] = np.nan
    np.save("F.npy", features)
    run(capsys, SCORE, code=2)
    run(capsys, SCORE + " --nonfinite exclude")
    scores = ScoreTable.load("o.parquet").scores
    assert scores.isnan().nonzero().flatten().tolist() == [11]


def test_features_are_never_written_to(folder, capsys):
    before = Path("F.npy").read_bytes()
    os.chmod("F.npy", 0o400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(capsys, SCORE + " --partition 2")
    assert Path("F.npy").read_bytes() == before


def test_heads_with_and_without_a_bias_are_scored_apart(folder, capsys):
    """And those of other dtypes: each as if it were the only one."""
    _, weight, _, bias = inputs()
    save_file({"fc.weight": weight[0]}, "plain.safetensors")
    save_file({"fc.weight": weight[1].double(), "fc.bias": bias[1].double()}, "wide.safetensors")
    heads = ["h0", "plain", "h2", "wide"]
    words = "score --features F.npy --labels y.npy -o o.npz " + " ".join(
        f"--head {name}.safetensors" for name in heads
    )
    run(capsys, words)
    found = ScoreTable.load("o.npz")
    # A library's product of stacked heads may sum in another order than that of one.
    atol = 1e-7 if found.provenance["backend"] == "torch" else 1e-9
    for k, name in enumerate(heads):
        alone = f"score --features F.npy --labels y.npy -o one.npz --head {name}.safetensors"
        run(capsys, alone)
        one = ScoreTable.load("one.npz").per_checkpoint
        for field, values in one.items():
            torch.testing.assert_close(
                found.per_checkpoint[field][k], values[0], rtol=1e-6, atol=atol
            )


@pytest.mark.parametrize("parts", ["", " --partition 3"])
def test_the_record_says_how_many_samples_count(folder, capsys, parts):
    labels = np.load("y.npy")
    labels[::9] = -100
    np.save("y.npy", labels)
    run(capsys, SCORE + parts)
    origin = ScoreTable.load("o.parquet").provenance
    assert (origin["samples"], origin["counted"]) == (N, int((labels >= 0).sum()))


def test_json_is_strict_where_nothing_is_scored(folder, capsys):
    np.save("y.npy", np.full(N, -100))
    facts = json.loads(run(capsys, SCORE + " --json").out)
    assert (facts["scored"], facts["unscored"]) == (0, N) and "score" not in facts


def test_a_full_disk_leaves_the_old_result(folder, capsys, monkeypatch):
    run(capsys, SCORE)
    before = Path("o.parquet").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "o.parquet")

    monkeypatch.setattr(moso_fast.util.files.os, "replace", full)
    result = run(capsys, SCORE + " --formula alignment", code=2)
    assert result.err == "moso-fast: o.parquet: No space left on device\n"
    assert Path("o.parquet").read_bytes() == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
