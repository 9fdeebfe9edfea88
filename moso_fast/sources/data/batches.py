"""Batches as people feed them: what is the input, what the label, what the index of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from ...core.labels import as_labels
from .arguments import Arguments, decoder_inputs
from .batch_parts import (
    INDEX_KEYS,
    SampleBatch,
    checked_index,
    equal,
    index_of,
    is_index,
    joined_index,
    parts_of,
    same_samples,
    split_batch,
    stacked_lists,
    to_device,
)
from .errors import collating_hint, hint_on
from .list_inputs import ListInputs
from .loaders import (
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
from .packed import PACKING_KEYS, alone, find_documents, mixes_documents

__all__ = [
    "SampleBatch",
    "SampleBatches",
    "batch_count",
    "known_labels",
    "make_loader",
    "sample_count",
    "split_batch",
    "to_device",
]


class SampleBatches:
    """The batches of a loader, one pass after the other, each split into what the model needs.

    Parameters
    ----------
    loader
        In data-set order, see `loaders.make_loader`.
    model
        The network whose forward decides which entries of a dict batch are inputs; None = all.
    columns
        Names of the entries that the model gets, see `arguments.Arguments`.
    ignore_index
        The label of tokens that do not count.
    dtype
        To which the model's inputs are brought, see `_list_inputs.ListInputs`.

    Raises
    ------
    ValueError
        A stream that is read by several workers or shuffled, and whose samples bring no index.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        model: nn.Module | None = None,
        columns: Sequence[str] | None = None,
        ignore_index: int = -100,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.loader, self.model, self.ignore_index = loader, model, ignore_index
        self.arguments = Arguments(model, columns)
        self.index: Tensor | None = None
        self.rows = 0  # of the batches of this pass, or of the last
        self.packed = False  # whether rows of several documents came
        self._passes = 0
        # Calls the model with keyword arguments, to see whether it keeps packed documents apart.
        self.run: Callable[[dict[str, Any]], Any] | None = None
        self._mixed: bool | None = None
        self.indexed = False  # whether a batch brought numbers of its samples
        self.lists = ListInputs(model, dtype)
        # Set where a partition or an index goes by the rows, before any of them was read.
        self.by_row = False
        self._flattens: bool | None = None  # whether the loader lays each batch into one row
        self._from_column: str | None = None  # that the index was taken from
        self.was_larger = False  # whether the model took a batch of several samples
        self._collated = loader.collate_fn is default_collate
        self._stream = is_stream(loader)
        if self._stream:
            self._check_stream()

    def __iter__(self) -> Iterator[SampleBatch]:
        """Go through the data once; afterwards `index` holds the numbers of all samples, if any.

        The model must be ready to be run: its weights in place, in eval mode.

        Raises
        ------
        TypeError, ValueError
            Batches of the wrong kind; an index that is not unique; a stream that begins with other
            samples when it is read again.
        """
        return self._once(ready=True)

    def _once(self, ready: bool) -> Iterator[SampleBatch]:
        indices: list[Tensor | None] = []
        self.rows = 0
        first: SampleBatch | None = None
        for batch in self.read(self.loader):
            one = self.split(batch, ready=ready)
            first = first or one
            indices.append(one.index)
            self.rows += len(one.labels)
            yield from self.apart(one)
        index = joined_index(indices, None if self._stream else self._from_column)
        if self._passes and not equal(index, self.index):
            raise ValueError(
                "data: the loader yields the samples in another order (by their index) than in "
                "the pass before; it must give the same order every time"
            )
        self.index = index
        self._passes += 1
        if self._passes == 1 and index is None and first is not None and self._stream:
            self._check_again(first, ready)

    def apart(self, batch: SampleBatch) -> list[SampleBatch]:
        """Batches to run instead of ``batch``: itself, or its documents one by one.

        Packed documents stay together where `run` is there to show that the model keeps them apart.
        """
        documents = batch.documents
        if documents is None:
            return [batch]
        self.packed = True
        if self.by_row and not self._flattens:
            raise ValueError(
                "data: a row holds several documents, each of which is a sample, and partition= or "
                "index= was taken to go by the rows; give the rows as a list of dicts or as a "
                "Hugging Face data set, which show it beforehand"
            )
        if self.run is not None and not batch.args:
            if self._mixed is None:
                self._mixed = mixes_documents(self.run, batch.kwargs, batch.labels, documents)
            if not self._mixed:
                return [batch]
        pieces = []
        for number in range(batch.samples):
            kwargs, labels = alone(batch.kwargs, batch.labels, documents, number)
            index = None if batch.index is None else batch.index[number : number + 1]
            whole = torch.zeros_like(labels, device="cpu")
            pieces.append(SampleBatch(batch.args, kwargs, labels, index, whole))
        return pieces

    def read_index(self) -> Tensor | None:
        """Return the numbers that the data give their samples, None where they give none.

        Goes through the data where batches were seen to have them, but not yet in one whole pass.
        """
        if not self._passes and self.indexed:
            for _ in self._once(ready=False):
                pass
        return self.index

    def split(self, batch: Any, views: int = 1, ready: bool = True) -> SampleBatch:
        """Take a batch apart.

        (input, label) calls ``model(input)``, ``model(*input)`` for a tuple or list and
        ``model(**input)`` for a mapping; (input, label, index) and (index, (input, label)) also
        say the number of each sample. A mapping has the labels under ``labels`` or ``label``, may
        have numbers under ``idx`` or ``index``, and gives the model what its forward names.
        A list that torch's own collate_fn made of the places of a list stays one where the model
        takes it so, and becomes one tensor else. ``views`` is how many consecutive rows each sample
        has; ``ready`` = False says that the model must not be run, for what is read of a batch
        beside its inputs.

        Raises
        ------
        TypeError, ValueError
            Another kind of batch; labels that are no tensor of at least one dimension.
        """
        inputs, labels, index = parts_of(batch)
        if self._collated:
            labels = stacked_lists(labels)
        labels = as_labels(labels)
        if not isinstance(inputs, Mapping):
            index = checked_index(index, len(labels), views)
            self.indexed |= index is not None
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            if self._collated and len(args) > self.arguments.places:
                rows = stacked_lists(list(args))
                if isinstance(rows, Tensor):
                    args, came = (rows,), {id(rows): list(args)}
                    if ready:
                        args, _ = self.lists.settled(args, {}, came, len(labels))
            if len(args) > self.arguments.places:
                raise ValueError(
                    f"data: a batch ((a, b), label) calls the model with {len(args)} inputs, and "
                    f"forward of {self.arguments.kind} takes {self.arguments.places}; a sample "
                    "with its index is (input, label, index)"
                )
            return SampleBatch(args, {}, labels, index)
        entries = {name: stacked_lists(v) if self._collated else v for name, v in inputs.items()}
        came = {id(v): inputs[name] for name, v in entries.items() if v is not inputs[name]}
        if self._flattens is None:
            # Told by the first batch: the last may hold one sample of any loader.
            several = gathers_samples(self.loader) and sample_count(self.loader) != 1
            self._flattens = len(labels) == 1 and several
        documents = find_documents(entries, labels, self._flattens, self.ignore_index)
        samples = len(labels) if documents is None else int(documents.max()) + 1
        if index is None:
            entries, index = self._own_index(entries, samples, views)
        else:
            index = checked_index(index, samples, views)
        self.indexed |= index is not None
        args, kwargs = self.arguments.choose(entries)
        kwargs = decoder_inputs(self.model, self.arguments, kwargs, labels)
        if came and ready and documents is None:  # documents are cut out of tensors
            args, kwargs = self.lists.settled(args, kwargs, came, len(labels))
        return SampleBatch(args, kwargs, labels, index, documents)

    def may_be_packed(self) -> bool:
        """Tell whether rows may hold several documents, as far as that shows without reading."""
        return any(name in PACKING_KEYS for name in column_names(self.loader.dataset))

    @contextmanager
    def forward_of(self, batch: SampleBatch) -> Iterator[None]:
        """Run the forward pass of ``batch`` in the block: what fails says how to mend the data."""
        try:
            yield
            self.was_larger |= len(batch.labels) > 1
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            said = str(error).strip().partition("\n")[0]
            hint = hint_on(said, batch, self.was_larger)
            if hint is None:
                raise
            raise ValueError(f"model: {hint} ({type(error).__name__}: {said})") from error

    def read(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Batches of a loader as they come; samples that cannot be collated say what to do."""
        batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, TypeError, ValueError) as error:
                if self._collated and (hint := collating_hint(str(error))) is not None:
                    raise hint from error
                raise
            yield batch

    def _check_stream(self) -> None:
        loader = self.loader
        stage = shuffling_stage(loader.dataset)
        if loader.num_workers < 2 and stage is None:
            return
        first = next(iter(loader), None)
        if first is None or self.split(first, ready=False).index is not None:
            return
        if stage is not None:
            raise ValueError(
                f"data: the stream is shuffled ({stage}), so that no sample keeps its number; "
                "score it before it is shuffled, or let each sample bring its index: "
                "(input, label, index), or a column 'idx'"
            )
        self.loader = without_workers(loader)

    def _check_again(self, first: SampleBatch, ready: bool) -> None:
        """Compare the first batch with the first of another reading, if the stream has one."""
        again = next(iter(self.read(self.loader)), None)
        if again is None:
            return
        if not same_samples(first, self.split(again, ready=ready)):
            raise ValueError(
                "data: the stream begins with other samples when it is read again, so that no "
                "sample keeps its number; turn its shuffling off, or let each sample bring its "
                "index: (input, label, index), or a column 'idx'"
            )

    def _own_index(
        self, entries: dict[str, Any], samples: int, views: int
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Take the index out of a dict batch, unless the model has an input of that name."""
        for name in INDEX_KEYS:
            if name not in entries or self.arguments.gets(name):
                continue
            found = entries[name]
            if is_index(found, samples):
                self._from_column = name
                entries = {key: value for key, value in entries.items() if key != name}
                return entries, index_of(found)[::views]
        return entries, None
