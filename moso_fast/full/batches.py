"""Batches for whole-network gradients: part by part, in chunks, with several views of a sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
)

from ..sources.data.batches import SampleBatch, SampleBatches, to_device
from ..sources.data.loaders import SequentialBatches
from .flat import Flat
from .norms.packed import some_of


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of some samples, each of which has ``views`` consecutive rows.

    ``index`` (n,) holds their numbers in the data set. ``flat`` says which of the inputs hold the
    values of all rows one after the other.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor
    index: Tensor
    views: int = 1
    flat: tuple[Flat, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.index)

    @property
    def rows(self) -> int:
        """Number of rows: samples times views."""
        return len(self.labels)

    def take(self, samples: Tensor | slice) -> Batch:
        """Those of some samples (numbers within the batch)."""
        chosen = torch.arange(self.samples, device="cpu")[samples]
        rows = (chosen[:, None] * self.views + torch.arange(self.views, device="cpu")).flatten()
        if len(chosen) == self.samples and bool((chosen.diff() == 1).all()):
            return self
        args, kwargs, labels = _rows_of((self.args, self.kwargs, self.labels), rows, self.rows)
        if self.flat:
            inputs, form = tree_flatten((self.args, self.kwargs))
            given, _ = tree_flatten((args, kwargs))
            for flat in self.flat:
                for number, value in flat.take(inputs, rows, self.rows).items():
                    given[number] = value
            args, kwargs = tree_unflatten(given, form)
        return Batch(args, kwargs, labels, self.index[chosen], self.views, self.flat)

    def inputs(self) -> list[Any]:
        """List what the model is given, in the order in which `Flat` counts."""
        return tree_flatten((self.args, self.kwargs))[0]

    def on(self, device: torch.device, dtype: torch.dtype | None) -> Batch:
        """Move it to a device, floating-point inputs also to ``dtype`` if given."""
        args, kwargs = to_device((self.args, self.kwargs), device, dtype)
        labels = to_device(self.labels, device, dtype)
        return Batch(args, kwargs, labels, self.index, self.views, self.flat)


def _rows_of(value: Any, rows: Tensor, count: int) -> Any:
    """Rows of every tensor in a nested input that has one row a sample; the rest as it is."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != count:
            return value
        if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
            return value[int(rows[0]) : int(rows[-1]) + 1]
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows, count) for name, item in value.items()}
    if isinstance(value, PackedSequence):
        return some_of(value, rows)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rows_of(item, rows, count) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(item, rows, count) for item in value)
    return value


def batches(
    loader: DataLoader[Any],
    members: Tensor | None,
    views: int,
    data: SampleBatches,
    prepared: Callable[[Batch], Batch],
) -> Iterator[Batch]:
    """Yield the batches of one part: ``members`` are its sample numbers, ascending; None = all.

    The samples of a part are collated to whole batches of their own where the data set can be
    indexed; otherwise they are picked from the batches as they come. ``prepared`` makes each batch
    ready for that.

    Raises
    ------
    ValueError
        A batch whose rows are not samples times views.
    """
    if members is not None and not isinstance(loader.dataset, IterableDataset):
        rebuilt = None if data.may_be_packed() else _of_subset(loader, members)
        if rebuilt is not None:
            start = 0
            for one in _pieces(rebuilt, data, views):
                yield prepared(_numbered(one, members[start : start + one[2]], views))
                start += one[2]
            return
    start = 0
    for one in _pieces(loader, data, views):
        numbers = torch.arange(start, start + one[2], device="cpu")
        start += one[2]
        whole = prepared(_numbered(one, numbers, views))
        if members is None:
            yield whole
            continue
        chosen = torch.isin(numbers, members).nonzero().flatten()
        if len(chosen):
            yield whole.take(chosen)


def _pieces(
    loader: DataLoader[Any], data: SampleBatches, views: int
) -> Iterator[tuple[Any, Tensor, int]]:
    """Arguments, labels and number of samples of each batch; packed documents one by one."""
    if loader is data.loader:  # a whole pass, which notes and compares what the data say
        yield from (_batch(one, views) for one in data)
        return
    for batch in data.read(loader):
        for one in data.apart(data.split(batch, views)):
            yield _batch(one, views)


def _batch(batch: SampleBatch, views: int) -> tuple[Any, Tensor, int]:
    labels = batch.labels
    if len(labels) % views:
        raise ValueError(f"data: a batch of {len(labels)} rows cannot hold {views} views a sample")
    return (batch.args, batch.kwargs), labels, len(labels) // views


def _numbered(one: tuple[Any, Tensor, int], numbers: Tensor, views: int) -> Batch:
    (args, kwargs), labels, _ = one
    return Batch(args, kwargs, labels, numbers, views)


def _of_subset(loader: DataLoader[Any], members: Tensor) -> DataLoader[Any] | None:
    """Build a loader like ``loader`` over some samples; None where its batches are custom-made."""
    numbers = members.tolist()
    if isinstance(loader.sampler, BatchSampler) and loader.batch_size is None:
        size = loader.sampler.batch_size
        pieces = [numbers[k : k + size] for k in range(0, len(numbers), size)]
        return DataLoader(loader.dataset, sampler=pieces, batch_size=None)
    fixed = loader.batch_size
    if isinstance(loader.batch_sampler, SequentialBatches):
        fixed = loader.batch_sampler.batch_size
    if fixed is None:
        return None
    return DataLoader(
        Subset(loader.dataset, numbers),
        batch_size=fixed,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class SeededViews(Dataset[Any]):
    """Reads every sample ``views`` times, with random augmentation that is the same each time.

    Before each reading the generators of torch, Python and numpy are seeded by (seed, view,
    sample); afterwards they are as they were.
    """

    def __init__(self, base: Any, views: int, seed: int) -> None:
        self.base, self.views, self.seed = base, views, seed

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> list[Any]:
        """All views of one sample."""
        import numpy as np

        kept = random.getstate(), np.random.get_state()
        readings = []
        try:
            with torch.random.fork_rng(devices=[]):
                for view in range(self.views):
                    seed = np.random.SeedSequence([self.seed, view, index]).generate_state(1)[0]
                    torch.default_generator.manual_seed(int(seed))
                    random.seed(int(seed))
                    np.random.seed(int(seed))
                    readings.append(self.base[index])
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        return readings


def seeded_views(loader: DataLoader[Any], views: int, seed: int) -> DataLoader[Any]:
    """Build a loader like ``loader`` whose batches hold ``views`` consecutive rows a sample.

    Raises
    ------
    ValueError
        A data set that cannot be indexed, or batches that the loader does not collate itself.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        by_index = isinstance(loader.sampler, BatchSampler)
        if isinstance(loader.dataset, IterableDataset) or not by_index:
            raise ValueError("views needs a data set that is read sample by sample, by its index")
    given = loader.batch_sampler if loader.batch_size is None else loader
    size = getattr(given or loader.sampler, "batch_size", 1)
    collate: Callable[[Any], Any] = loader.collate_fn
    if loader.batch_size is None:
        collate = default_collate
    return DataLoader(
        SeededViews(loader.dataset, views, seed),
        batch_size=size,
        num_workers=loader.num_workers,
        collate_fn=_Flat(collate),
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class _Flat:
    """Collates the views of all samples of a batch, those of one sample together."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[list[Any]]) -> Any:
        return self.collate([reading for readings in samples for reading in readings])
