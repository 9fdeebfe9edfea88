"""Labels as people keep them, brought to the few forms that scoring takes.

Class ids become int64 before anything is compared with them: in uint8 the default ``ignore_index``
of -100 is 156, a label like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..util.array_like import RaggedRows, as_tensor

TO_IDS = "map them to ids: {name: i for i, name in enumerate(sorted(set(labels)))}"
# Integers that most of torch's operators do not take.
_WIDENED = (torch.uint16, torch.uint32, torch.uint64)


def as_labels(labels: Any) -> Tensor:
    """Return the labels of one batch as a tensor; integers as int64.

    Parameters
    ----------
    labels
        (N,), (N, C) or (N, T): a tensor, an array, a sequence of numbers, or one of equal rows.

    Raises
    ------
    TypeError
        Text, None, or what makes no tensor.
    ValueError
        Rows of different lengths, or a single number.
    """
    text = _first_text(labels)
    if text is not None:
        raise TypeError(f"data: labels are text ({text!r}); {TO_IDS}")
    if not isinstance(labels, Tensor):
        labels = _tensor(labels)
    if labels.is_complex():
        raise TypeError(f"data: labels must be real numbers, got {labels.dtype}")
    if labels.dim() == 0:
        raise ValueError("data: labels must have one entry per sample, got a single number")
    labels = labels.detach()
    return labels.long() if _is_integer(labels) else labels


def _tensor(labels: Any) -> Tensor:
    if isinstance(labels, (list, tuple)):
        if any(one is None for one in labels):
            raise TypeError(
                "data: a label is None; a sample without one gets ignore_index (-100) instead"
            )
        if any(isinstance(one, Tensor) and one.numel() != 1 for one in labels):
            raise TypeError(
                f"data: labels are a {type(labels).__name__} of {len(labels)} tensors; they must "
                "be one tensor, (N,) or (N, C), which a collate_fn can stack"
            )
    if isinstance(labels, (int, float)):
        return torch.tensor(labels, device="cpu")  # refused as what it is, a single number
    try:
        return as_tensor("data: labels", labels)
    except RaggedRows:
        raise ValueError(
            "data: labels of one batch differ in length; pad them with ignore_index (-100) in "
            "collate_fn"
        ) from None


def _first_text(labels: Any) -> str | None:
    """Return the first label if labels are text."""
    if isinstance(labels, (str, bytes)):
        return str(labels)
    if hasattr(labels, "to_numpy"):
        labels = labels.to_numpy()
    if not isinstance(labels, Tensor) and hasattr(labels, "dtype") and hasattr(labels, "ravel"):
        if labels.dtype.kind not in "OUST" or not labels.size:
            return None
        labels = labels.ravel()[:1].tolist()
    if isinstance(labels, (list, tuple)) and labels:
        return _first_text(labels[0])
    return None


def _is_integer(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def counts(labels: Tensor, ignore_index: int) -> Tensor:
    """Mask of the labels that are not ``ignore_index``, whatever integers they are stored in."""
    return (labels.long() if _is_integer(labels) else labels) != ignore_index


def fit_labels(labels: Tensor, classes: int, loss: str) -> Tensor:
    """Bring row labels to the shape and kind that a head of ``classes`` outputs needs.

    Only what can be read in one way is changed: ids (N, 1), two classes given as bool, one-hot
    rows of integers or bool, and (N,) targets of a head with one output. All else stays as it is,
    for the checks of `problem.build_problem`.

    Parameters
    ----------
    labels
        (N,) or (N, C).
    classes
        C, outputs of the head.
    loss
        Its name.

    Raises
    ------
    TypeError
        Class ids that are not integers.
    """
    if labels.dtype == torch.int64 and labels.dim() == 1 and loss == "cross_entropy":
        return labels  # what nearly everybody has
    if labels.dtype in _WIDENED:
        labels = labels.long()
    if loss != "cross_entropy":
        return labels[:, None] if labels.dim() == 1 and classes == 1 else labels
    exact = labels.dtype == torch.bool or _is_integer(labels)
    if labels.dim() == 2 and labels.shape[1] == 1 and classes > 1 and exact:
        labels = labels[:, 0]
    if labels.dim() == 1 and labels.dtype == torch.bool and classes == 2:
        return labels.long()
    if labels.dim() == 2 and labels.shape[1] == classes and exact:
        # 0 and 1 are exact in any dtype, and every other entry is refused afterwards.
        return labels.float()
    column = labels.dim() == 2 and labels.shape[1] == 1 and classes > 1
    if (labels.dim() == 1 or column) and not _is_integer(labels) and not labels.is_complex():
        way = "one output goes with loss='mse' (regression) or 'binary_cross_entropy'"
        if classes > 1:
            way = (
                f"probabilities have shape (N, C) = {(len(labels), classes)}, ids are "
                "labels.long(), and the target of a regression goes with loss='mse'"
            )
        raise TypeError(
            f"labels of shape {'(N, 1)' if column else '(N,)'} must be integer class ids, got "
            f"{str(labels.dtype).removeprefix('torch.')}; {way}"
        )
    return labels


def token_rows(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that count: their places among B x T, their labels, and how many a sequence has.

    A sequence without any keeps its first token, whose ignored label gives it a score of NaN.

    Parameters
    ----------
    labels
        (B, T), those that the tokens at the same places predict.
    """
    counted = counts(labels, ignore_index)
    counted[:, 0] |= ~counted.any(1)
    places = counted.flatten().nonzero().squeeze(1)
    return places, labels.flatten()[places], counted.sum(1)


def document_rows(
    labels: Tensor, documents: Tensor, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_rows` where several documents lie in one row: lengths are those of the documents.

    Parameters
    ----------
    labels
        (B, T), as the batch has them.
    documents
        (B, T): the document of each token, 0, 1, ... in order over all rows; -1 for padding.
    shift
        Whether a token predicts the label that follows it; the last token of a document predicts
        nothing then.
    """
    flat, owner = labels.flatten(), documents.flatten()
    counted = owner >= 0
    if shift:
        counted[:-1] &= owner[1:] == owner[:-1]
        counted[-1] = False
        flat = torch.cat([flat[1:], flat[:1]])
    counted &= counts(flat, ignore_index)
    number = int(owner.max()) + 1
    lengths = torch.bincount(owner[counted], minlength=number)
    inside = (owner >= 0).nonzero().squeeze(1)
    first = torch.full((number,), len(owner), device="cpu").scatter_reduce(
        0, owner[inside], inside, "amin"
    )
    alone = first[lengths == 0]
    flat = flat.clone()
    flat[alone] = ignore_index
    counted[alone] = True
    places = counted.nonzero().squeeze(1)
    return places, flat[places], lengths.clamp_min(1)
