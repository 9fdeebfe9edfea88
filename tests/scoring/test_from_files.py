"""score_files: what the command line does with features and heads, from files and from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scorer_cases import same_table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast import Checkpoint, MoSoScorer, ScoreTable, moso_scores, score_files
from moso_fast.cli import main
from moso_fast.core import problem as problem_module
from moso_fast.core.errors import DataError
from moso_fast.core.losses import LOSSES
from moso_fast.scoring import mapped
from moso_fast.scoring.partition import partition_ids

N, D, C, K = 48, 6, 4, 3
RATES = [0.5, 0.25, 0.125]


@pytest.fixture
def data(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "features": torch.randn(N, D, generator=generator),
        "labels": torch.arange(N) % C,
        "weight": torch.randn(K, C, D, generator=generator),
        "bias": torch.randn(K, C, generator=generator),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Tensor]) -> Path:
    """Files of the data, and the head of each checkpoint."""
    monkeypatch.chdir(tmp_path)
    np.save("F.npy", data["features"].numpy())
    np.save("y.npy", data["labels"].numpy())
    for k in range(K):
        head = {"fc.weight": data["weight"][k], "fc.bias": data["bias"][k]}
        save_file({n: t.contiguous() for n, t in head.items()}, f"h{k}.safetensors")
        torch.save({"net": head, "lr": RATES[k]}, f"c{k}.pt")
    return tmp_path


FILES = [f"h{k}.safetensors" for k in range(K)]
TORCH = [f"c{k}.pt" for k in range(K)]


def score(*arguments: Any, **options: Any) -> ScoreTable:
    return score_files(*arguments, progress=False, **options)


def test_every_way_to_give_the_same_is_the_same(folder: Path, data: dict[str, Tensor]) -> None:
    features, labels = data["features"], data["labels"]
    pairs = list(zip(data["weight"], data["bias"], strict=True))
    expected = moso_scores(features, data["weight"], labels, data["bias"])
    table = score("F.npy", "y.npy", FILES, lr=RATES)
    rates = torch.tensor(RATES, dtype=torch.float64)[:, None]
    assert torch.equal(table.scores, (expected.double() * rates).mean(0).float())
    assert torch.equal(table.per_checkpoint["score"], (expected.double() * rates).float())
    states = [{"fc.weight": w, "fc.bias": b} for w, b in pairs]
    for heads, options in (
        (tuple(map(Path, FILES)), {"lr": RATES}),
        (TORCH, {}),
        ([Checkpoint(f, lr=rate) for f, rate in zip(FILES, RATES, strict=True)], {}),
        ([Checkpoint(one, lr=rate) for one, rate in zip(states, RATES, strict=True)], {}),
        (states, {"lr": RATES}),
        (pairs, {"lr": RATES}),
        ([(w.numpy(), b.tolist()) for w, b in pairs], {"lr": np.array(RATES)}),
    ):
        for x, y in ((Path("F.npy"), "y.npy"), (features.numpy(), labels.tolist())):
            other = score(x, y, heads, **options)
            assert same_table(other, table)
            assert torch.equal(other.index, torch.arange(N))
            assert [c["lr"] for c in other.provenance["checkpoints"]] == RATES


def test_a_single_head_needs_no_list(folder: Path, data: dict[str, Tensor]) -> None:
    first = score("F.npy", "y.npy", "h0.safetensors")
    assert first.per_checkpoint["loss"].shape == (1, N)
    assert first.provenance["learning_rates"] == "none given, 1.0 used"
    for head in (Path("h0.safetensors"), Checkpoint("h0.safetensors"), FILES[:1]):
        assert same_table(score("F.npy", "y.npy", head), first)
    plain = score("F.npy", "y.npy", data["weight"][1])
    for head in ("h1.safetensors:fc.weight", data["weight"][1].numpy(), {"w": data["weight"][1]}):
        assert same_table(score("F.npy", "y.npy", head), plain)


def test_a_rate_that_is_given_comes_before_that_of_the_file(folder: Path) -> None:
    table = score("F.npy", "y.npy", [Checkpoint("c0.pt", lr=3.0), "c1.pt"])
    assert [c["lr"] for c in table.provenance["checkpoints"]] == [3.0, 0.25]
    table = score("F.npy", "y.npy", [Checkpoint("c0.pt", lr=3.0), "c1.pt"], lr=[None, 2.0])
    assert [c["lr"] for c in table.provenance["checkpoints"]] == [3.0, 2.0]
    torch.save({"a": {"w": torch.ones(C, D)}, "b": {"w": torch.eye(C, D)}}, "two.pt")
    entry = score("F.npy", "y.npy", Checkpoint("two.pt", entry="b"))
    assert same_table(entry, score("F.npy", "y.npy", torch.eye(C, D)))


def test_it_is_what_the_command_line_does(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = "score --features F.npy --labels y.npy -o a.npz --quiet --partition 3 --seed 5 "
    words += "--formula official_exact --combine zscore --num-steps 9 --label-smoothing 0.1 "
    words += "--chunk-size 7 --precision high --ignore-index 2 --nonfinite exclude "
    assert main((words + " ".join(f"--head {name}" for name in TORCH)).split()) == 0
    options: dict[str, Any] = {
        "partition": 3,
        "seed": 5,
        "formula": "official_exact",
        "combine": "zscore",
        "num_steps": 9,
        "label_smoothing": 0.1,
        "chunk_size": 7,
        "precision": "high",
        "ignore_index": 2,
        "nonfinite": "exclude",
    }
    table = score("F.npy", "y.npy", TORCH, out="b.npz", **options)
    for path in ("a.npz", "b.npz"):
        stored = ScoreTable.load(path)
        assert same_table(stored, table) and stored.provenance == table.provenance
    assert table.scores.isnan().sum() == N // C


def test_model_and_files_tell_the_same_origin(folder: Path, data: dict[str, Tensor]) -> None:
    """One builder: what both say is said in the same words."""
    model = nn.Linear(D, C)
    states = [{"weight": data["weight"][k], "bias": data["bias"][k]} for k in range(K)]
    loader = TensorDataset(data["features"], data["labels"])
    call: dict[str, Any] = {"partition": partition_ids(N, 2, 3), "num_steps": 10}
    one = MoSoScorer(model, progress=False).score(loader, states, **call)
    other = score("F.npy", "y.npy", FILES, **call)
    assert same_table(one, other)
    for name in (
        *("moso_fast", "torch", "python", "backend", "loss", "label_smoothing", "ignore_index"),
        *("precision", "nonfinite", "samples", "counted", "formula", "combine", "num_steps"),
        *("seed", "partition", "learning_rates"),
    ):
        assert one.provenance[name] == other.provenance[name], name
    assert one.provenance["precision"] == "highest"
    assert one.provenance["partition"].startswith("2 parts, given ids, digest ")
    assert other.provenance["features"] == {"source": "F.npy", "shape": [N, D], "dtype": "float32"}
    assert other.provenance["labels"] == "y.npy"
    in_memory = score(data["features"], data["labels"], FILES).provenance
    assert (in_memory["features"]["source"], in_memory["labels"]) == ("features", "labels")


def test_heads_of_other_shapes_keep_their_places(data: dict[str, Tensor]) -> None:
    wide = torch.randn(C + 2, D)
    heads = [wide, data["weight"][0], wide * 2, (data["weight"][1], data["bias"][1])]
    table = score(data["features"], data["labels"], heads)
    for k, head in enumerate(heads):
        alone = score(data["features"], data["labels"], [head])
        assert torch.equal(table.per_checkpoint["score"][k], alone.scores)


def test_a_problem_is_built_once_for_all_parts(
    folder: Path, data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = problem_module.build_problem
    monkeypatch.setattr(
        mapped, "build_problem", lambda *a, **k: built.append(a[1].shape) or build(*a, **k)
    )
    wide = (torch.randn(C + 2, D), torch.randn(C + 2))
    score("F.npy", "y.npy", [FILES[0], wide, FILES[1]], partition=4)
    assert built == [(2, C, D), (1, C + 2, D)]


def test_views_whose_signs_are_not_changed_yet(data: dict[str, Tensor]) -> None:
    """Their memory holds other numbers than they do."""
    turned = torch._neg_view(-data["features"])
    assert turned.is_neg() and torch.equal(turned, data["features"])
    heads = [(data["weight"][0], data["bias"][0])]
    assert same_table(score(turned, data["labels"], heads), score(*_inputs(data), heads))


def _inputs(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return data["features"], data["labels"]


def test_progress_counts_heads_of_a_shape_by_parts(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.setattr("moso_fast.util.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    score_files("F.npy", "y.npy", [*FILES, torch.randn(C + 1, D)], partition=2)
    assert "scoring: 4/4 batches" in capsys.readouterr().err
    score_files("F.npy", "y.npy", FILES, partition=2, progress=False)
    assert capsys.readouterr().err == ""


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type, str]] = [
    (("F.npy", "y.npy", []), {}, ValueError, "heads is empty; give at least one"),
    (
        ("F.npy", "y.npy", 3),
        {},
        TypeError,
        "heads[0] must be a torch.Tensor, an array, a pandas column or a list of numbers; got int",
    ),
    (
        ("F.npy", "y.npy", torch.ones(2, C, D)),
        {},
        ValueError,
        "heads[0]: the weight 'weight' must be (C, D); got (2, 4, 6)",
    ),
    (
        ("F.npy", "y.npy", [FILES[0], (torch.ones(C, D), torch.ones(9))]),
        {},
        ValueError,
        "heads[1]: the bias 'bias' must be (4,) to go with 'weight' (4, 6); got (9,)",
    ),
    (
        ("F.npy", "y.npy", {"a": torch.ones(C, D), "b": torch.ones(C, D)}),
        {},
        ValueError,
        "heads[0] must hold one matrix, or be given as (weight, bias); matrices there: a "
        "(4, 6), b (4, 6)",
    ),
    (
        ("F.npy", "y.npy", {"a": torch.ones(C, D), "c": torch.ones(C)}),
        {},
        ValueError,
        "heads[0]: is 'c' the bias of 'a'? give the head as (weight, bias)",
    ),
    (
        ("F.npy", "y.npy", FILES),
        {"lr": [1.0]},
        ValueError,
        "lr= must give one learning rate a head; got 1 for 3",
    ),
    (
        ("F.npy", "y.npy", FILES),
        {"lr": [1.0, -2.0, 1.0]},
        ValueError,
        "h1.safetensors: lr must be a number >= 0, got -2.0",
    ),
    (
        ("F.npy", "y.npy", [TORCH[0], FILES[1]]),
        {},
        ValueError,
        "c0.pt states a learning rate and h1.safetensors does not: either all have one or none; "
        "give one lr= for each",
    ),
    (
        ("F.npy", "y.npy", [FILES[0], torch.ones(C, D + 1)]),
        {},
        ValueError,
        "heads[1] with F.npy, y.npy: weight (4, 7) and features (48, 6) disagree in D: 7 against 6",
    ),
    (
        (torch.ones(N, D), torch.ones(N), FILES[0]),
        {},
        TypeError,
        "h0.safetensors with features, labels: labels of shape (N,) must be integer class "
        "ids, got float32; probabilities have shape (N, C) = (48, 4), ids are "
        "labels.long(), and the target of a regression goes with loss='mse'",
    ),
    (
        ("y.npy", "y.npy", FILES),
        {},
        ValueError,
        "h0.safetensors with y.npy, y.npy: features must have shape (N, D), got (48,)",
    ),
    (
        ("F.npy", torch.ones(N, C) / C, [FILES[0], torch.ones(C + 1, D)]),
        {},
        ValueError,
        "heads[1] with F.npy, labels: labels must have shape (48,) class ids or (48, 5) "
        "probabilities to go with features (48, 6), got (48, 4)",
    ),
    (("no.npy", "y.npy", FILES), {}, FileNotFoundError, "there is no file no.npy"),
    (
        ("no.npy", "y.npy", FILES),
        {"loss": "x"},
        ValueError,
        f"loss must be one of {', '.join(LOSSES)}; got 'x'",
    ),
    (
        ("no.npy", "y.npy", FILES),
        {"formula": "x"},
        ValueError,
        "formula must be one of moso, one_step, official, official_exact, alignment, "
        "cosine; got 'x'",
    ),
    (
        ("no.npy", "y.npy", FILES),
        {"combine": "x"},
        ValueError,
        "combine must be one of mean, zscore; got 'x'",
    ),
    (
        ("no.npy", "y.npy", FILES),
        {"num_steps": 0},
        ValueError,
        "num_steps must be None or a whole number >= 1; got 0",
    ),
    (
        ("no.npy", "y.npy", FILES),
        {"out": "o.txt"},
        ValueError,
        "out must end in .parquet, .csv, .npz; got 'o.txt'",
    ),
    (
        ("no.npy", "y.npy", FILES),
        {"out": "x/o.csv"},
        FileNotFoundError,
        "cannot write x/o.csv: the folder x does not exist",
    ),
    (
        ("F.npy", "y.npy", FILES),
        {"partition": 30},
        ValueError,
        "partition: every part needs at least 2 samples to be scored against its own mean, "
        "part 18 has 1",
    ),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), REFUSED)
def test_what_cannot_be_scored_is_refused_in_one_line(
    folder: Path, given: tuple[Any, ...], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error) as caught:
        score(*given, **options)
    assert str(caught.value) == message


def test_rows_and_heads_in_errors_are_those_of_the_files(folder: Path) -> None:
    labels = np.load("y.npy")
    labels[33] = 99
    np.save("bad.npy", labels)
    with pytest.raises(DataError) as caught:
        score("F.npy", "bad.npy", FILES, partition=3)
    assert (caught.value.row, caught.value.value) == (33, 99)
    head = {"w": torch.ones(C, D), "bias": torch.tensor([0.0, 1.0, -torch.inf, 0.0])}
    torch.save(head, "broken.pt")
    with pytest.raises(ValueError) as refused:
        score("F.npy", "y.npy", [FILES[0], "broken.pt:w,bias"])
    assert str(refused.value) == (
        "broken.pt:w,bias: bias[2] is -inf; heads and weights must be finite"
    )


def test_out_is_written_whole_or_not_at_all(folder: Path) -> None:
    with pytest.raises(ValueError):
        score("F.npy", "y.npy", FILES, partition=30, out="o.csv")
    assert not Path("o.csv").exists()
    table = score("F.npy", "y.npy", FILES, out=Path("o.csv"))
    assert same_table(ScoreTable.load("o.csv"), table)
