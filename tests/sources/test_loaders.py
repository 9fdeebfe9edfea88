"""Loaders in the order of the data: what is made, and in full what is said of another order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from feature_cases import ITEMS, Items, Stream
from library_stand_ins import of_module
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from moso_fast.sources.data.loaders import (
    SequentialBatches,
    batch_count,
    column_names,
    gathers_samples,
    is_stream,
    known_labels,
    make_loader,
    sample_count,
    shuffling_stage,
    without_workers,
)

ORDER = "data: scores come back in data-set order, but the loader may shuffle or leave samples out"
WAY = "use DataLoader(dataset, shuffle=False), with a Subset for a part of the data"
DROPS = "data: the loader has drop_last=True, but every sample gets a score"
ALL, PAIR = [[0, 1], [2, 3], [4, 5]], [(torch.ones(3), 1)] * 4


def error_of(call: Any, *arguments: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (DataLoader(ITEMS, shuffle=True), "its sampler is a RandomSampler"),
        (
            DataLoader(ITEMS, batch_sampler=BatchSampler(RandomSampler(ITEMS), 2, False)),
            "its sampler is a RandomSampler",
        ),
        (
            DataLoader(
                ITEMS, batch_size=None, sampler=BatchSampler(RandomSampler(ITEMS), 2, False)
            ),
            "its sampler is a RandomSampler",
        ),
        (
            DataLoader(ITEMS, sampler=[0, 1, 2, 3, 5, 4]),
            "its sampler does not visit every sample once, in order",
        ),
        (
            DataLoader(ITEMS, sampler=torch.arange(5)),
            "its sampler does not visit every sample once, in order",
        ),
        (
            DataLoader(ITEMS, sampler=SequentialSampler(range(5))),
            "its sampler is for a data set of another length",
        ),
        (
            DataLoader(ITEMS, batch_sampler=[[0, 1], [3, 2], [4, 5]]),
            "its batch_sampler does not visit every sample once, in order",
        ),
        (
            DataLoader(ITEMS, batch_sampler=iter(ALL)),  # type: ignore[arg-type]
            "its batch_sampler is a list_iterator",
        ),
    ],
)
def test_a_loader_in_another_order(loader: DataLoader, said: str) -> None:
    assert error_of(make_loader, loader, 4) == f"{ORDER} ({said}); {WAY}"


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ITEMS, batch_size=4, drop_last=True),
        DataLoader(ITEMS, batch_sampler=BatchSampler(range(6), 4, True)),
        DataLoader(ITEMS, batch_size=None, sampler=BatchSampler(range(6), 4, True)),
        DataLoader(Stream(), batch_size=4, drop_last=True),
    ],
)
def test_a_loader_that_drops_samples(loader: DataLoader) -> None:
    assert error_of(make_loader, loader, 4) == DROPS


def test_loaders_in_order_are_taken_as_they_are() -> None:
    for loader in (
        DataLoader(ITEMS, sampler=torch.arange(6)),
        DataLoader(ITEMS, batch_sampler=SequentialBatches(6, 4)),
        DataLoader(ITEMS, batch_size=None, sampler=SequentialBatches(6, 4)),
        DataLoader(Stream(), batch_size=3),
    ):
        assert make_loader(loader, 4) is loader


class NoLength(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class Frame:
    """A frame of pandas has rows by ``iloc``."""

    iloc = None

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return index


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (3, TypeError, "data must be a DataLoader or a Dataset, got int"),
        ("abc", TypeError, "data must be a DataLoader or a Dataset, got str"),
        (Frame(), TypeError, "data must be a DataLoader or a Dataset, got Frame"),
        ({}, TypeError, "data must be a DataLoader or a Dataset, got dict"),
        ({"a": 1}, TypeError, "data must be a DataLoader or a Dataset, got dict"),
        (
            {"a": [1], 2: [1]},
            TypeError,
            "data must be a DataLoader or a Dataset, got dict of 'a', 2; give one of them, "
            "data['a']",
        ),
        (
            torch.ones(3),
            TypeError,
            "data must be a DataLoader or a Dataset, got Tensor; labels come with the inputs, as "
            "(inputs, labels)",
        ),
        (
            np.ones(3),
            TypeError,
            "data must be a DataLoader or a Dataset, got ndarray; labels come with the inputs, as "
            "(inputs, labels)",
        ),
        (NoLength(), TypeError, "data: the data set NoLength has no length"),
        ([], ValueError, "data holds no samples"),
        (DataLoader([], sampler=[]), ValueError, "data holds no samples"),
        (
            (torch.ones(3, 2), np.ones(2), torch.ones(3)),
            ValueError,
            "data: (inputs, labels) must be equally long, got (3, 2) and (2,) and (3,)",
        ),
        (
            (torch.ones(3, 2), [1, 2]),
            ValueError,
            "data: (inputs, labels) must be equally long, got (3, 2) and (2,)",
        ),
    ],
)
def test_what_is_no_data_set(data: Any, kind: type[Exception], message: str) -> None:
    assert error_of(make_loader, data, 4, kind=kind) == message


def test_some_rows_of_tensors_are_read_by_the_batch() -> None:
    whole = TensorDataset(torch.arange(20.0).view(10, 2), torch.arange(10))
    some = Subset(whole, [9, 2, 4, 7, 1])
    for data, rows in ((some, [9, 2, 4, 7, 1]), (Subset(some, range(1, 5)), [2, 4, 7, 1])):
        loader = make_loader(data, 2)
        assert loader.dataset is data and loader.batch_size is None
        inputs, labels = (torch.cat(column) for column in zip(*loader, strict=True))
        assert labels.tolist() == rows and torch.equal(inputs, whole.tensors[0][rows])
    # Rows that something else is made of come one by one.
    own = type("Own", (TensorDataset,), {})(*whole.tensors)
    for data in (Subset(own, [1, 2]), Subset(whole, torch.tensor([1, 2])), Subset([*whole], [3])):
        assert make_loader(data, 2).batch_size == 2


def test_arrays_are_a_data_set() -> None:
    inputs = np.arange(10.0).reshape(5, 2)
    index = np.array([4, 3, 2, 1, 0], "u2")
    for data in (
        (inputs, [1, 0, 1, 0, 1], index),
        [torch.tensor(inputs), np.array([1, 0, 1, 0, 1]), index],
    ):
        loader = make_loader(data, 3)
        assert type(loader.dataset) is TensorDataset and loader.batch_size is None
        first, second = loader
        assert first[0].tolist() == inputs[:3].tolist() and first[1].tolist() == [1, 0, 1]
        assert first[2].tolist() == [4, 3, 2] and second[0].tolist() == inputs[3:].tolist()
    # Two samples are no arrays, and neither are numbers or a tuple of them.
    for data in (
        [PAIR[0], PAIR[1]],
        [torch.tensor(1.0), torch.tensor(2.0)],
        (torch.ones(2, 3), (0, 1)),
        ([0, 1], torch.ones(2, 3)),
    ):
        assert make_loader(data, 3).dataset is data


def test_loaders_that_are_made() -> None:
    loader = make_loader(PAIR, 3)
    assert type(loader.batch_sampler) is SequentialBatches
    assert [len(labels) for _, labels in loader] == [2, 2], "no batch of one sample"
    even = make_loader(PAIR, 2)
    assert even.batch_size == 2 and type(even.batch_sampler) is BatchSampler
    stream = Stream()
    streamed = make_loader(stream, 4)
    assert streamed.dataset is stream and streamed.batch_size == 4


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (7, 3, [3, 2, 2]),
        (4, 3, [2, 2]),
        (6, 3, [3, 3]),
        (5, 2, [2, 3]),
        (3, 2, [3]),
        (1, 1, [1]),
        (3, 1, [1, 1, 1]),
        (1, 3, [1]),
        (3, 3, [3]),
        (2, 5, [2]),
    ],
)
def test_sizes_of_batches_of_ours(length: int, size: int, expected: list[int]) -> None:
    batches = SequentialBatches(length, size)
    assert [len(batch) for batch in batches] == expected and len(batches) == len(expected)
    assert [k for batch in batches for k in batch] == list(range(length))
    assert batches.merges is (1 < size < length and length % size == 1)


def test_counts_that_are_known_beforehand() -> None:
    for loader, samples, batches, several in (
        (make_loader(PAIR, 3), 4, 2, True),
        (make_loader(PAIR, 1), 4, 4, False),
        (DataLoader(Stream(), batch_size=4), None, None, True),
        (DataLoader(Stream(), batch_size=None), None, None, False),
        (DataLoader(PAIR, batch_size=None), None, 4, False),
        (DataLoader(PAIR, batch_size=None, sampler=SequentialBatches(4, 2)), 4, 2, True),
        (DataLoader(PAIR, batch_sampler=[[0], [1, 2, 3]]), 4, 2, False),
        (DataLoader(PAIR, batch_sampler=[]), 4, 0, False),
    ):
        found = (sample_count(loader), batch_count(loader), gathers_samples(loader))
        assert found == (samples, batches, several)
    assert is_stream(DataLoader(Stream())) and not is_stream(DataLoader(PAIR))


def test_labels_that_are_at_hand() -> None:
    x, y = torch.ones(3, 2), torch.arange(3)
    assert known_labels(make_loader(TensorDataset(x, y), 2)) is y
    assert known_labels(make_loader(TensorDataset(x, y, y), 2)) is None
    own = type("Own", (TensorDataset,), {})
    assert known_labels(DataLoader(own(x, y))) is None and known_labels(DataLoader(PAIR)) is None


def test_names_of_columns() -> None:
    named = Items()
    named.column_names = ("x", 3, "label")
    assert column_names(named) == ["x", "label"]
    assert column_names([{"x": 1, "y": 2}, {"z": 3}]) == ["x", "y"]
    assert column_names(({"x": 1},)) == ["x"] and column_names([("x", 1)]) == ["x"]
    assert column_names([]) == column_names([3]) == column_names(ITEMS) == []


def test_a_stream_without_workers() -> None:
    def collate(samples: Any) -> Any:
        return samples

    loader = DataLoader(Stream(), batch_size=3, num_workers=2, collate_fn=collate)
    with pytest.warns(UserWarning) as caught:
        alone = without_workers(loader)
    assert [str(one.message) for one in caught] == [
        "data: the IterableDataset is read by 2 workers, which repeat or mix it; it is read "
        "without workers instead, in its own order (samples that bring their index, (input, label, "
        "index), may come in any order)"
    ]
    assert alone.num_workers == 0 and alone.batch_size == 3 and alone.collate_fn is collate
    assert alone.dataset is loader.dataset and alone.pin_memory is False
    own = type("Own", (DataLoader,), {})(Stream(), num_workers=2)
    assert error_of(without_workers, own) == (
        "data: scores come back in data-set order, but the IterableDataset is read by 2 workers, "
        "which repeat or mix it; give the Own num_workers=0, or let each sample bring its index: "
        "(input, label, index)"
    )


class Stage(IterableDataset):
    """A stage of a stream, over others."""

    def __init__(self, *before: Any, enabled: bool = True, **named: Any) -> None:
        self.before, self._enabled = before, enabled
        self.__dict__.update(named)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Shuffler(Stage):
    pass


class BufferShuffledExamplesIterable:
    def __init__(self, inner: Any = None) -> None:
        self.inner = inner


class ShuffledDataSourcesArrowExamplesIterable(BufferShuffledExamplesIterable):
    pass


class MappedExamplesIterable(BufferShuffledExamplesIterable):
    pass


for _cls in (
    BufferShuffledExamplesIterable,
    ShuffledDataSourcesArrowExamplesIterable,
    MappedExamplesIterable,
):
    of_module(_cls, "datasets.iterable_dataset")


def test_what_shuffles_a_stream_is_found_below_other_stages() -> None:
    shuffler = Shuffler()
    shuffled = ShuffledDataSourcesArrowExamplesIterable()
    for stream, said in (
        (shuffler, "Shuffler"),
        (Stage(Stage(), Stage(shuffler)), "Shuffler"),
        (Stage(source=Stage(given=[shuffler])), "Shuffler"),
        (Stage(Shuffler(enabled=False)), None),
        (Stage(MappedExamplesIterable(BufferShuffledExamplesIterable())), "shuffle()"),
        (Stage(ex_iterable=shuffled), "shuffle()"),
        (Stage(MappedExamplesIterable()), None),
        (Stage(values=[shuffler] * 99), "Shuffler"),
        (Stage(values=[shuffler] * 100), None),
        (Stage(words={"a": shuffler}), None),
    ):
        assert shuffling_stage(stream) == said
    ring = Stage()
    ring.before = (ring,)
    assert shuffling_stage(ring) is None
    # Another library may have a class of such a name.
    other = of_module(type("ShuffledExamplesIterable", (MappedExamplesIterable,), {}), "other")
    assert shuffling_stage(Stage(other())) is None


def test_data_sets_of_hugging_face_give_tensors() -> None:
    def with_format(self: Any, kind: str) -> Any:
        return type(self)(format={"type": kind}, _formatting=kind)

    def of_library(module: str, **facts: Any) -> Any:
        made = type("Made", (Stage,), {"with_format": with_format, "__len__": lambda self: 2})
        return of_module(made, module)(**facts)

    for module, facts, kind in (
        ("datasets.arrow_dataset", {"format": {"type": None}}, "torch"),
        ("datasets.arrow_dataset", {"format": {"type": "numpy"}}, "numpy"),
        ("datasets", {"format": {}}, "torch"),
    ):
        found: Any = make_loader(of_library(module, **facts), 2).dataset
        assert found.format["type"] == kind
    for facts, kind in (({"_formatting": None}, "torch"), ({"_formatting": "numpy"}, "numpy")):
        found = make_loader(of_library("datasets.iterable_dataset", **facts), 2).dataset
        assert found._formatting == kind
    for module, facts in (("mydatasets", {"format": {"type": None}}), ("datasets", {})):
        given = of_library(module, **facts)
        assert make_loader(given, 2).dataset is given
