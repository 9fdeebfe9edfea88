"""Class weights and sample weights of a scoring run, as factors on the loss of every row."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..util.array_like import as_tensor

if TYPE_CHECKING:
    from .features import Features

_SHOWN = 100  # weights written into a table's origin; of more, their digest


def check_class_weight(value: Any, loss: Any, label_smoothing: float) -> Tensor | None:
    """Return (C,) float64 class weights on the CPU, or None where there are none.

    Raises
    ------
    TypeError, ValueError
        Anything but finite real numbers of shape (C,); another loss than cross-entropy; label
        smoothing, whose share of the other classes `torch.nn.functional.cross_entropy` weights by
        those classes, which no factor on a row does.
    """
    if value is None:
        return None
    weights = _finite_numbers("class_weight", value, "C")
    if loss != "cross_entropy":
        raise ValueError(f"class_weight goes with loss='cross_entropy', not with {loss!r}")
    if label_smoothing:
        raise ValueError(
            f"class_weight goes without label_smoothing (got {label_smoothing}): the smoothed "
            "loss weights every class of a row; use gradient='full' with a loss of your own"
        )
    return weights


def check_sample_weight(value: Any, gradient: str) -> Tensor | None:
    """Return (N,) float64 sample weights on the CPU, or None where there are none.

    Raises
    ------
    TypeError, ValueError
        Anything but finite real numbers of shape (N,); whole-network gradients.
    """
    if value is None:
        return None
    weights = _finite_numbers("sample_weight", value, "N")
    if gradient != "last_layer":
        raise ValueError(
            f"sample_weight goes with gradient='last_layer', not with {gradient!r}; there, put the "
            "weights beside the labels and give a loss of your own that multiplies by them"
        )
    return weights


class RowWeights:
    """Factors on the rows of a data set's features.

    A row of class y of sample i gets ``class_weight[y] * sample_weight[i]``: the loss of the whole
    is (1/N) sum_i of the weighted losses, where N counts samples, whatever they weigh.
    """

    def __init__(self, class_weight: Tensor | None, sample_weight: Tensor | None) -> None:
        self.class_weight, self.sample_weight = class_weight, sample_weight

    def check(self, samples: int | None = None, classes: int | None = None) -> None:
        """Raise ValueError where the numbers of samples and classes, if known, do not fit."""
        for name, weights, count, what in (
            ("class_weight", self.class_weight, classes, "class"),
            ("sample_weight", self.sample_weight, samples, "sample"),
        ):
            length = None if weights is None else weights.numel()
            if None not in (length, count) and length != count:
                raise ValueError(
                    f"{name} must have one entry per {what}, shape ({count},); got ({length},)"
                )

    def of(self, features: Features, classes: int) -> Tensor | None:
        """(rows,) float64 factors where the features lie, or None where all are 1.

        Raises
        ------
        ValueError
            Another number of samples or classes; class weights with labels that are no class ids.
        """
        self.check(features.samples, classes)
        labels, factors = features.labels, None
        if self.sample_weight is not None:
            factors = self.sample_weight.to(labels.device)
            if features.cu_seqlens is not None:
                lengths = features.cu_seqlens.to(labels.device).long().diff()
                factors = factors.repeat_interleave(lengths)
        if self.class_weight is not None:
            if labels.dim() != 1:
                raise ValueError(
                    f"class_weight goes with class ids (N,), got labels {tuple(labels.shape)}; "
                    "for probabilities t, give w * t / (w * t).sum(1) as labels and "
                    "sample_weight=(w * t).sum(1), which is the same loss"
                )
            # Ignored rows do not count, and labels out of range are refused by their number later.
            ids = labels.long().clamp(0, classes - 1)
            by_class = self.class_weight.to(labels.device)[ids]
            factors = by_class if factors is None else factors * by_class
        return factors

    def describe(self) -> dict[str, Any]:
        """Facts for the origin of a table and for the folder of results to resume."""
        given = {"class_weight": self.class_weight, "sample_weight": self.sample_weight}
        return {name: _described(weights) for name, weights in given.items() if weights is not None}


def _described(weights: Tensor) -> Any:
    if weights.numel() <= _SHOWN:
        return weights.tolist()
    digest = hashlib.blake2b(weights.contiguous().numpy().tobytes(), digest_size=12).hexdigest()
    return f"{weights.numel()} weights, digest {digest}"


def _finite_numbers(name: str, value: Any, length: str) -> Tensor:
    weights = as_tensor(name, value).detach().cpu()
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {weights.dtype}")
    if weights.dim() != 1:
        raise ValueError(f"{name} must have shape ({length},), got {tuple(weights.shape)}")
    wrong = (~weights.isfinite()).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        entry = float(weights[at])
        if name == "sample_weight":
            text = "sample_weight[{row}] is {value}; weights must be finite"
            raise DataError(text, row=at, value=entry)
        raise ValueError(f"{name}[{at}] is {entry}; weights must be finite")
    return weights.to(torch.float64, copy=True)
