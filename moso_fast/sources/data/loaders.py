"""Data loaders in data-set order: what is taken, what is made, and what is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from ...core.labels import as_labels
from ...util.array_like import as_tensor

_ORDER = "scores come back in data-set order"


def make_loader(data: Any, batch_size: int) -> DataLoader[Any]:
    """Return ``data`` if it is a loader in data-set order, or a loader over the data set.

    Two or three tensors or arrays of equal length, (inputs, labels[, index]), are a data set too.
    The samples of an `IterableDataset` cannot be known to come in the same order again; that is
    checked afterwards, by the labels of each pass.

    Raises
    ------
    TypeError
        Neither DataLoader nor data set.
    ValueError
        A loader that shuffles, leaves samples out or drops the last batch; no samples.
    """
    if isinstance(data, DataLoader):
        _check_order(data)
        return data
    data = _formatted(_as_arrays(data))
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size)
    if not isinstance(data, Dataset) and not _is_map_style(data):
        raise TypeError(f"data must be a DataLoader or a Dataset, got {_kind(data)}")
    if not hasattr(data, "__len__"):
        raise TypeError(f"data: the data set {type(data).__name__} has no length")
    if len(data) == 0:
        raise ValueError("data holds no samples")
    batches = SequentialBatches(len(data), batch_size)
    if all(map(_takes_lists, _tensors_behind(data))):
        # Indexed by a whole batch: no item-by-item collating of what is one tensor already.
        return DataLoader(data, sampler=batches, batch_size=None)
    if batches.merges:
        return DataLoader(data, batch_sampler=batches)
    return DataLoader(data, batch_size=batch_size, shuffle=False)


def _tensors_behind(data: Any) -> tuple[Tensor | None, ...]:
    """Return the tensors whose rows, or some of them, are the samples; (None,) where none are."""
    while type(data) is Subset and isinstance(data.indices, (list, tuple, range)):
        data = data.dataset
    return data.tensors if type(data) is TensorDataset else (None,)


def _takes_lists(tensor: Tensor | None) -> bool:
    """Tell whether torch can index the tensor by a list: not uint16, 32 and 64 in torch 2.9."""
    if tensor is None:
        return False
    try:
        tensor[:1][[0]]
    except NotImplementedError:
        return False
    return True


class SequentialBatches(BatchSampler):
    """Batches in order, the last of which never holds a single sample if that can be helped.

    Models that squeeze their output (``.squeeze()`` without a dimension) lose the batch dimension
    of a batch of one: it takes a sample from the batch before it, or joins it.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        super().__init__(SequentialSampler(range(length)), batch_size, drop_last=False)
        self.length = length
        self.merges = length > batch_size > 1 and length % batch_size == 1

    def __iter__(self) -> Iterator[list[int]]:
        bounds = [*range(0, self.length, self.batch_size), self.length]
        if self.merges and self.batch_size > 2:
            bounds[-2] -= 1
        elif self.merges:
            del bounds[-2]
        for start, stop in itertools.pairwise(bounds):
            yield list(range(start, stop))

    def __len__(self) -> int:
        batches = -(-self.length // self.batch_size)
        return batches - 1 if self.merges and self.batch_size == 2 else batches


def sample_count(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples in a pass, or None where only the pass can tell."""
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return None
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        return None
    return len(loader.dataset)


def column_names(data: Any) -> list[str]:
    """Return the names of a data set's columns, as far as they show without reading it."""
    names = getattr(data, "column_names", None)
    if names is None and isinstance(data, (list, tuple)) and data:
        names = data[0]
    if not isinstance(names, (list, tuple, Mapping)):
        return []
    return [name for name in names if isinstance(name, str)]


def gathers_samples(loader: DataLoader[Any]) -> bool:
    """Tell whether the first batch of a loader is made of several samples."""
    if loader.batch_size is not None:
        return loader.batch_size > 1
    if isinstance(loader.dataset, IterableDataset):
        return False  # each item of the stream is a batch
    # The order of whoever chooses the samples was checked: it is the same when it is read again.
    first = next(iter(loader.batch_sampler or loader.sampler), None)
    return isinstance(first, (list, tuple)) and len(first) > 1


def batch_count(loader: DataLoader[Any]) -> int | None:
    """Return the number of batches in a pass, or None where it is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def known_labels(loader: DataLoader[Any]) -> Tensor | None:
    """Return the labels of a loader's data set where they are at hand without reading it."""
    data = loader.dataset
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return data.tensors[1]
    return None


def is_stream(loader: DataLoader[Any]) -> bool:
    """Tell whether the samples have no number of their own, but come one after the other."""
    return isinstance(loader.dataset, IterableDataset)


def without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Build a loader like ``loader`` that reads its stream in this process, hence in its order.

    Several workers each go through the stream: all of it, so that every sample comes once a
    worker, or a share of it, so that their samples alternate.

    Raises
    ------
    ValueError
        A loader of a class of its own, which cannot be built anew.
    """
    what = f"the IterableDataset is read by {loader.num_workers} workers, which repeat or mix it"
    if type(loader) is not DataLoader:
        raise ValueError(
            f"data: {_ORDER}, but {what}; give the {type(loader).__name__} num_workers=0, or let "
            "each sample bring its index: (input, label, index)"
        )
    warnings.warn(
        f"data: {what}; it is read without workers instead, in its own order (samples that bring "
        "their index, (input, label, index), may come in any order)",
        stacklevel=2,
    )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def shuffling_stage(stream: Any) -> str | None:
    """Name what reorders a stream on its way, as far as its class shows: a buffer, or shards."""
    waiting, seen = [stream], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        name = type(one).__name__
        if name == "Shuffler" and getattr(one, "_enabled", True):
            return name
        if type(one).__module__.startswith("datasets.") and name.startswith(
            ("BufferShuffled", "Shuffled")
        ):
            return "shuffle()"
        for value in (getattr(one, "__dict__", None) or {}).values():
            several = value if isinstance(value, (list, tuple)) and len(value) < 100 else [value]
            waiting += [v for v in several if _is_stage(v)]
    return None


def _is_stage(value: Any) -> bool:
    return isinstance(value, IterableDataset) or type(value).__name__.endswith("ExamplesIterable")


def _as_arrays(data: Any) -> Any:
    """Make a data set of (inputs, labels) or (inputs, labels, index) given as whole arrays."""
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        return data
    if not (_is_array(data[0]) and all(_is_array(d) or isinstance(d, list) for d in data[1:])):
        return data
    if not all(len(_shape(d)) for d in data):
        return data
    lengths = [len(d) for d in data]
    if len(set(lengths)) > 1:
        raise ValueError(
            "data: (inputs, labels) must be equally long, got "
            f"{' and '.join(str(_shape(d)) for d in data)}"
        )
    inputs, labels, *index = data
    numbers = [as_tensor("data: index", one) for one in index]
    return TensorDataset(as_tensor("data: inputs", inputs), as_labels(labels), *numbers)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else (len(value),)


def _formatted(data: Any) -> Any:
    """Let a data set of Hugging Face give tensors if it was not told what to give."""
    if type(data).__module__.partition(".")[0] != "datasets":
        return data
    given = getattr(data, "format", None)
    if isinstance(given, Mapping):
        return data if given.get("type") is not None else data.with_format("torch")
    if hasattr(data, "_formatting"):
        return data if data._formatting is not None else data.with_format("torch")
    return data


def _is_map_style(data: Any) -> bool:
    if hasattr(data, "iloc") or getattr(getattr(data, "dtype", None), "kind", "O") != "O":
        return False  # an array of numbers, or a frame of pandas: inputs without labels
    has_items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return has_items and not isinstance(data, (str, bytes, Mapping, Tensor))


def _kind(data: Any) -> str:
    kind = type(data).__name__
    if isinstance(data, Mapping) and data and all(_is_map_style(d) for d in data.values()):
        names = ", ".join(map(repr, data))
        return f"{kind} of {names}; give one of them, data[{next(iter(data))!r}]"
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        return f"{kind}; labels come with the inputs, as (inputs, labels)"
    return kind


def _check_order(loader: DataLoader[Any]) -> None:
    if getattr(loader, "drop_last", False) or getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError("data: the loader has drop_last=True, but every sample gets a score")
    if isinstance(loader.dataset, IterableDataset):
        return
    if loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler:
        sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if type(sampler) is BatchSampler:
            _check_order_of(sampler.sampler, loader, sampler.drop_last)
        else:
            _check_order_of(sampler, loader)
        return
    batches = loader.batch_sampler
    if not isinstance(batches, (Sequence, SequentialBatches)):
        raise _wrong_order(f"its batch_sampler is a {type(batches).__name__}")
    if [i for batch in batches for i in batch] != list(range(_length(loader))):
        raise _wrong_order("its batch_sampler does not visit every sample once, in order")


def _check_order_of(sampler: Any, loader: DataLoader[Any], drop_last: bool = False) -> None:
    if drop_last:
        raise ValueError("data: the loader has drop_last=True, but every sample gets a score")
    if isinstance(sampler, DistributedSampler):
        raise ValueError(
            "data: its sampler is a DistributedSampler, which gives each process a part of the "
            "data (and some samples twice); scores of several processes cannot be joined yet, so "
            "score in one process with DataLoader(dataset, shuffle=False)"
        )
    if isinstance(sampler, SequentialSampler):
        if len(sampler) != _length(loader):
            raise _wrong_order("its sampler is for a data set of another length")
        return
    if isinstance(sampler, SequentialBatches):
        return
    if not isinstance(sampler, (Sequence, Tensor)):
        raise _wrong_order(f"its sampler is a {type(sampler).__name__}")
    if [int(i) for i in sampler] != list(range(_length(loader))):
        raise _wrong_order("its sampler does not visit every sample once, in order")


def _length(loader: DataLoader[Any]) -> int:
    length: int = len(loader.dataset)  # type: ignore[arg-type]
    if length == 0:
        raise ValueError("data holds no samples")
    return length


def _wrong_order(what: str) -> ValueError:
    return ValueError(
        f"data: {_ORDER}, but the loader may shuffle or leave samples out ({what}); "
        "use DataLoader(dataset, shuffle=False), with a Subset for a part of the data"
    )
