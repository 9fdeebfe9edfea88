"""Batches of whole-network gradients: rows taken out of them, parts of a loader, seeded views."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from moso_fast.full.batches import (
    Batch,
    SeededViews,
    _of_subset,
    batches,
    seeded_views,
)
from moso_fast.full.flat import Flat
from moso_fast.sources.data.batches import SampleBatches
from moso_fast.sources.data.loaders import SequentialBatches


class Pair(NamedTuple):
    one: Tensor
    other: Any


def batch_of(samples: int, views: int = 1) -> Batch:
    """Return a batch with inputs of every kind."""
    rows = samples * views
    numbers = torch.arange(rows)
    packed = rnn.pack_sequence([torch.full((1 + k % 3,), k) for k in range(rows)], False)
    args = ([numbers, "text"], Pair(numbers[:, None] * 10, (numbers, 3)), packed)
    kwargs = {"mask": numbers > 2, "table": torch.zeros(rows + 1), "number": torch.tensor(7)}
    return Batch(args, kwargs, numbers + 100, torch.arange(samples) + 50, views)


@pytest.mark.parametrize("some", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([1])])
@pytest.mark.parametrize("views", [1, 2])
def test_samples_are_taken_out_of_every_kind_of_input(some: Any, views: int) -> None:
    batch = batch_of(4, views)
    assert (batch.samples, batch.rows) == (4, 4 * views)
    chosen = torch.arange(4)[some]
    rows = torch.cat([torch.arange(k * views, (k + 1) * views) for k in chosen.tolist()])
    found = batch.take(some)
    assert (found.samples, found.rows, found.views) == (len(chosen), len(rows), views)
    (numbers, text), (one, (other, three)), packed = found.args
    assert isinstance(found.args[0], list) and isinstance(found.args[1], Pair)
    assert text == "text" and three == 3
    for tensor in (numbers, one[:, 0] // 10, other, found.labels - 100):
        assert torch.equal(tensor, rows)
    padded, lengths = rnn.pad_packed_sequence(packed, batch_first=True)
    assert torch.equal(padded[:, 0], rows) and torch.equal(lengths, 1 + rows % 3)
    assert torch.equal(found.kwargs["mask"], rows > 2)
    assert found.kwargs["table"] is batch.kwargs["table"]
    assert found.kwargs["number"] is batch.kwargs["number"]
    assert torch.equal(found.index, chosen + 50)


def test_a_whole_batch_is_not_copied() -> None:
    batch = batch_of(4)
    assert batch.take(slice(None)) is batch and batch.take(torch.arange(4)) is batch
    assert batch.take(torch.tensor([3, 2, 1, 0])).labels.tolist() == [103, 102, 101, 100]
    neighbours = batch.take(torch.tensor([1, 2])).args[1].one
    assert neighbours.data_ptr() == batch.args[1].one[1:].data_ptr()


def test_flat_inputs_are_taken_with_their_rows() -> None:
    words, starts = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2, 2])
    weights, labels = torch.arange(5) / 10, torch.tensor([0, 1, 2])
    flat = Flat((0, 2), 1, "offsets")
    batch = Batch((words, starts), {"weights": weights}, labels, torch.arange(3), 1, (flat,))
    assert [id(v) for v in batch.inputs()] == [id(words), id(starts), id(weights)]
    found = batch.take(torch.tensor([2, 0]))
    assert found.flat == (flat,)
    assert found.args[0].tolist() == [7, 8, 9, 5, 6] and found.args[1].tolist() == [0, 3]
    assert torch.equal(found.kwargs["weights"], weights[[2, 3, 4, 0, 1]])


def test_a_batch_in_another_dtype() -> None:
    batch = Batch(
        (torch.ones(2), torch.ones(2, dtype=torch.int64)),
        {"x": torch.ones(2)},
        torch.ones(2),
        torch.arange(2),
        1,
        (Flat((0,), 1, "offsets"),),
    )
    found = batch.on(torch.device("cpu"), torch.float64)
    kinds = [v.dtype for v in (*found.args, found.kwargs["x"], found.labels)]
    assert kinds == [torch.float64, torch.int64, torch.float64, torch.float64]
    assert found.index is batch.index and found.flat == batch.flat and found.views == 1


class Items(Dataset):
    """Ten samples: (number, label)."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index % 4


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([Items()[k] for k in range(10)])


def by_hand(items: list[Any]) -> Any:
    xs, ys = zip(*items, strict=True)
    return torch.cat(xs), torch.tensor(ys)


def start(worker: int) -> None:
    """Be a function that workers begin with."""


LOADERS: dict[str, tuple[Callable[[], DataLoader], list[int]]] = {
    "own batches": (lambda: DataLoader(Items(), batch_size=3, collate_fn=by_hand), [3, 2]),
    "sequential": (
        lambda: DataLoader(
            Items(),
            batch_sampler=SequentialBatches(10, 4),
            collate_fn=by_hand,
        ),
        [4, 1],
    ),
    "a sampler of batches": (
        lambda: DataLoader(
            TensorDataset(torch.arange(10.0), torch.arange(10) % 4),
            sampler=BatchSampler(SequentialSampler(range(10)), 3, False),
            batch_size=None,
        ),
        [3, 2],
    ),
    "other batches": (
        lambda: DataLoader(
            Items(), batch_sampler=[[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]], collate_fn=by_hand
        ),
        [2, 3],
    ),
    "stream": (lambda: DataLoader(Stream(), batch_size=4, collate_fn=by_hand), [2, 2, 1]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_of_a_part(name: str) -> None:
    """Whole ones of its own where the data can be indexed; else what each batch has of it."""
    build, sizes = LOADERS[name]
    loader, members = build(), torch.tensor([1, 3, 6, 7, 9])
    data, seen = SampleBatches(loader), []

    def prepared(batch: Batch) -> Batch:
        seen.append(batch)
        return batch

    found = list(batches(loader, members, 1, data, prepared))
    assert [batch.samples for batch in found] == sizes
    assert torch.equal(torch.cat([batch.index for batch in found]), members)
    assert torch.equal(torch.cat([batch.labels for batch in found]), members % 4)
    assert torch.equal(torch.cat([batch.args[0] for batch in found]).long(), members)
    assert len(seen) == (len(found) if name not in ("other batches", "stream") else 3)
    whole = list(batches(loader, None, 1, data, prepared))
    assert torch.equal(torch.cat([batch.index for batch in whole]), torch.arange(10))


def test_a_loader_over_some_samples_is_like_the_given_one() -> None:
    given = DataLoader(
        Items(), batch_size=3, num_workers=2, collate_fn=by_hand, worker_init_fn=start
    )
    given.pin_memory = True
    found = _of_subset(given, torch.tensor([4, 2, 9]))
    for made, dataset in ((found, given.dataset), (seeded_views(given, 2, 5), given.dataset)):
        assert made is not None
        assert (made.batch_size, made.num_workers, made.pin_memory) == (3, 2, True)
        assert made.worker_init_fn is start
        assert isinstance(made.sampler, SequentialSampler)
        assert getattr(made.dataset, "dataset", getattr(made.dataset, "base", None)) is dataset
    assert found.collate_fn is by_hand
    assert list(found.dataset.indices) == [4, 2, 9]


class Random(Items):
    """A sample plus a number of each generator."""

    def __getitem__(self, index: int) -> Any:
        noise = [float(torch.rand(())), random.random(), float(np.random.random())]
        return torch.tensor([float(index), *noise], dtype=torch.float64), index % 4


def test_seeded_views() -> None:
    """The noise is that of the seed made of (seed, view, sample), for all three generators."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    views = SeededViews(Random(), 3, 8)
    assert len(views) == 10
    for index in (0, 7):
        readings = views[index]
        assert len(readings) == 3
        for view, (x, label) in enumerate(readings):
            seed = int(np.random.SeedSequence([8, view, index]).generate_state(1)[0])
            expected = [
                float(torch.rand((), generator=torch.Generator().manual_seed(seed))),
                random.Random(seed).random(),
                float(np.random.RandomState(seed).random()),
            ]
            assert x.tolist() == [index, *expected] and label == index % 4
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_generators_are_as_before_where_a_sample_cannot_be_read() -> None:
    class Broken(Items):
        def __getitem__(self, index: int) -> Any:
            raise OSError("no such file")

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(OSError, match="no such file"):
        SeededViews(Broken(), 2, 0)[3]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize("kind", ["own batches", "sequential", "a sampler of batches"])
def test_views_of_a_sample_lie_together(kind: str) -> None:
    loader = LOADERS[kind][0]()
    made = seeded_views(loader, 2, 0)
    size = 4 if kind == "sequential" else 3
    x, y = next(iter(made))
    expected = torch.arange(size).repeat_interleave(2)
    assert torch.equal(x.flatten().long(), expected) and torch.equal(y, expected % 4)
    found = list(batches(made, None, 2, SampleBatches(made), lambda batch: batch))
    assert [batch.samples for batch in found] == [min(size, 10 - k) for k in range(0, 10, size)]
    assert all(batch.views == 2 for batch in found)
    part = list(batches(made, torch.tensor([2, 5]), 2, SampleBatches(made), lambda batch: batch))
    assert part[0].labels.tolist() == [2, 2, 1, 1] and part[0].index.tolist() == [2, 5]


def test_batches_without_a_sampler_of_their_own_have_one_sample() -> None:
    with pytest.raises(ValueError) as caught:
        seeded_views(DataLoader(Stream(), batch_size=2), 2, 0)
    said = "views needs a data set that is read sample by sample, by its index"
    assert str(caught.value) == said
    with pytest.raises(ValueError) as caught:
        seeded_views(DataLoader(Items(), batch_size=None), 2, 0)
    assert str(caught.value) == said
    loader = DataLoader(Items(), batch_sampler=[[0, 1], [2]])
    assert seeded_views(loader, 2, 0).batch_size == 1


def test_rows_that_do_not_hold_whole_samples() -> None:
    loader = DataLoader(Items(), batch_size=5, collate_fn=by_hand)
    with pytest.raises(ValueError) as caught:
        list(batches(loader, None, 2, SampleBatches(loader), lambda batch: batch))
    assert str(caught.value) == "data: a batch of 5 rows cannot hold 2 views a sample"
