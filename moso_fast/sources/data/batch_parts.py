"""One batch taken apart, and how torch's own collating is undone where it went too far."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...core.labels import as_labels
from ...util.array_like import as_tensor

LABEL_KEYS = ("labels", "label")
INDEX_KEYS = ("idx", "index")


@dataclass(frozen=True)
class SampleBatch:
    """Arguments for the model and the labels of some samples.

    ``index`` (samples,) holds the numbers that the data give them, or None. ``documents`` (B, T)
    tells which sample each token belongs to where several lie in one row (see `packed`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor
    index: Tensor | None = None
    documents: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of samples: labels, or documents."""
        return len(self.labels) if self.documents is None else int(self.documents.max()) + 1


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional and keyword arguments for the model, and the labels: all that a batch holds.

    As `SampleBatches.split` for a model whose forward takes anything.
    """
    inputs, labels, _ = parts_of(batch)
    labels = as_labels(labels)
    if isinstance(inputs, Mapping):
        return (), dict(inputs), labels
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, labels


def parts_of(batch: Any) -> tuple[Any, Any, Any]:
    """Split a batch into inputs, labels and index, the last possibly None."""
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise ValueError(
                f"data: a batch that is a dict needs the key 'labels' or 'label', got "
                f"{sorted(map(str, batch))}"
            )
        return {name: value for name, value in batch.items() if name != key}, batch[key], None
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"data: a batch must be (input, label) or a dict, got {type(batch).__name__}"
        )
    if len(batch) == 3:
        inputs, labels, index = batch
        if not is_index(index, None):
            kind = type(index).__name__
            if hasattr(index, "dtype") and hasattr(index, "shape"):
                kind = f"{str(index.dtype).removeprefix('torch.')} {tuple(index.shape)}"
            raise ValueError(
                "data: a batch must be (input, label), (input, label, index) or a dict; got a "
                f"{type(batch).__name__} of 3 whose last entry ({kind}) is no index, (N,) "
                "integers; several inputs go as ((a, b), label)"
            )
        return inputs, labels, index
    if len(batch) != 2:
        raise ValueError(
            f"data: a batch must be (input, label) or a dict, got a {type(batch).__name__} "
            f"of {len(batch)}"
        )
    inputs, labels = batch
    if isinstance(labels, (tuple, list)) and len(labels) == 2 and is_index(inputs, None):
        data, target = labels
        # (index, (input, label)): a pair of labels would be two numbers a sample.
        if isinstance(data, Mapping) or (isinstance(data, Tensor) and data.dim() > 1):
            return data, target, inputs
    return inputs, labels, None


def is_index(value: Any, samples: int | None) -> bool:
    """Tell whether these are (N,) integers; ``samples`` = N where that is known."""
    if isinstance(value, Tensor):
        real = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        numbers = real and value.dim() == 1
    elif isinstance(value, (list, tuple)):
        numbers = bool(value) and all(map(_is_integer, value))
    else:
        # Arrays of NumPy and what offers itself as one, columns of pandas too.
        kind = getattr(getattr(value, "dtype", None), "kind", None)
        numbers = kind in ("i", "u") and len(getattr(value, "shape", ())) == 1
    return numbers and samples in (None, len(value))


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and is_index(value[None], None)
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def index_of(value: Any) -> Tensor:
    """Return (N,) int64 on the CPU for what `is_index` takes."""
    return as_tensor("data: index", value).long().cpu()


def checked_index(index: Any, samples: int, views: int = 1) -> Tensor | None:
    """Return the numbers of the samples of a batch, one for the ``views`` rows of each, or None."""
    if index is None:
        return None
    index = index_of(index)
    if len(index) != samples:
        raise ValueError(f"data: a batch of {samples} samples brings {len(index)} indices")
    index = index[::views]
    if len(index.unique()) != len(index):
        raise ValueError(
            "data: the index of a batch, (input, label, index) or (index, (input, label)), holds a "
            "number twice, so it is none; several inputs go as ((a, b), label)"
        )
    return index


def joined_index(indices: list[Tensor | None], column: str | None) -> Tensor | None:
    """Join the index of all batches, None where they have none.

    Parameters
    ----------
    indices
        One a batch.
    column
        The column of a data set in order that it was taken from: what is no index there is left
        aside with a notice. None where nothing else says the order.

    Raises
    ------
    ValueError
        A number that comes twice or is negative, or batches without any beside others.
    """
    given = [one for one in indices if one is not None]
    if not given:
        return None
    if len(given) != len(indices):
        raise ValueError("data: some batches bring the index of their samples and some do not")
    index = torch.cat(given)
    ordered = index.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice) or (len(ordered) and int(ordered[0]) < 0):
        what = f"{int(twice[0])} comes twice" if len(twice) else f"{int(ordered[0])} is no index"
        if column is not None:
            # A number within a part of the data, say; the order of the data set is known.
            warnings.warn(
                f"data: column {column!r} is no index of the samples ({what}); the "
                "table has their place in the data set instead",
                stacklevel=3,
            )
            return None
        raise ValueError(
            f"data: the index that samples bring must be unique and not negative, but {what}; "
            "with an IterableDataset every worker must yield a share of its own"
        )
    return index


def stacked_lists(value: Any) -> Any:
    """Undo how torch collates samples that are Python lists: one tensor for each of their places.

    [[1, 2], [3, 4], [5, 6]] of three samples comes as [tensor([1, 3, 5]), tensor([2, 4, 6])] and
    goes back to (3, 2). Python's floats, which become float64 there, get torch's default dtype.
    """
    if not isinstance(value, list) or not value:
        return value
    items = [stacked_lists(one) for one in value]
    depth = 1 if isinstance(value[0], Tensor) else 2
    if not all(isinstance(one, Tensor) and min(one.dim(), 2) == depth for one in items):
        return value
    if len({(one.shape, one.dtype) for one in items}) > 1:
        return value
    stacked = torch.stack(items, 1)
    return stacked.to(torch.get_default_dtype()) if stacked.dtype == torch.float64 else stacked


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether both are None, or equal tensors."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def same_samples(one: SampleBatch, other: SampleBatch) -> bool:
    """Tell whether two batches hold the same samples, by their labels if these differ at all."""
    if not equal(one.labels, other.labels):
        return False
    if len(one.labels.unique()) > 1:
        return True
    # One label throughout says nothing about the order: all tensors that the model gets do.
    mine, theirs = (
        [leaf for leaf in tree_leaves((b.args, b.kwargs)) if isinstance(leaf, Tensor)]
        for b in (one, other)
    )
    return len(mine) == len(theirs) and all(map(equal, mine, theirs))


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
