"""MoSoScorer against brute force: per-sample autograd of the head in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scorer_cases import (
    CLASSES,
    RATES,
    N,
    SmallNet,
    checkpoints_of,
    expected_scores,
    head_gradients,
    images,
    paper_score,
    same_table,
    scorer,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.scoring.partition import partition_ids


@pytest.fixture(scope="module")
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="module")
def states(model: SmallNet) -> list[dict[str, Tensor]]:
    return trained(model)


@pytest.fixture(scope="module")
def gradients(model: SmallNet, states: list[dict[str, Tensor]]) -> list[Tensor]:
    return [head_gradients(model, state) for state in states]


@pytest.mark.parametrize("partition", [None, 3, "ids"])
@pytest.mark.parametrize(("combine", "num_steps"), [("mean", None), ("mean", 70), ("zscore", None)])
def test_scores_are_those_of_per_sample_autograd(
    model: SmallNet,
    states: list,
    gradients: list,
    partition: Any,
    combine: str,
    num_steps: int | None,
) -> None:
    ids = torch.zeros(N, dtype=torch.int64)
    if partition == 3:
        ids = partition_ids(N, 3, seed=9)
    elif partition == "ids":
        ids = partition = torch.arange(N) % 2 * 40 - 7
    table = scorer(model).score(
        images(),
        checkpoints_of(states),
        partition=partition,
        combine=combine,
        num_steps=num_steps,
        seed=9,
    )
    expected = expected_scores(gradients, ids, combine, num_steps)
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)
    assert table.index.tolist() == list(range(N))
    assert table.higher_is_better


def test_double_precision_and_every_metric(model: SmallNet, states: list, gradients: list) -> None:
    table = scorer(model, dtype=torch.float64).score(images(), checkpoints_of(states))
    assert table.scores.dtype == torch.float64
    expected = expected_scores(gradients, torch.zeros(N, dtype=torch.int64))
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-13)
    square = torch.stack([g.square().sum(1) for g in gradients])
    aligned = torch.stack([g @ g.mean(0) for g in gradients])
    close = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(table.per_checkpoint["grad_sqnorm"], square, **close)
    torch.testing.assert_close(table.per_checkpoint["alignment"], aligned, **close)
    eta = torch.tensor(RATES, dtype=torch.float64)[:, None]
    torch.testing.assert_close(table.metrics["self_influence"], (eta * square).mean(0), **close)
    torch.testing.assert_close(table.metrics["grand"], square.sqrt().mean(0), **close)
    inputs, labels = images().tensors
    reference = copy.deepcopy(model).double().eval()
    losses = []
    for state in states:
        reference.load_state_dict(state)
        losses.append(F.cross_entropy(reference(inputs.double()), labels, reduction="none"))
    torch.testing.assert_close(table.per_checkpoint["loss"], torch.stack(losses).detach(), **close)


@pytest.mark.parametrize(
    "formula", ["one_step", "official", "official_exact", "alignment", "cosine"]
)
def test_other_formulas(model: SmallNet, states: list, gradients: list, formula: str) -> None:
    table = scorer(model).score(images(), checkpoints_of(states)[:1], formula=formula)
    g = gradients[0]
    mean, n = g.mean(0), len(g)
    a, q, g2 = g @ mean, g.square().sum(1), mean @ mean
    expected = {
        "one_step": ((n + 1) * a - n * g2 - q) / (n - 1) ** 2,
        "official": a - q / n,
        "official_exact": ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / (n - 1) ** 2,
        "alignment": a,
        "cosine": a / (q * g2).sqrt(),
    }[formula]
    torch.testing.assert_close(table.scores.double(), RATES[0] * expected, rtol=2e-5, atol=2e-6)


def test_label_smoothing_no_bias_and_ignored_samples() -> None:
    torch.manual_seed(3)
    model = SmallNet(bias=False)
    inputs, labels = images().tensors
    table = scorer(model, label_smoothing=0.2).score(images())
    gradients = head_gradients(model, model.state_dict(), label_smoothing=0.2)
    expected = paper_score(gradients)
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)

    ignored = torch.arange(N) % 5 == 2
    partly = TensorDataset(inputs, torch.where(ignored, -1, labels))
    table = scorer(model, label_smoothing=0.2, ignore_index=-1).score(partly)
    assert torch.equal(table.scores.isnan(), ignored)
    expected = paper_score(gradients[~ignored])
    torch.testing.assert_close(table.scores[~ignored].double(), expected, rtol=2e-5, atol=2e-6)


def test_other_losses(model: SmallNet) -> None:
    inputs, labels = images().tensors
    targets = F.one_hot(labels, CLASSES).float()
    for loss, function in (
        ("binary_cross_entropy", F.binary_cross_entropy_with_logits),
        ("mse", F.mse_loss),
    ):
        table = scorer(model, loss=loss).score(TensorDataset(inputs, targets))
        reference = copy.deepcopy(model).eval()
        values = function(reference(inputs), targets, reduction="none").sum(1)
        torch.testing.assert_close(table.metrics["loss"], values.detach(), rtol=1e-5, atol=1e-6)


class TinyForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.lm_head = nn.Linear(5, 7, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.embed(input_ids)))


@pytest.mark.parametrize("shift", ["auto", False])
@pytest.mark.parametrize("partition", [None, 2])
@pytest.mark.parametrize("per", ["token", "sample"])
def test_sequences(shift: Any, partition: int | None, per: str) -> None:
    """A sequence is one sample: its loss is the mean, or the sum, over its counted tokens."""
    torch.manual_seed(0)
    model = TinyForCausalLM()
    ids = torch.randint(7, (9, 6))
    labels = torch.where(
        torch.arange(6) < torch.tensor([6, 5, 3, 2, 6, 4, 0, 6, 5])[:, None], ids, -100
    )
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    options = {} if per == "token" else {"per": per}  # means are what is done unless asked
    table = scorer(model, shift_labels=shift, **options).score(data, partition=partition)
    assert table.provenance["per"] == per
    double = copy.deepcopy(model).double()
    rows = []
    for x, y in zip(ids, labels, strict=True):
        logits = double(x[None])[0]
        if shift == "auto":
            logits, y = logits[:-1], y[1:]
        value = F.cross_entropy(logits, y, reduction="sum", ignore_index=-100)
        if per == "token":
            value = value / (y != -100).sum().clamp_min(1)
        rows.append(torch.autograd.grad(value, double.lm_head.weight)[0].flatten())
    counted = torch.arange(9) != 6
    parts = torch.zeros(9, dtype=torch.int64) if partition is None else partition_ids(9, 2)
    gradients = torch.stack(rows)
    assert torch.equal(table.scores.isnan(), ~counted)
    for part in parts.unique():
        members = (parts == part) & counted
        expected = paper_score(gradients[members])
        torch.testing.assert_close(table.scores[members].double(), expected, rtol=2e-5, atol=2e-6)


def test_files_and_rates_from_files(tmp_path: Path, model: SmallNet, states: list) -> None:
    for k, (state, eta) in enumerate(zip(states, RATES, strict=True)):
        torch.save({"net": state, "lr": [9.0, eta], "epoch": k}, tmp_path / f"trial_0_{k}.pth")
    table = scorer(model).score(images(), sorted(tmp_path.glob("*.pth")))
    assert same_table(table, scorer(model).score(images(), checkpoints_of(states)))
    described = table.provenance["checkpoints"]
    assert [c["lr"] for c in described] == list(RATES)
    assert [c["step"] for c in described] == [0, 1, 2]
    assert described[1]["source"].endswith("trial_0_1.pth")


def test_provenance_can_be_written_as_json(model: SmallNet, states: list) -> None:
    table = scorer(model, head="fc", precision="highest").score(
        images(), states, partition=2, seed=4, combine="zscore", index=torch.arange(N) + 100
    )
    facts = json.loads(json.dumps(table.provenance))
    assert facts["learning_rates"] == "none given, 1.0 used"
    assert facts["partition"].startswith("2 parts, split by seed 4, digest ")
    expected = {
        "torch": torch.__version__,
        "formula": "moso",
        "combine": "zscore",
        "num_steps": None,
        "samples": N,
        "seed": 4,
        "head": "fc",
        "loss": "cross_entropy",
        "precision": "highest",
        "features": "float32",
    }
    assert {name: facts[name] for name in expected} == expected
    assert {"moso_fast", "python", "backend"} <= facts.keys()
    assert table.index.tolist() == list(range(100, 100 + N))


def test_without_rates_every_checkpoint_counts_alike(
    model: SmallNet, states: list, gradients: list
) -> None:
    table = scorer(model).score(images(), states)
    expected = expected_scores(gradients, torch.zeros(N, dtype=torch.int64), rates=(1.0, 1.0, 1.0))
    torch.testing.assert_close(table.scores.double(), expected, rtol=2e-5, atol=2e-6)


def test_model_as_it_is(model: SmallNet) -> None:
    as_it_is = scorer(model).score(images())
    assert same_table(as_it_is, scorer(model).score(images(), model.state_dict()))
    assert as_it_is.provenance["checkpoints"][0]["source"] == "the model as it was given"


def test_bfloat16_cache_is_close(model: SmallNet, states: list) -> None:
    exact = scorer(model).score(images(), checkpoints_of(states))
    small = scorer(model, feature_cache="bfloat16").score(images(), checkpoints_of(states))
    assert small.provenance["features"] == "bfloat16"
    assert small.provenance["precision"] == "medium"
    error = (small.scores - exact.scores).abs().max() / exact.scores.abs().max()
    assert 0 < error < 0.05


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(images()))


def test_iterable_data_set(model: SmallNet, states: list) -> None:
    table = scorer(model).score(Stream(), checkpoints_of(states), partition=2)
    assert same_table(table, scorer(model).score(images(), checkpoints_of(states), partition=2))


@pytest.mark.parametrize("gradient", ["last_layer", "full"])
@pytest.mark.parametrize("partition", [None, 3])
def test_the_record_says_how_many_samples_count(gradient, partition):
    inputs, labels = images().tensors
    labels = labels.clone()
    labels[[2, 7, 8]] = -100
    options = {"scope": "fc"} if gradient == "full" else {}
    table = MoSoScorer(SmallNet(), gradient=gradient, progress=False, **options).score(
        TensorDataset(inputs, labels), partition=partition
    )
    assert (table.provenance["samples"], table.provenance["counted"]) == (N, N - 3)
    assert int(table.scores.isfinite().sum()) == N - 3
