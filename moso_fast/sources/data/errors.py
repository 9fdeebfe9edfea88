"""What to do about data that cannot be collated, or that a model cannot be called with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .batch_parts import SampleBatch

_RAGGED = (
    "stack expects each tensor to be equal size",
    "each element in list of batch should be of equal size",
    "resize storage that is not resizable",
)


def collating_hint(said: str) -> Exception | None:
    """Make an error that says what to do of one that torch's own collate_fn raised, or None."""
    if any(part in said for part in _RAGGED):
        return ValueError(
            "data: the samples of a batch have different shapes and cannot be stacked; pad them "
            "in the data set, or give a DataLoader whose collate_fn does "
            "(DataCollatorWithPadding of transformers, torch's pad_sequence)"
        )
    if "default_collate: batch must contain" in said:
        found = said.rpartition("found ")[2].partition("\n")[0]
        return TypeError(
            f"data: a sample holds {found}, which makes no batch; turn it into a tensor in the "
            "data set (ToTensor for images), or give a collate_fn"
        )
    return None


def hint_on(said: str, batch: SampleBatch, was_larger: bool) -> str | None:
    """Say what of the data may have made a forward pass fail, or None.

    Parameters
    ----------
    said
        First line of the error.
    batch
        What the model was called with.
    was_larger
        Whether a batch of several samples went through before.
    """
    if "same dtype" in said or "should be the same" in said:
        inputs = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        given = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in inputs}))
        way = "convert them to floating point in the data set"
        if any(v.is_floating_point() for v in inputs):
            way = "dtype=torch.float32 brings both to that (or another dtype)"
        return f"its inputs are {given} and its weights are of another dtype; {way}"
    if "unexpected keyword argument" in said:
        return "its forward does not take a column of the batch; choose what it gets by columns="
    way = (
        "(a .squeeze() without a dimension does that); choose a batch size that leaves no "
        "single sample, or give the data set itself instead of a loader"
    )
    if len(batch.labels) == 1 and was_larger:
        return f"the forward failed in a batch of one sample, and not in larger ones {way}"
    if len(batch.labels) == 1 and ("must get (N, D)" in said or "imension" in said):
        return f"the forward lost a dimension in a batch of one sample {way}"
    return None
