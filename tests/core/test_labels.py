"""Labels as people keep them: each kind is scored as what it means, or refused with the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scorer_cases import paper_score
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from moso_fast import MoSoScorer, moso_scores
from moso_fast.core.labels import as_labels, document_rows, fit_labels, token_rows

N, WIDTH = 13, 4
GRADIENTS = ["last_layer", "full"]


def classifier(classes: int) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, classes))


def inputs() -> Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(3))


def ids(classes: int) -> Tensor:
    return torch.randint(classes, (N,), generator=torch.Generator().manual_seed(classes))


def score(model: nn.Module, data: Any, gradient: str, **options: Any) -> Tensor:
    scope = {} if gradient == "last_layer" else {"scope": ["2"]}
    scorer = MoSoScorer(model, gradient=gradient, progress=False, batch_size=5, **scope, **options)
    return scorer.score(data).scores


def by_autograd(model: nn.Module, loss: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Scores of the head by one backward pass a sample, in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for k, x in enumerate(inputs().double()):
        grads = torch.autograd.grad(loss(model(x[None]), k), list(model[2].parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return paper_score(torch.stack(rows))


class Listed(Dataset):
    """Samples whose labels are Python objects."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return inputs()[index], self.labels[index]


THREE, TWO = ids(3), ids(2)
HOT = F.one_hot(THREE, 3)
MANY = (HOT + F.one_hot(ids(3).flip(0), 3)).clamp_max(1)
REAL = torch.randn(N, generator=torch.Generator().manual_seed(9))

# Kind, outputs of the head, loss, labels as given, and as they are meant.
KINDS: list[tuple[str, int, str, Any, Tensor]] = [
    *(
        (str(dtype).removeprefix("torch."), 3, "cross_entropy", THREE.to(dtype), THREE)
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)
    ),
    *(
        (str(dtype).removeprefix("torch."), 3, "cross_entropy", THREE.to(dtype), THREE)
        for dtype in (torch.uint16, torch.uint32, torch.uint64)
    ),
    ("column of ids", 3, "cross_entropy", THREE[:, None], THREE),
    ("column of uint8 ids", 3, "cross_entropy", THREE[:, None].byte(), THREE),
    ("column of ids, two classes", 2, "cross_entropy", TWO[:, None], TWO),
    ("a list of one id each", 3, "cross_entropy", [[k] for k in THREE.tolist()], THREE),
    ("numpy's ids", 3, "cross_entropy", [np.uint16(k) for k in THREE.tolist()], THREE),
    ("bool, two classes", 2, "cross_entropy", TWO.bool(), TWO),
    ("column of bool", 2, "cross_entropy", TWO.bool()[:, None], TWO),
    ("one-hot int64", 3, "cross_entropy", HOT, THREE),
    ("one-hot uint8", 3, "cross_entropy", HOT.byte(), THREE),
    ("one-hot bool", 3, "cross_entropy", HOT.bool(), THREE),
    ("one-hot lists", 3, "cross_entropy", HOT.tolist(), THREE),
    ("probabilities in lists", 3, "cross_entropy", HOT.double().tolist(), THREE),
    ("one logit, float", 1, "binary_cross_entropy", TWO.float(), TWO[:, None].float()),
    ("one logit, int", 1, "binary_cross_entropy", TWO, TWO[:, None].float()),
    ("one logit, uint8", 1, "binary_cross_entropy", TWO.byte(), TWO[:, None].float()),
    ("one logit, bool", 1, "binary_cross_entropy", TWO.bool(), TWO[:, None].float()),
    ("one logit, numbers", 1, "binary_cross_entropy", TWO.tolist(), TWO[:, None].float()),
    ("several labels, int", 3, "binary_cross_entropy", MANY, MANY.float()),
    ("several labels, bool", 3, "binary_cross_entropy", MANY.bool(), MANY.float()),
    ("one output", 1, "mse", REAL, REAL[:, None]),
    ("one output, float64", 1, "mse", REAL.double(), REAL[:, None]),
    ("one output, numbers", 1, "mse", REAL.tolist(), REAL[:, None]),
    ("one output, int", 1, "mse", THREE, THREE[:, None].float()),
]


def meant(outputs: Tensor, loss: str, label: Tensor) -> Tensor:
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, label)
    if loss == "mse":
        return F.mse_loss(outputs, label.double(), reduction="sum")
    return F.binary_cross_entropy_with_logits(outputs, label.double(), reduction="sum")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("classes", "loss", "given", "wanted"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS]
)
def test_kinds_of_labels(
    classes: int, loss: str, given: Any, wanted: Tensor, gradient: str
) -> None:
    model = classifier(classes)
    data = Listed(given) if isinstance(given, list) else TensorDataset(inputs(), given)
    got = score(model, data, gradient, loss=loss)
    expected = by_autograd(model, lambda z, k: meant(z, loss, wanted[k : k + 1]))
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    if isinstance(given, Tensor) and gradient == "last_layer":
        features = model[1](model[0](inputs())).detach()
        head = model[2].weight.detach(), given, model[2].bias.detach()
        torch.testing.assert_close(moso_scores(features, *head, loss=loss), got)


def test_ignored_samples_in_a_column_of_ids() -> None:
    model = classifier(3)
    labels = torch.where(torch.arange(N) % 4 == 1, -100, THREE)
    for given in (labels[:, None], labels.to(torch.int16), labels.to(torch.int8)[:, None]):
        for gradient in GRADIENTS:
            expected = score(model, TensorDataset(inputs(), labels), gradient)
            got = score(model, TensorDataset(inputs(), given), gradient)
            assert torch.equal(got.isnan(), torch.arange(N) % 4 == 1)
            torch.testing.assert_close(got, expected, equal_nan=True)


class Bytes(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.out = nn.Embedding(256, width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x.long()).tanh())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("dtype", "ignore_index", "wraps_to"),
    [
        (torch.uint8, -100, 156),
        (torch.int8, 156, -100),
        (torch.uint8, 300, 44),
        (torch.int16, 65436, -100),
        (torch.uint16, -1, 65535),
    ],
)
def test_no_token_is_taken_for_ignore_index(
    dtype: torch.dtype, ignore_index: int, wraps_to: int, gradient: str
) -> None:
    """What ``ignore_index`` wraps round to in a narrow dtype is a label like any other."""
    tokens = torch.randint(100, (9, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.flip(0).clone()
    if 0 <= wraps_to < 256:
        labels[:, 2], labels[3] = wraps_to, wraps_to
    options = {"ignore_index": ignore_index, "progress": False, "gradient": gradient}
    if gradient == "full":
        options["scope"] = ["out"]
    wide = MoSoScorer(Bytes(), **options).score(TensorDataset(tokens, labels))
    narrow = MoSoScorer(Bytes(), **options).score(TensorDataset(tokens, labels.to(dtype)))
    assert not wide.scores.isnan().any()
    torch.testing.assert_close(narrow.scores, wide.scores)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("column", [False, True])
def test_no_class_is_taken_for_ignore_index(column: bool, gradient: str) -> None:
    """156 in uint8, of 200 classes, in every sample but one."""
    labels = torch.full((N,), 156)
    labels[4] = 3
    wide = score(classifier(200), TensorDataset(inputs(), labels), gradient)
    given = labels.byte()[:, None] if column else labels.byte()
    for data in (TensorDataset(inputs(), given), Listed(list(given))):
        torch.testing.assert_close(score(classifier(200), data, gradient), wide)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_token_labels_in_a_column(gradient: str) -> None:
    tokens = torch.randint(250, (6, 5), generator=torch.Generator().manual_seed(0))
    options = {"progress": False} | (
        {} if gradient == "last_layer" else {"gradient": "full", "scope": ["out"]}
    )
    flat = MoSoScorer(Bytes(), **options).score(TensorDataset(tokens, tokens.flip(0)))
    column = MoSoScorer(Bytes(), **options).score(TensorDataset(tokens, tokens.flip(0)[..., None]))
    torch.testing.assert_close(column.scores, flat.scores)


REFUSED: list[tuple[str, int, str, Any, str]] = [
    ("text", 3, "cross_entropy", ["cat", "dog", "bee"] * 4 + ["cat"],
     "data: labels are text ('cat'); map them to ids: {name: i for i, name in "
     "enumerate(sorted(set(labels)))}"),
    ("bytes", 3, "cross_entropy", [b"cat"] * N, "data: labels are text"),
    ("floats", 3, "cross_entropy", THREE.float(),
     "labels of shape (N,) must be integer class ids, got float32; probabilities have shape "
     "(N, C) = "),
    ("column of floats", 3, "cross_entropy", THREE.float()[:, None],
     "labels of shape (N, 1) must be integer class ids, got float32; "),
    ("floats for one output", 1, "cross_entropy", REAL,
     "labels of shape (N,) must be integer class ids, got float32; one output goes with "
     "loss='mse' (regression) or 'binary_cross_entropy'"),
    ("bool for three classes", 3, "cross_entropy", TWO.bool(),
     "labels of shape (N,) must be integer class ids, got bool; "),
    ("several ones in a row", 3, "cross_entropy", MANY, "labels["),
    ("from one", 3, "cross_entropy", THREE + 1, "labels["),
    ("complex", 3, "cross_entropy", THREE.to(torch.complex64), "data: labels must be real"),
    ("rows of different lengths", 3, "cross_entropy", [[1]] * (N - 1) + [[1, 2]], "data: "),
    ("ids for sigmoids", 3, "binary_cross_entropy", THREE, "labels must have shape ("),
    ("ids for squares", 3, "mse", THREE, "labels must have shape ("),
]  # fmt: skip


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("classes", "loss", "given", "message"), [k[1:] for k in REFUSED], ids=[k[0] for k in REFUSED]
)
def test_labels_that_are_refused(
    classes: int, loss: str, given: Any, message: str, gradient: str
) -> None:
    data = Listed(given) if isinstance(given, list) else TensorDataset(inputs(), given)
    with pytest.raises((TypeError, ValueError)) as caught:
        score(classifier(classes), data, gradient, loss=loss)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_float_ids_are_refused_before_the_second_batch() -> None:
    model = classifier(3)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match="must be integer class ids"):
        score(model, TensorDataset(inputs(), THREE.float()), "last_layer")
    assert len(calls) <= 2, "one batch, and at most one trial of it"


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, None], TypeError, "a label is None; a sample without one gets ignore_index"),
        (3, ValueError, "one entry per sample, got a single number"),
        (torch.tensor(3), ValueError, "one entry per sample, got a single number"),
        ([[1, 2], [3]], ValueError, "differ in length; pad them with ignore_index"),
        (["a"], TypeError, r"labels are text \('a'\)"),
        (np.array(["a"]), TypeError, r"labels are text \('a'\)"),
        (np.array(["a", None], dtype=object), TypeError, r"labels are text \('a'\)"),
        ([torch.zeros(2), torch.zeros(3)], TypeError, "a list of 2 tensors; they must be one"),
        ([object()], TypeError, "labels must hold numbers"),
        ({1: 2}, TypeError, "labels must be a torch.Tensor, an array, .* got dict"),
    ],
)
def test_what_makes_no_labels(labels: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        as_labels(labels)


def test_as_labels_keeps_numbers() -> None:
    assert as_labels(np.array([1, 2], dtype=np.uint64)).dtype == torch.int64
    assert as_labels([1, 2]).tolist() == [1, 2]
    assert as_labels([True, False]).dtype == torch.bool
    half = torch.ones(2, dtype=torch.bfloat16)
    assert as_labels(half).dtype == torch.bfloat16


def test_fit_labels_leaves_the_rest_alone() -> None:
    for labels, classes, loss in (
        (torch.rand(4, 3), 3, "cross_entropy"),
        (torch.zeros(4, 2).long(), 3, "cross_entropy"),
        (torch.zeros(4), 3, "mse"),
        (torch.zeros(4, 1), 1, "mse"),
    ):
        assert fit_labels(labels, classes, loss) is labels


def test_token_rows() -> None:
    labels = torch.tensor([[1, -100, 2], [-100, -100, -100], [-100, 3, -100]])
    places, chosen, lengths = token_rows(labels, -100)
    assert places.tolist() == [0, 2, 3, 7]
    assert chosen.tolist() == [1, 2, -100, 3]
    assert lengths.tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("shift", "places", "chosen", "lengths"),
    [
        (False, [0, 1, 2, 3, 4, 5, 6, 8], [5, 6, -100, 8, 7, 7, 9, -100], [2, 1, 2, 2, 1]),
        (True, [0, 2, 3, 5, 8], [6, -100, 7, 9, -100], [1, 1, 1, 1, 1]),
    ],
)
def test_document_rows(shift: bool, places: list, chosen: list, lengths: list) -> None:
    """Three documents, then two and padding; with a shift, those of one token predict nothing."""
    labels = torch.tensor([[5, 6, -100, 8, 7], [7, 9, -100, -100, -100]])
    documents = torch.tensor([[0, 0, 1, 2, 2], [3, 3, -1, 4, -1]])
    got = document_rows(labels, documents, -100, shift)
    assert [one.tolist() for one in got] == [places, chosen, lengths]
