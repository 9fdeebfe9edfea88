"""Data as people feed them to MoSoScorer: scored as they are meant, or refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import (
    GRADIENTS,
    IN_ORDER,
    NUMBERS,
    Items,
    N,
    Net,
    X,
    Y,
    expected_scores,
    number,
    score,
    told,
)
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    TensorDataset,
)


class Anything(Net):
    """Takes what it likes out of a batch."""

    def forward(self, **batch: Any) -> Tensor:  # type: ignore[override]
        assert "text" in batch
        return super().forward(batch["x"])


class Optional(Net):
    """Has an input that changes its output."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x if scale is None else x * scale[:, None])


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return expected_scores()


# What is given, and the index that the table should have.
FORMS: dict[str, tuple[Any, list[int]]] = {
    "two tensors": ((X, Y), IN_ORDER),
    "two tensors in a list": ([X, Y], IN_ORDER),
    "arrays": ((X.numpy(), Y.numpy()), IN_ORDER),
    "an array and a list": ((X.numpy(), Y.tolist()), IN_ORDER),
    "a tensor and small ids": ((X, Y.byte().numpy()), IN_ORDER),
    "three tensors": ((X, Y, NUMBERS), NUMBERS.tolist()),
    "three columns": (TensorDataset(X, Y, NUMBERS), NUMBERS.tolist()),
    "input, label, index": (Items(lambda k: (X[k], number(k), k + 100)), NUMBERS.tolist()),
    "index, (input, label)": (Items(lambda k: (k + 100, (X[k], number(k)))), NUMBERS.tolist()),
    "index, dict": (Items(lambda k: (k + 100, ({"x": X[k]}, number(k)))), NUMBERS.tolist()),
    "dict, label, index": (Items(lambda k: ({"x": X[k]}, number(k), k)), IN_ORDER),
    "dict": (Items(lambda k: {"x": X[k], "label": number(k)}), IN_ORDER),
    "idx": (Items(lambda k: {"x": X[k], "label": number(k), "idx": k + 100}), NUMBERS.tolist()),
    "index": (Items(lambda k: {"x": X[k], "labels": Y[k], "index": k + 100}), NUMBERS.tolist()),
    "another name": (Items(lambda k: {"image": X[k], "label": Y[k]}), IN_ORDER),
    "lists of numbers": (Items(lambda k: (X[k].tolist(), number(k))), IN_ORDER),
    "lists in a dict": (Items(lambda k: {"x": X[k].tolist(), "label": number(k)}), IN_ORDER),
    "lists under another name": (Items(lambda k: {"z": X[k].tolist(), "label": Y[k]}), IN_ORDER),
    "loader of triples": (DataLoader(TensorDataset(X, Y, NUMBERS), 4), NUMBERS.tolist()),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, gradient: str, expected: Tensor) -> None:
    data, index = FORMS[form]
    table, notices = told(lambda: score(data, gradient))
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
    assert table.index.tolist() == index
    assert notices == []


def test_an_index_that_is_given_comes_first(expected: Tensor) -> None:
    table = score((X, Y, NUMBERS), "last_layer", index=np.arange(N) + 7)
    assert table.index.tolist() == [k + 7 for k in range(N)]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("partition", [None, 3])
def test_index_of_a_run_that_goes_on(tmp_path: Path, gradient: str, partition: Any) -> None:
    """The second run reads no data, the third only some, and all have the numbers."""
    data = TensorDataset(X, Y, NUMBERS)
    for _ in range(2):
        table = score(data, gradient, resume=tmp_path, partition=partition)
        assert table.index.tolist() == NUMBERS.tolist()
    other = tmp_path / "plain"
    for _ in range(2):
        table = score(TensorDataset(X, Y), gradient, resume=other, partition=partition)
        assert table.index.tolist() == IN_ORDER


# Samples as dicts beside the input and the label, and what the notice names.
LEFT_OUT: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "text": (lambda k: {"text": "a"}, "'text'"),
    "text and a number": (lambda k: {"text": "a", "age": 0.5 * k}, "'text', 'age'"),
    "another tensor": (lambda k: {"z": X[k]}, "'z'"),
    "idx and text": (lambda k: {"idx": k, "text": "a"}, "'text'"),
    "ragged lists": (lambda k: {"tags": ["a", "b"]}, "'tags'"),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("extra", LEFT_OUT)
def test_what_the_forward_does_not_take_is_left_out_with_one_notice(
    extra: str, gradient: str, expected: Tensor
) -> None:
    more, names = LEFT_OUT[extra]
    data = Items(lambda k: {"x": X[k], **more(k), "label": number(k)})
    for model in (Net(), nn.DataParallel(Net())):
        if gradient == "full" and model.__class__ is not Net:
            continue
        table, notices = told(lambda model=model: score(data, gradient, model))  # type: ignore[misc]
        torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
        assert len(notices) == 1
        assert notices[0].startswith(f"data: {names} of a batch left out, which forward of Net ")


def test_what_is_left_out_beside_an_input_of_another_name(expected: Tensor) -> None:
    data = Items(lambda k: {"image": X[k], "size": 3, "text": "a", "label": number(k)})
    table, notices = told(lambda: score(data, "last_layer"))
    torch.testing.assert_close(table.scores, expected)
    assert [one.partition(" of a batch")[0] for one in notices] == ["data: 'size', 'text'"]


def test_a_model_that_takes_anything_gets_everything(expected: Tensor) -> None:
    data = Items(lambda k: {"x": X[k], "text": "a", "idx": k + 5, "label": number(k)})
    table, notices = told(lambda: score(data, "last_layer", Anything()))
    torch.testing.assert_close(table.scores, expected)
    assert notices == []
    assert table.index.tolist() == IN_ORDER, "idx went to the model"
    with pytest.raises(AssertionError):
        score(data, "last_layer", Anything(), columns=["x"])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_columns(gradient: str, expected: Tensor) -> None:
    two = Items(lambda k: {"a": X[k], "b": -X[k], "label": number(k), "idx": k + 100})
    table = score(two, gradient, columns=["a"])
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
    assert table.index.tolist() == NUMBERS.tolist()
    scaled = Items(lambda k: {"x": X[k], "scale": 2.0, "label": number(k)})
    model = Optional()
    torch.testing.assert_close(score(scaled, gradient, model, columns=["x"]).scores, expected)
    both = score(Items(lambda k: {"x": X[k], "scale": torch.tensor(2.0), "label": Y[k]}), gradient,
                 model)  # fmt: skip
    doubled = score((2 * X, Y), gradient)
    torch.testing.assert_close(both.scores, doubled.scores, rtol=1e-5, atol=1e-6)


def test_an_idx_that_is_none_leaves_the_place_in_the_data(expected: Tensor) -> None:
    data = Items(lambda k: {"x": X[k], "label": number(k), "idx": k // 2})
    table, notices = told(lambda: score(data, "last_layer"))
    torch.testing.assert_close(table.scores, expected)
    assert table.index.tolist() == IN_ORDER
    assert len(notices) == 1 and "0 comes twice" in notices[0]


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("unequal", (X, Y[1:]), {}, "data: (inputs, labels) must be equally long, got (17, 5) and"),
    ("one array", X.numpy(), {}, "data must be a DataLoader or a Dataset, got ndarray; labels"),
    ("several sets", {"train": [1], "test": [2]}, {},
     "data must be a DataLoader or a Dataset, got dict of 'train', 'test'; give one of them"),
    ("weights", TensorDataset(X, Y, torch.rand(N)), {},
     "data: a batch must be (input, label), (input, label, index) or a dict; got a list of 3"),
    ("labels twice", TensorDataset(X, Y, Y), {}, "data: the index of a batch, "),
    ("paths", Items(lambda k: (X[k], number(k), "a.png")), {}, "data: a batch must be (input, la"),
    ("repeated index", TensorDataset(X, Y, torch.arange(N) % 8), {},
     "data: the index that samples bring must be unique and not negative, but "),
    ("negative index", TensorDataset(X, Y, torch.arange(N) - 1), {},
     "data: the index that samples bring must be unique and not negative, but -1"),
    ("(input, label), index", Items(lambda k: ((X[k], Y[k]), k)), {},
     "data: a batch ((a, b), label) calls the model with 2 inputs, and forward of Net takes 1; "),
    ("scalars", Items(lambda k: (k, (float(k), number(k)))), {}, "data: labels are a list of 2"),
    ("two inputs to choose from", Items(lambda k: {"a": X[k], "b": X[k], "label": Y[k]}), {},
     "data: forward of Net needs 'x', and a batch has 'a', 'b'; rename the entry, or choose"),
    ("no input", Items(lambda k: {"text": "a", "label": Y[k]}), {},
     "data: forward of Net needs 'x', and a batch has 'text'; "),
    ("no such column", Items(lambda k: {"a": X[k], "label": Y[k]}), {"columns": ["b"]},
     "columns: a batch has no 'b'; it has 'a'"),
    ("a column it does not take", Items(lambda k: {"x": X[k], "z": Y[k], "label": Y[k]}),
     {"columns": ["x", "z"]}, "columns: forward of Net takes no 'z'; it takes x"),
    ("columns that are no names", (X, Y), {"columns": [1]}, "columns must be names of entries"),
    ("rows of different lengths", Items(lambda k: ([1.0] * (1 + k % 2), number(k))), {},
     "data: the samples of a batch have different shapes and cannot be stacked; pad them "),
    ("tensors of different lengths", Items(lambda k: {"x": X[k, : 1 + k % 2], "label": Y[k]}), {},
     "data: the samples of a batch have different shapes and cannot be stacked; pad them "),
    ("objects", Items(lambda k: (object(), number(k))), {}, "data: a sample holds <class 'object"),
    ("float64", (X.double().numpy(), Y), {}, "model: its inputs are float64 and its weights are "),
    ("uint8", (X.byte(), Y), {}, "model: its inputs are uint8 and its weights are of another dtyp"),
    ("distributed", DataLoader(TensorDataset(X, Y), sampler=DistributedSampler(
        TensorDataset(X, Y), num_replicas=2, rank=0, shuffle=False)), {},
     "data: its sampler is a DistributedSampler, which gives each process a part of the data"),
    ("distributed, alone", DataLoader(TensorDataset(X, Y), sampler=DistributedSampler(
        TensorDataset(X, Y), num_replicas=1, rank=0, shuffle=False)), {},
     "data: its sampler is a DistributedSampler"),
    ("index twice", (X, Y), {"index": [0, *range(N - 1)]}, "index 0 stands in the table twice"),
]  # fmt: skip


# What a forward pass says is worded for the last layer alone.
REFUSED_BY = [
    pytest.param(*r[1:], gradient, id=f"{r[0]}-{gradient}")
    for r in REFUSED
    for gradient in GRADIENTS
    if gradient == "last_layer" or not r[3].startswith("model:")
]


@pytest.mark.parametrize(("data", "options", "message", "gradient"), REFUSED_BY)
def test_data_that_are_refused(data: Any, options: dict, message: str, gradient: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        score(data, gradient, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_dtype_brings_inputs_and_weights_together(expected: Tensor) -> None:
    table = score((X.double().numpy(), Y.numpy()), "last_layer", dtype=torch.float32)
    torch.testing.assert_close(table.scores, expected)


def collated(form: str) -> Callable[[list[tuple[Tensor, Tensor, int]]], Any]:
    """Make a collate_fn that stacks inputs and labels and leaves the index as it is."""

    def collate(samples: list[tuple[Tensor, Tensor, int]]) -> Any:
        x, y = (torch.stack([sample[at] for sample in samples]) for at in (0, 1))
        numbers = [sample[2] for sample in samples]
        index = {
            "int32": lambda: np.array(numbers, np.int32),
            "uint16": lambda: np.array(numbers, np.uint16),
            "numpy's numbers": lambda: list(np.array(numbers)),
            "tensors": lambda: list(torch.tensor(numbers)),
            "a tuple": lambda: tuple(numbers),
        }[form]()
        return x, y, index

    return collate


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", ["int32", "uint16", "numpy's numbers", "tensors", "a tuple"])
def test_an_index_that_is_no_tensor(form: str, gradient: str, expected: Tensor) -> None:
    triple = collated(form)

    def in_dict(samples: list[Any]) -> Any:
        x, y, index = triple(samples)
        return {"x": x, "label": y, "idx": index}

    def before(samples: list[Any]) -> Any:
        x, y, index = triple(samples)
        return index, (x, y)

    for collate in (triple, in_dict, before):
        loader = DataLoader(TensorDataset(X, Y, NUMBERS), 4, collate_fn=collate)
        table, notices = told(lambda loader=loader: score(loader, gradient))  # type: ignore[misc]
        torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
        assert table.index.tolist() == NUMBERS.tolist()
        assert notices == []


def test_an_array_that_is_no_index() -> None:
    for wrong in (np.ones(4), np.ones((4, 1), np.int64), np.ones(4, np.bool_)):
        data = [(X[:4], Y[:4], wrong)]
        with pytest.raises(ValueError, match=f"{wrong.dtype} .* is no index"):
            score(DataLoader(data, batch_size=None), "last_layer")  # type: ignore[arg-type]


def test_the_table_has_an_index_of_its_own() -> None:
    for given in (np.arange(N) + 7, torch.arange(N) + 7):
        table = score((X, Y), "last_layer", index=given)
        table.index += 1
        assert given.tolist() == [k + 7 for k in range(N)]
    locked = np.arange(N)
    locked.flags.writeable = False
    score((X, Y), "last_layer", index=locked).index.zero_()
    assert locked.tolist() == IN_ORDER


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("partition", [None, 3])
def test_batches_that_were_made_beforehand(gradient: str, partition: Any) -> None:
    """A data set of batches of several sizes, through a loader that leaves them as they are."""
    cuts = [0, 5, 7, 13, N]
    batches = [(X[a:b], Y[a:b]) for a, b in pairwise(cuts)]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    table = score(loader, gradient, partition=partition)
    plain = score(TensorDataset(X, Y), gradient, partition=partition)
    torch.testing.assert_close(table.scores, plain.scores, rtol=1e-5, atol=1e-6)
    assert table.index.tolist() == IN_ORDER
    assert table.provenance["samples"] == N
