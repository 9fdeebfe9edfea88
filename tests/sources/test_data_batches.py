"""Loaders in the order of the data set, and what a batch may look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_cases import ITEMS, Stream, X, Y
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from moso_fast.sources.data.batches import make_loader, sample_count, split_batch

WRONG_ORDER = "data: scores come back in data-set order, but the loader may shuffle"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(ITEMS, shuffle=True), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=RandomSampler(ITEMS)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=SubsetRandomSampler(range(6))), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=WeightedRandomSampler([1.0] * 6, 6)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=[0, 2, 1, 3, 4, 5]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=range(5)), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, sampler=SequentialSampler(range(5))), WRONG_ORDER),
        (
            lambda: DataLoader(ITEMS, batch_sampler=BatchSampler(RandomSampler(ITEMS), 2, False)),
            WRONG_ORDER,
        ),
        (
            lambda: DataLoader(
                ITEMS, sampler=BatchSampler(RandomSampler(ITEMS), 2, False), batch_size=None
            ),
            WRONG_ORDER,
        ),
        (lambda: DataLoader(ITEMS, batch_sampler=[[0, 1], [3, 2], [4, 5]]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3]]), WRONG_ORDER),
        (lambda: DataLoader(ITEMS, batch_size=4, drop_last=True), "data: the loader has drop_last"),
        (
            lambda: DataLoader(
                ITEMS, batch_sampler=BatchSampler(SequentialSampler(ITEMS), 4, drop_last=True)
            ),
            "data: the loader has drop_last",
        ),
        (lambda: DataLoader(Stream(), batch_size=4, drop_last=True), "data: the loader has drop"),
        (lambda: Subset(ITEMS, []), "data holds no samples"),
        (lambda: DataLoader(Subset(ITEMS, [])), "data holds no samples"),
    ],
)
def test_loaders_out_of_order_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_loader(make(), 4)


@pytest.mark.parametrize("data", [3, "abc", {"a": 1}, torch.ones(3), iter([1])])
def test_what_is_no_data_set(data: Any) -> None:
    with pytest.raises(TypeError, match="data must be a DataLoader or a Dataset, got "):
        make_loader(data, 4)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (ITEMS, 6),
        (Subset(ITEMS, [5, 1]), 2),
        ([(torch.ones(3), 1)] * 5, 5),
        (TensorDataset(torch.ones(7, 3), torch.ones(7)), 7),
        (DataLoader(ITEMS, generator=torch.Generator()), 6),
        (DataLoader(ITEMS, sampler=range(6)), 6),
        # Each item is a batch: how many samples it holds shows when it is read.
        (DataLoader([(torch.ones(2, 3), torch.ones(2))] * 3, batch_size=None), None),
        (DataLoader(ITEMS, sampler=BatchSampler(range(6), 4, False), batch_size=None), 6),
        (DataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3], [4, 5]]), 6),
        (Stream(), None),
    ],
)
def test_loaders_in_order(data: Any, count: int | None) -> None:
    assert sample_count(make_loader(data, 4)) == count


def test_tensor_data_set_is_sliced_by_whole_batches() -> None:
    inputs = torch.arange(14.0).reshape(7, 2)
    batches = list(make_loader(TensorDataset(inputs, torch.arange(7)), 3))
    assert [len(x) for x, _ in batches] == [3, 2, 2], "no batch of one"
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((X, Y), (X,), {}),
        ([X, [0, 1]], (X,), {}),
        (((X, 3), Y), (X, 3), {}),
        (({"a": X}, Y), (), {"a": X}),
        ({"labels": Y, "x": X}, (), {"x": X}),
        ({"label": Y, "x": X}, (), {"x": X}),
        ((X, Y, torch.tensor([4, 9])), (X,), {}),
        ((torch.tensor([4, 9]), (X, Y)), (X,), {}),
    ],
)
def test_batches(batch: Any, args: tuple, kwargs: dict) -> None:
    got_args, got_kwargs, labels = split_batch(batch)
    assert len(got_args) == len(args)
    assert all(one is other for one, other in zip(got_args, args, strict=True))
    assert got_kwargs.keys() == kwargs.keys()
    assert all(got_kwargs[name] is kwargs[name] for name in kwargs)
    assert torch.equal(labels, Y)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (X, TypeError, r"a batch must be \(input, label\) or a dict, got Tensor"),
        ((X, Y, Y, Y), ValueError, r"must be \(input, label\) or a dict, got a tuple of 4"),
        ((X, Y, X), ValueError, r"tuple of 3 whose last entry \(float32 \(2, 3\)\) is no index"),
        ((X, Y, ["a", "b"]), ValueError, r"tuple of 3 whose last entry \(list\) is no index"),
        ({"x": X}, ValueError, r"needs the key 'labels' or 'label', got \['x'\]"),
        ((X, "ab"), TypeError, r"labels are text \('ab'\); map them to ids"),
        ((X, 1), ValueError, "labels must have one entry per sample, got a single number"),
    ],
)
def test_bad_batches(batch: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        split_batch(batch)
