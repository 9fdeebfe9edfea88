"""Samples in their order: streams and their workers, and batches that leave no sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    score,
    told,
)
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
    get_worker_info,
)

from moso_fast.sources.data.batches import SampleBatches
from moso_fast.sources.data.loaders import SequentialBatches, make_loader
from moso_fast.tables.table import ScoreTable


class Squeezing(Net):
    """Loses the batch dimension of a batch of one."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x)[:, None].squeeze()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return expected_scores()


class Stream(IterableDataset):
    """A stream in order, of which every worker reads all, or a share of its own."""

    def __init__(self, share: bool = False, numbered: bool = False, shuffled: bool = False) -> None:
        self.share, self.numbered, self.shuffled = share, numbered, shuffled
        self.generator = torch.Generator().manual_seed(6)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order = list(range(N))
        if self.shuffled:
            order = torch.randperm(N, generator=self.generator).tolist()
        worker = get_worker_info()
        if self.share and worker is not None:
            order = order[worker.id :: worker.num_workers]
        for k in order:
            yield (X[k], Y[k], k) if self.numbered else (X[k], Y[k])


def in_place(table: ScoreTable) -> Tensor:
    """Scores by their index."""
    assert table.index.sort().values.tolist() == IN_ORDER
    return table.scores[table.index.argsort()]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("share", [False, True])
def test_streams_with_workers_are_read_without_them(
    share: bool, gradient: str, expected: Tensor
) -> None:
    loader = DataLoader(Stream(share), batch_size=4, num_workers=2)
    table, notices = told(lambda: score(loader, gradient))
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
    assert table.index.tolist() == IN_ORDER
    assert len(notices) == 1
    assert "read by 2 workers, which repeat or mix it; it is read without workers" in notices[0]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_that_bring_their_index(workers: int, gradient: str, expected: Tensor) -> None:
    loader = DataLoader(Stream(share=True, numbered=True), batch_size=4, num_workers=workers)
    table, notices = told(lambda: score(loader, gradient))
    torch.testing.assert_close(in_place(table), expected, rtol=1e-5, atol=1e-6)
    assert (table.index.tolist() == IN_ORDER) == (workers < 2)
    assert notices == []


def test_streams_that_are_refused() -> None:
    class Own(DataLoader):
        pass

    for loader, message in (
        (Own(Stream(), batch_size=4, num_workers=2), "give the Own num_workers=0"),
        (
            DataLoader(Stream(numbered=True), batch_size=4, num_workers=2),
            "must be unique and not negative, but 0 comes twice; with an IterableDataset every",
        ),
        (Stream(shuffled=True), "the stream begins with other samples when it is read again"),
    ):
        with pytest.raises(ValueError, match=message):
            score(loader, "last_layer")


def test_shuffled_stream_with_its_index(expected: Tensor) -> None:
    table = score(Stream(numbered=True, shuffled=True), "last_layer")
    torch.testing.assert_close(in_place(table), expected, rtol=1e-5, atol=1e-6)
    assert table.index.tolist() != IN_ORDER


def test_shuffled_stream_of_one_class() -> None:
    """Labels that are all alike say nothing about the order; the inputs do."""

    class Sorted(Stream):
        def __iter__(self) -> Iterator[tuple[Any, ...]]:
            return ((x, 0 * y) for x, y in super().__iter__())

    with pytest.raises(ValueError, match="the stream begins with other samples"):
        score(Sorted(shuffled=True), "last_layer")
    assert len(score(Sorted(), "last_layer")) == N


def test_stream_that_is_spent_after_one_pass(expected: Tensor) -> None:
    class Once(IterableDataset):
        samples = iter(list(zip(X, Y, strict=True)))

        def __iter__(self) -> Iterator[Any]:
            return self.samples

    torch.testing.assert_close(score(Once(), "last_layer").scores, expected)


def test_order_by_index_is_compared_from_pass_to_pass() -> None:
    data = SampleBatches(make_loader(Stream(numbered=True, shuffled=True), 4))
    list(data)
    with pytest.raises(ValueError, match=r"in another order \(by their index\) than in the pass"):
        list(data)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 10, 16, 17, 33])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_batches_of_ours_leave_no_sample_alone(length: int, size: int) -> None:
    batches = list(SequentialBatches(length, size))
    assert [k for batch in batches for k in batch] == list(range(length))
    assert len(batches) == len(SequentialBatches(length, size))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= max(size, 3 if size == 2 else size)
    assert min(sizes) > 1 or size == 1 or length == 1
    if length % size != 1:
        assert sizes[:-1] == [size] * (len(sizes) - 1)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_last_batch_of_one(size: int, expected: Tensor) -> None:
    assert N % size == 1
    for data in ((X, Y), Items(lambda k: (X[k], Y[k]))):
        table = score(data, "last_layer", Squeezing(), batch_size=size)
        torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
    # A loader of the caller's leaves a batch of one, which goes through as one of two.
    loader = DataLoader(TensorDataset(X, Y), batch_size=size)
    table = score(loader, "last_layer", Squeezing())
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partition", [None, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_whole_network_over_batches_of_ours(partition: Any, views: int) -> None:
    """17 samples in batches of 4 leave one over, which changes nothing."""
    data = Items(lambda k: (X[k], Y[k], k + 100))
    one = score(data, "full", batch_size=4, views=views, partition=partition)
    other = score(data, "full", batch_size=6, views=views, partition=partition)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-6)
    assert one.index.tolist() == other.index.tolist() == NUMBERS.tolist()
