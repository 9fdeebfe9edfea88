"""Samples with Python lists in them: models that take a list of columns, or one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from data_cases import CLASSES, GRADIENTS, WIDTH, Items, N, Net, X, Y, number, score, told
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from moso_fast.sources.data.batches import SampleBatches
from moso_fast.sources.data.loaders import make_loader

FIELDS = 3
IDS = torch.randint(7, (N, FIELDS), generator=torch.Generator().manual_seed(3))


class Fields(nn.Module):
    """Looks each field up in a table of its own, as recommenders do; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embeddings = nn.ModuleList(nn.Embedding(7, 4) for _ in range(FIELDS))
        self.fc = nn.Linear(4, CLASSES)
        self.forwards = 0

    def forward(self, cat: Any) -> Tensor:
        self.forwards += 1
        found = [table(one) for table, one in zip(self.embeddings, cat, strict=False)]
        return self.fc(torch.tanh(torch.stack(found).sum(0)))


class OfTensor(Fields):
    """The same network for ids (B, 3)."""

    def forward(self, cat: Tensor) -> Tensor:
        return super().forward(list(cat.unbind(1)))


class WithNumbers(Fields):
    """Takes a list of fields beside a tensor of numbers."""

    def forward(self, cat: Any, dense: Tensor) -> Tensor:
        return super().forward(cat) + self.fc.bias * 0 + 0 * dense.sum(1, keepdim=True)


class RowByRow(Net):
    """Goes through its samples, which a list of columns lets it do with the columns."""

    def forward(self, x: Any) -> Tensor:
        return self.fc(torch.stack([self.features(row) for row in x]))


def in_dict(k: int) -> dict[str, Any]:
    return {"cat": list(IDS[k]), "labels": number(k)}


def of_ints(k: int) -> dict[str, Any]:
    return {"cat": IDS[k].tolist(), "labels": number(k), "idx": k}


def by_place(k: int) -> tuple[Any, int]:
    return list(IDS[k]), number(k)


@pytest.fixture(scope="module")
def of_fields() -> Tensor:
    return score(TensorDataset(IDS, Y), "last_layer", OfTensor()).scores


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("size", [2, FIELDS, 4, N])
@pytest.mark.parametrize("item", [in_dict, of_ints, by_place])
@pytest.mark.parametrize("own", [True, False])
def test_fields_reach_the_model_as_a_list(
    own: bool, item: Any, size: int, gradient: str, of_fields: Tensor
) -> None:
    """Also where there are as many fields as samples, and a tensor would go through unseen."""
    data = DataLoader(Items(item), batch_size=size) if own else Items(item)
    table, notices = told(lambda: score(data, gradient, Fields(), batch_size=size))
    torch.testing.assert_close(table.scores, of_fields, rtol=1e-5, atol=1e-6)
    assert notices == []


@pytest.mark.parametrize("options", [{"views": 2}, {"partition": 2}, {"dtype": torch.float64}])
def test_fields_of_the_whole_network(options: dict[str, Any]) -> None:
    expected = score(TensorDataset(IDS, Y), "full", OfTensor(), **options).scores
    for data in (Items(in_dict), DataLoader(Items(in_dict), batch_size=FIELDS)):
        found = score(data, "full", Fields(), **options).scores
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", [OfTensor, Fields])
def test_lists_become_a_tensor_where_the_model_takes_one(
    model: type[Fields], gradient: str, of_fields: Tensor
) -> None:
    for data in (Items(of_ints), DataLoader(Items(of_ints), batch_size=FIELDS)):
        found = score(data, gradient, model()).scores
        torch.testing.assert_close(found, of_fields, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("size", [2, WIDTH, N])
def test_a_model_that_goes_through_its_samples_gets_rows(size: int, gradient: str) -> None:
    """With as many samples as columns the columns would go through unseen."""
    expected = score(TensorDataset(X, Y), "last_layer").scores
    for item in (
        lambda k: {"x": X[k].tolist(), "label": number(k)},
        lambda k: (X[k].tolist(), number(k)),
    ):
        for data in (Items(item), DataLoader(Items(item), batch_size=size)):
            found = score(data, gradient, RowByRow(), batch_size=size).scores
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_list_beside_a_tensor(gradient: str, of_fields: Tensor) -> None:
    data = Items(lambda k: {**in_dict(k), "dense": X[k].tolist()})
    for given in (data, DataLoader(data, batch_size=FIELDS)):
        found = score(given, gradient, WithNumbers()).scores
        torch.testing.assert_close(found, of_fields, rtol=1e-5, atol=1e-6)


def test_numbers_in_another_dtype() -> None:
    expected = score((X, Y), "last_layer", dtype=torch.float64).scores
    data = Items(lambda k: {"x": X[k].tolist(), "label": number(k)})
    for gradient in GRADIENTS:
        found = score(data, gradient, dtype=torch.float64).scores
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_errors_of_the_model_are_its_own() -> None:
    wrong = Items(lambda k: {"cat": [7, 0, 0], "labels": number(k)})
    for model in (Fields(), OfTensor()):
        with pytest.raises(IndexError, match="index out of range in self"):
            score(wrong, "last_layer", model)


def test_trying_both_forms_leaves_the_model_as_it_was() -> None:
    model = Fields().train()
    score(Items(by_place), "last_layer", model)
    assert all(module.training for module in model.modules())
    plain, lists = Fields(), Fields()
    score(DataLoader(TensorDataset(IDS, Y), batch_size=4), "last_layer", OfTensor())
    score(DataLoader(Items(in_dict), batch_size=4), "last_layer", lists)
    score(DataLoader(TensorDataset(IDS.t()[0], Y), batch_size=4), "last_layer", First(plain))
    assert lists.forwards == plain.forwards + 1, "one forward pass of a few samples tells"


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_model_that_takes_fields_for_samples_is_refused(gradient: str) -> None:
    """It takes no list, and of a tensor the rows for the fields."""

    class Neither(Fields):
        def forward(self, cat: Any) -> Tensor:
            return super().forward(torch.nn.functional.relu(cat))

    data = DataLoader(Items(in_dict), batch_size=FIELDS)
    with pytest.raises(ValueError, match=r"'cat' is a list .* Neither makes 3 rows of 2 samples"):
        score(data, gradient, Neither())


class First(nn.Module):
    """Gives a network of fields its first field three times."""

    def __init__(self, inner: Fields) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner([x] * FIELDS)


def test_the_index_is_read_without_the_model() -> None:
    model = Fields()
    data = SampleBatches(make_loader(Items(of_ints), 4), model)
    data.split(next(iter(data.loader)), ready=False)
    index = data.read_index()
    assert index is not None and index.tolist() == list(range(N))
    assert model.forwards == 0


def test_shuffled_stream_of_lists_and_one_class() -> None:
    class Shuffled(IterableDataset):
        generator = torch.Generator().manual_seed(6)

        def __iter__(self) -> Iterator[Any]:
            for k in torch.randperm(N, generator=self.generator).tolist():
                yield {"cat": list(IDS[k]), "labels": 0}

    with pytest.raises(ValueError, match="the stream begins with other samples"):
        score(Shuffled(), "last_layer", Fields())
