"""Data loaders in data-set order, and what is the input and what the label in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

LABEL_KEYS = ("labels", "label")
_ORDER = "scores come back in data-set order"


def make_loader(data: Any, batch_size: int) -> DataLoader[Any]:
    """Return ``data`` if it is a loader in data-set order, or a loader over the data set.

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
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size)
    if not isinstance(data, Dataset) and not _is_map_style(data):
        raise TypeError(f"data must be a DataLoader or a Dataset, got {type(data).__name__}")
    if not hasattr(data, "__len__"):
        raise TypeError(f"data: the data set {type(data).__name__} has no length")
    if len(data) == 0:
        raise ValueError("data holds no samples")
    if type(data) is TensorDataset:
        # Indexed by a whole batch: no item-by-item collating of what is one tensor already.
        batches = BatchSampler(SequentialSampler(data), batch_size, drop_last=False)
        return DataLoader(data, sampler=batches, batch_size=None)
    return DataLoader(data, batch_size=batch_size, shuffle=False)


def sample_count(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples in a pass, or None where only the pass can tell."""
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return None
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        return None
    return len(loader.dataset)


def known_labels(data: Any) -> Tensor | None:
    """Return the labels of ``data`` where they are at hand without going through it."""
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return data.tensors[1]
    return None


def batch_count(loader: DataLoader[Any]) -> int | None:
    """Return the number of batches in a pass, or None where it is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _is_map_style(data: Any) -> bool:
    has_items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return has_items and not isinstance(data, (str, bytes, Mapping, Tensor))


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
    if not isinstance(batches, Sequence):
        raise _wrong_order(f"its batch_sampler is a {type(batches).__name__}")
    if [i for batch in batches for i in batch] != list(range(_length(loader))):
        raise _wrong_order("its batch_sampler does not visit every sample once, in order")


def _check_order_of(sampler: Any, loader: DataLoader[Any], drop_last: bool = False) -> None:
    if drop_last:
        raise ValueError("data: the loader has drop_last=True, but every sample gets a score")
    if isinstance(sampler, SequentialSampler):
        if len(sampler) != _length(loader):
            raise _wrong_order("its sampler is for a data set of another length")
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


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional and keyword arguments for the model, and the labels, of one batch.

    (input, label) calls ``model(input)``, ``model(*input)`` for a tuple or list and
    ``model(**input)`` for a mapping; a mapping with the labels under ``labels`` or ``label`` calls
    the model with all its other entries.

    Raises
    ------
    TypeError, ValueError
        Another kind of batch; labels that are no tensor of at least one dimension.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise ValueError(
                f"data: a batch that is a dict needs the key 'labels' or 'label', got "
                f"{sorted(map(str, batch))}"
            )
        kwargs = {name: value for name, value in batch.items() if name != key}
        labels = batch[key]
    elif isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise ValueError(
                f"data: a batch must be (input, label) or a dict, got a {type(batch).__name__} "
                f"of {len(batch)}"
            )
        inputs, labels = batch
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    else:
        raise TypeError(
            f"data: a batch must be (input, label) or a dict, got {type(batch).__name__}"
        )
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"data: labels must be a tensor, got {type(labels).__name__}") from None
    if labels.dim() == 0:
        raise ValueError("data: labels must have one entry per sample, got a single number")
    return args, kwargs, labels.detach()


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move the tensors of a nested input, floating-point ones also to ``dtype`` if given."""
    if isinstance(value, Tensor):
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=target, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(item, device, dtype) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device, dtype) for item in value)
    return value
