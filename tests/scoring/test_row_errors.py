"""Errors about a row give its number in what the caller handed over, whoever scored a piece."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scorer_cases import CLASSES, N, SmallNet, images, scorer, trained
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from moso_fast import MoSoScorer, Surrogate, score_surrogates
from moso_fast.compat.script import main as compat_script
from moso_fast.core.errors import DataError
from moso_fast.scoring.mapped import head_problem
from moso_fast.scoring.parts import part_stats
from moso_fast.sources.checkpoints.checkpoint import Checkpoint

ROWS, DIM = 60, 7


def refused(run: Callable[[], Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return caught.value


def bad_label(given: dict) -> None:
    given["labels"][33] = 77


def bad_feature(given: dict) -> None:
    given["features"][33, 3] = -torch.inf


def overflow(given: dict) -> None:
    given["features"][33] = 1e38
    given["weight"][:, 0] = 1e3


def bad_weight(given: dict) -> None:
    given["sample_weight"] = torch.ones(ROWS)
    given["sample_weight"][33] = torch.nan


CHANGES = [
    (bad_label, None, 77.0, "labels[33] is 77, outside [0, 5) and not ignore_index (-100)"),
    (bad_feature, 3, -torch.inf, "features[33, 3] is -inf; row 33 is the first with a non-finite"),
    (overflow, None, None, "logits, loss or gradient of row 33 overflow float32 although"),
    (bad_weight, None, torch.nan, "sample_weight[33] is nan; heads and weights must be finite"),
]
# Two of these begin in the middle of the rows, and one is not adjacent.
PARTS = {
    "interleaved": torch.arange(ROWS) % 3,
    "halves": torch.arange(ROWS) // 30,
    "reversed ids": 7 - torch.arange(ROWS) // 20,
}


@pytest.mark.parametrize("parts", [None, *PARTS])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(("change", "column", "value", "text"), CHANGES)
def test_rows_of_a_part_are_those_of_the_whole(
    generator: torch.Generator,
    parts: str | None,
    sequences: bool,
    change: Callable[[dict], None],
    column: int | None,
    value: float | None,
    text: str,
) -> None:
    given = {
        "features": torch.randn(ROWS, DIM, generator=generator),
        "weight": torch.randn(5, DIM, generator=generator),
        "labels": torch.randint(5, (ROWS,), generator=generator),
    }
    change(given)
    where, ids = "", None
    if parts is not None:
        ids = PARTS[parts]
        where = f"part {int(ids[33])} of partition: "
    if sequences:  # of three rows each: the samples are 0..19, the rows as before
        given["cu_seqlens"] = torch.arange(0, ROWS + 1, 3)
        ids = None if ids is None else ids.view(-1, 3)[:, 0].contiguous()
        where = "" if ids is None else f"part {int(ids[11])} of partition: "
    error = refused(lambda: part_stats(head_problem(**given), partition=ids))
    assert str(error).startswith(where + text)
    assert (error.row, error.column) == (33, column)
    assert error.value == value or (error.value != error.value and value != value)


@pytest.mark.parametrize("partition", [None, 3])
@pytest.mark.parametrize("gradient", ["last_layer", "full"])
def test_labels_of_a_data_set(gradient: str, partition: int | None) -> None:
    inputs, labels = images().tensors
    wrong = labels.clone()
    wrong[17] = 9
    scored = scorer(SmallNet(), gradient=gradient)
    data = TensorDataset(inputs, wrong)
    error = refused(lambda: scored.score(data, partition=partition))
    assert (error.row, error.value) == (17, 9)
    assert "labels[17] is 9, outside [0, 4) and not ignore_index (-100)" in str(error)
    assert ("of partition: " in str(error)) == (partition is not None and gradient == "last_layer")


@pytest.mark.parametrize("partition", [None, 3])
def test_weights_of_the_samples(partition: int | None) -> None:
    """1e300 is finite where it is given, and not in the float32 of the features."""
    weights = torch.ones(N, dtype=torch.float64)
    weights[17] = 1e300
    error = refused(
        lambda: scorer(SmallNet()).score(images(), partition=partition, sample_weight=weights)
    )
    assert error.row == 17 and "sample_weight[17] is inf" in str(error)
    weights[4] = torch.nan
    error = refused(lambda: scorer(SmallNet()).score(images(), sample_weight=weights))
    assert (error.row, str(error)) == (4, "sample_weight[4] is nan; weights must be finite")


@pytest.mark.parametrize("partition", [None, 3])
def test_samples_of_whole_network_gradients(partition: int | None) -> None:
    inputs, labels = images().tensors
    broken = inputs.clone()
    broken[11] = torch.nan
    scored = scorer(SmallNet(), gradient="full")
    data = TensorDataset(broken, labels)
    error = refused(lambda: scored.score(data, partition=partition))
    assert error.row == 11 and str(error).startswith("the loss or gradient of sample 11 is not fin")


class Tagger(nn.Module):
    """Token features into a head; word 10 has none that is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.embed.weight.data[10] = torch.nan
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("partition", [None, 2])
def test_tokens_are_those_of_a_sample(generator: torch.Generator, partition: int | None) -> None:
    tokens = torch.randint(10, (9, 5), generator=generator)
    labels = torch.randint(CLASSES, (9, 5), generator=generator)
    labels[2], labels[4, 1:], labels[7, 0] = -100, -100, -100  # leave the cache of features
    options = {"shift_labels": False, "head": "head"}

    for sample, place, token in ((0, 0, 0), (3, 0, 0), (4, 0, 0), (7, 3, 2), (8, 4, 4)):
        wrong = labels.clone()
        wrong[sample, place] = 99
        data = TensorDataset(tokens, wrong)
        error = refused(partial(scorer(Tagger(), **options).score, data, partition=partition))
        assert (error.row, error.value) == (sample, 99)
        text = str(error)
        assert text.startswith(f"token {token} of those that count in sample {sample}: ")
        assert f"labels[{sample}] is 99, outside [0, 4)" in text

    words = tokens.clone()
    words[5, 4] = 10
    data = TensorDataset(words, labels)
    error = refused(lambda: scorer(Tagger(), **options).score(data, partition=partition))
    assert (error.row, error.column) == (5, 0)
    assert str(error).startswith("token 4 of those that count in sample 5: ")
    assert "features[5, 0] is nan; row 5 is the first with a non-finite value" in str(error)

    whole = scorer(Tagger(), gradient="full", shift_labels=False)
    assert refused(lambda: whole.score(data, partition=partition)).row == 5


@pytest.mark.parametrize("gradient", ["last_layer", "full"])
def test_rows_of_a_surrogate_are_those_of_the_data_set(gradient: str) -> None:
    inputs, labels = images().tensors
    wrong = labels.clone()
    wrong[20] = 9
    data = TensorDataset(inputs, wrong)
    state = trained(SmallNet(), 1)[0]
    index = torch.arange(N)
    surrogates = [
        Surrogate(part, index[index % 2 == part], [Checkpoint(state, lr=0.1)], 1)
        for part in range(2)
    ]
    error = refused(
        lambda: score_surrogates(
            surrogates, SmallNet, data, samples=None, gradient=gradient, progress=False
        )
    )
    assert (error.row, error.value) == (20, 9)
    assert str(error).startswith("part 0: labels[20] is 9, outside [0, 4)")


def test_rows_of_the_authors_script_are_those_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("row_user_module.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "labels = torch.arange(12) % 3\n"
        "labels[8] = 9\n"
        "data = lambda: TensorDataset(torch.randn(12, 4), labels)\n"
        "net = lambda: torch.nn.Linear(4, 3)\n"
    )
    Path("run/checkpoint").mkdir(parents=True)
    for part in range(2):
        content = {"net": nn.Linear(4, 3).state_dict(), "lr": [0.1], "epoch": 0}
        torch.save(content, f"run/checkpoint/trial_{part}_0.pth")
    words = "--path run --data row_user_module:data --model row_user_module:net --device cpu"
    assert compat_script(f"{words} --num_trails 2 --samples 1".split()) == 2
    assert "moso_fast.compat: part 1: labels[8] is 9, outside [0, 3)" in capsys.readouterr().err


@pytest.mark.parametrize("same_features", [True, False])
@pytest.mark.parametrize("name", ["fc.weight", "fc.bias"])
def test_a_head_that_is_not_finite_is_named_by_its_checkpoint(
    same_features: bool, name: str, tmp_path: Path
) -> None:
    """Not by its number in the stack of heads that are scored together."""
    model = SmallNet()
    states = [{n: t.clone() for n, t in model.state_dict().items()} for _ in range(3)]
    if not same_features:
        states[0]["conv.weight"] += 1
    at = (2, 5) if name == "fc.weight" else (2,)
    states[2][name][at] = torch.nan
    text = f"{name.removeprefix('fc.')}{list(at)} is nan; heads and weights must be finite"
    with pytest.raises(ValueError) as caught:
        scorer(model).score(images(), states)
    assert str(caught.value) == f"checkpoint 2 (a state dict in memory): {text}"
    # Also where the first one comes from a folder of results.
    scorer(model).score(images(), states[:1], resume=tmp_path)
    with pytest.raises(ValueError) as caught:
        scorer(model).score(images(), states, resume=tmp_path)
    assert str(caught.value) == f"checkpoint 2 (a state dict in memory): {text}"
    model.load_state_dict(states[2])
    with pytest.raises(ValueError) as caught:
        MoSoScorer(model).score(Subset(images(), range(8)))
    assert str(caught.value) == f"checkpoint 0 (the model as it was given): {text}"
