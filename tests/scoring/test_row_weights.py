"""Class weights and sample weights of MoSoScorer, against autograd and the plain function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scorer_cases import (
    CLASSES,
    RATES,
    N,
    SmallNet,
    checkpoints_of,
    head_gradients,
    images,
    paper_score,
    same_table,
    scorer,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.functional import last_layer_stats

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])
SAMPLE_WEIGHT = torch.linspace(0, 2, N, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture(scope="module")
def states(model: SmallNet) -> list[dict[str, Tensor]]:
    return trained(model)


def expected(gradients: list[Tensor], factors: Tensor, partition: Tensor | None = None) -> Tensor:
    parts = torch.zeros(N, dtype=torch.int64) if partition is None else partition
    scores = torch.zeros(N, dtype=torch.float64)
    for eta, plain in zip(RATES, gradients, strict=True):
        for part in parts.unique():
            rows = parts == part
            scores[rows] += eta * paper_score(plain[rows] * factors[rows, None]) / len(gradients)
    return scores


@pytest.mark.parametrize("partition", [None, "ids"])
@pytest.mark.parametrize("given", ["class", "sample", "both"])
def test_weights_multiply_each_loss(model: SmallNet, states: list, given: str, partition: Any):
    labels = images().tensors[1]
    ids = None if partition is None else torch.arange(N) % 3
    factors = torch.ones(N, dtype=torch.float64)
    options: dict[str, Any] = {}
    call: dict[str, Any] = {}
    if given != "sample":
        options["class_weight"] = CLASS_WEIGHT
        factors = factors * CLASS_WEIGHT[labels]
    if given != "class":
        call["sample_weight"] = SAMPLE_WEIGHT
        factors = factors * SAMPLE_WEIGHT
    gradients = [head_gradients(model, state) for state in states]
    table = scorer(model, **options).score(images(), checkpoints_of(states), partition=ids, **call)
    torch.testing.assert_close(
        table.scores.double(), expected(gradients, factors, ids), rtol=1e-4, atol=1e-7
    )
    assert set(table.provenance) >= {*options, *call, "per"}
    for name, weights in (options | call).items():
        assert table.provenance[name] == torch.as_tensor(weights).tolist()


def test_class_weights_are_those_of_cross_entropy(model: SmallNet, states: list):
    """With reduction="sum", where a row has its own weight; "mean" divides by their sum."""
    weighted = [
        head_gradients(model, s, weight=CLASS_WEIGHT.double(), reduction="sum") for s in states
    ]
    table = scorer(model, class_weight=CLASS_WEIGHT).score(images(), checkpoints_of(states))
    ones = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(
        table.scores.double(), expected(weighted, ones), rtol=1e-4, atol=1e-7
    )
    scaled = scorer(model, class_weight=3 * CLASS_WEIGHT).score(images(), checkpoints_of(states))
    torch.testing.assert_close(scaled.scores, 9 * table.scores, rtol=1e-4, atol=1e-7)


def test_equal_weights_change_nothing_and_arrays_are_weights_too(model: SmallNet, states: list):
    plain = scorer(model).score(images(), checkpoints_of(states))
    ones = scorer(model, class_weight=[1.0] * CLASSES).score(
        images(), checkpoints_of(states), sample_weight=np.ones(N)
    )
    torch.testing.assert_close(plain.scores, ones.scores, rtol=1e-6, atol=1e-9)
    assert "class_weight" not in plain.provenance and "sample_weight" not in plain.provenance


class Tagger(nn.Module):
    """Token features (B, T, D) into a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("per", ["token", "sample"])
def test_sequences_and_ignored_tokens(generator: torch.Generator, per: str):
    torch.manual_seed(0)
    model = Tagger()
    tokens = torch.randint(11, (9, 5), generator=generator)
    labels = torch.randint(CLASSES, (9, 5), generator=generator)
    labels[2], labels[4, 1:], labels[7, 0] = -100, -100, -100
    weights = torch.linspace(0.5, 2, 9)
    table = scorer(model, class_weight=CLASS_WEIGHT, shift_labels=False, per=per).score(
        TensorDataset(tokens, labels), sample_weight=weights
    )
    rows = labels.flatten() != -100
    lengths = (labels != -100).sum(1)
    stats = last_layer_stats(
        model.embed(tokens).detach().flatten(0, 1)[rows],
        model.head.weight.detach(),
        labels.flatten()[rows],
        model.head.bias.detach(),
        sample_weight=(CLASS_WEIGHT[labels.clamp(0)] * weights[:, None]).flatten()[rows],
        cu_seqlens=torch.cat([torch.zeros(1), lengths[lengths > 0].cumsum(0)]).long(),
        per=per,
    )
    scored = ~table.scores.isnan()
    assert scored.tolist() == [row != 2 for row in range(9)]
    torch.testing.assert_close(table.scores[scored], stats.scores(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(table.metrics["loss"][scored], stats.loss, rtol=1e-5, atol=1e-6)
    losses = F.cross_entropy(
        model(tokens).transpose(1, 2), labels, weight=CLASS_WEIGHT, reduction="none"
    ).sum(1)
    if per == "token":
        losses = losses / lengths.clamp_min(1)
    torch.testing.assert_close(
        table.metrics["loss"][scored], (losses.detach() * weights)[scored], rtol=1e-5, atol=1e-6
    )


def test_a_folder_belongs_to_its_weights(model: SmallNet, states: list, tmp_path):
    call = {"checkpoints": checkpoints_of(states), "resume": tmp_path}
    first = scorer(model, class_weight=CLASS_WEIGHT).score(
        images(), sample_weight=SAMPLE_WEIGHT, **call
    )
    again = scorer(model, class_weight=CLASS_WEIGHT).score(
        images(), sample_weight=SAMPLE_WEIGHT, **call
    )
    assert same_table(first, again)
    for options, weights in (
        ({"class_weight": CLASS_WEIGHT + 1}, SAMPLE_WEIGHT),
        ({"class_weight": CLASS_WEIGHT}, SAMPLE_WEIGHT.flip(0)),
        ({}, SAMPLE_WEIGHT),
        ({"class_weight": CLASS_WEIGHT}, None),
    ):
        with pytest.raises(ValueError, match="belongs to a different run"):
            scorer(model, **options).score(images(), sample_weight=weights, **call)


def test_many_weights_stand_in_the_origin_by_their_digest():
    model, data = nn.Linear(3, 200), TensorDataset(torch.randn(4, 3), torch.arange(4))
    origins = [
        scorer(model, class_weight=torch.arange(200.0) + shift).score(data).provenance
        for shift in (0, 0, 1)
    ]
    digests = [origin["class_weight"] for origin in origins]
    assert digests[0].startswith("200 weights, digest ") and digests[0] == digests[1] != digests[2]


PROBABILITIES = TensorDataset(images().tensors[0], torch.full((N, CLASSES), 1 / CLASSES))
REFUSED = [
    (
        {"class_weight": [1.0, 2.0]},
        {},
        ValueError,
        "class_weight must have one entry per class, shape (4,); got (2,)",
    ),
    ({"class_weight": [[1.0]]}, {}, ValueError, "class_weight must have shape (C,), got (1, 1)"),
    (
        {"class_weight": [1, 2, 3, np.nan]},
        {},
        ValueError,
        "class_weight[3] is nan; weights must be finite",
    ),
    (
        {"class_weight": ["a"] * 4},
        {},
        TypeError,
        "class_weight must hold numbers; it holds text ('a' at [0]); class names become "
        "class ids by numpy.unique(names, return_inverse=True)",
    ),
    (
        {"class_weight": [True] * 4},
        {},
        TypeError,
        "class_weight must hold real numbers, got torch.bool",
    ),
    (
        {"class_weight": [1.0] * 4, "loss": "mse"},
        {},
        ValueError,
        "class_weight goes with loss='cross_entropy', not with 'mse'",
    ),
    (
        {"class_weight": [1.0] * 4, "label_smoothing": 0.1},
        {},
        ValueError,
        "class_weight goes without label_smoothing (got 0.1): the smoothed loss weights "
        "every class of a row; use gradient='full' with a loss of your own",
    ),
    (
        {"class_weight": [1.0] * 4, "gradient": "full"},
        {},
        ValueError,
        "class_weight goes with gradient='last_layer', not with 'full'",
    ),
    (
        {"class_weight": [1.0] * 4},
        {"data": PROBABILITIES},
        ValueError,
        "class_weight goes with class ids (N,), got labels (23, 4); for probabilities t, "
        "give w * t / (w * t).sum(1) as labels and sample_weight=(w * t).sum(1), which is "
        "the same loss",
    ),
    (
        {"gradient": "full"},
        {"sample_weight": [1.0] * N},
        ValueError,
        "sample_weight goes with gradient='last_layer', not with 'full'; there, put the "
        "weights beside the labels and give a loss of your own that multiplies by them",
    ),
    (
        {},
        {"sample_weight": [1.0] * 3},
        ValueError,
        "sample_weight must have one entry per sample, shape (23,); got (3,)",
    ),
    (
        {},
        {"sample_weight": 1.0},
        TypeError,
        "sample_weight must be a torch.Tensor, an array, a pandas column or a list of "
        "numbers; got float",
    ),
    (
        {},
        {"sample_weight": [np.inf] * N},
        ValueError,
        "sample_weight[0] is inf; weights must be finite",
    ),
]


@pytest.mark.parametrize(("options", "call", "error", "message"), REFUSED)
def test_weights_that_do_not_fit_are_refused(
    model: SmallNet, options: dict, call: dict, error: type, message: str
):
    model.forwards = 0
    with pytest.raises(error) as caught:
        scorer(model, **options).score(**{"data": images(), **call})
    assert str(caught.value) == message
    assert model.forwards == 0 or call.get("data") is PROBABILITIES


def test_the_way_out_for_probabilities_is_the_same_loss(generator: torch.Generator):
    """What the error says to do, against cross_entropy(weight=) with probabilities."""
    logits = torch.randn(7, CLASSES, generator=generator, dtype=torch.float64)
    t = torch.rand(7, CLASSES, generator=generator, dtype=torch.float64).softmax(1)
    w = CLASS_WEIGHT.double()
    theirs = F.cross_entropy(logits, t, weight=w, reduction="none")
    factors = (w * t).sum(1)
    ours = F.cross_entropy(logits, w * t / factors[:, None], reduction="none") * factors
    torch.testing.assert_close(ours, theirs)
