"""Arguments that launches over one tile of classes share: what they must be, and the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moso_fast.core.status import STATUS_SLOTS

from .operands import FLOAT_DTYPES, check_matrix, check_vector, describe

LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")


class RowOutputs(NamedTuple):
    """What the first pass writes of n rows under K heads; unit stride along the rows.

    ``loss``, ``residual_sqnorm``, ``margin``, ``entropy``: (K, n) float32 of one head stride;
    ``feature_sqnorm``: (n,) float32, 0 where the features are not finite; ``counted``: (n,) bool.
    """

    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    feature_sqnorm: Tensor
    counted: Tensor


def kind_of(loss: str, labels: Tensor) -> str:
    """Return what row_losses.py calls this loss with these labels."""
    if loss == "cross_entropy":
        return "ids" if labels.dim() == 1 else "soft"
    return "binary" if loss == "binary_cross_entropy" else "squared"


def check_heads(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str] = ("weight", "bias"),
) -> tuple[int, int, int, int]:
    """Return (n, K, C, D), or raise ValueError naming the argument."""
    device = features.device
    check_matrix("features", features, (None, None), FLOAT_DTYPES, device)
    rows, dim = features.shape
    if weight.dim() != 3 or 0 in weight.shape or weight.shape[2] != dim:
        raise ValueError(f"{names[0]} must be (K, C, {dim}) float32; got {describe(weight)}")
    heads, classes, _ = weight.shape
    shapes = (weight.shape, (heads, classes))
    for name, value, shape in zip(names, (weight, bias), shapes, strict=True):
        if value is None:
            continue
        if value.shape != shape or value.dtype != torch.float32 or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {tuple(shape)} float32; got {describe(value)}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on {device} with features, got {value.device}")
    return rows, heads, classes, dim


def check_labels(labels: Tensor, loss: str, rows: int, classes: int, device: torch.device) -> None:
    """Raise ValueError unless ``labels`` go with ``loss`` and can be addressed."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    ids = loss == "cross_entropy" and labels.dim() == 1
    expected = (rows,) if ids else (rows, classes)
    if tuple(labels.shape) != expected or labels.is_complex():
        raise ValueError(f"labels must have shape {expected} for {loss}; got {describe(labels)}")
    if ids and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels of shape (n,) must be integers; got {describe(labels)}")
    if rows > 1 and labels.shape[-1] > 1 and labels.stride(-1) != 1:
        raise ValueError(
            f"labels must have unit stride along their last axis; got {labels.stride()}"
        )
    if labels.device != device:
        raise ValueError(f"labels must be on {device} with features, got {labels.device}")


def check_outputs(
    out: RowOutputs,
    status: Tensor,
    residual: Tensor | None,
    rows: int,
    heads: int,
    classes: int,
    device: torch.device,
) -> None:
    """Raise ValueError unless the outputs of a first pass can be written."""
    for name, value in list(out._asdict().items())[:4]:
        if value.shape != (heads, rows) or value.dtype != torch.float32:
            raise ValueError(f"out.{name} must be {(heads, rows)} float32; got {describe(value)}")
        if (rows > 1 and value.stride(1) != 1) or value.stride(0) != out.loss.stride(0):
            raise ValueError(
                f"out.{name} must have unit row stride and the head stride of out.loss; "
                f"got strides {value.stride()}"
            )
        if value.device != device:
            raise ValueError(f"out.{name} must be on {device} with features, got {value.device}")
    check_vector("out.feature_sqnorm", out.feature_sqnorm, rows, torch.float32, device)
    check_vector("out.counted", out.counted, rows, torch.bool, device)
    check_vector("status", status, STATUS_SLOTS, torch.int64, device)
    if residual is not None:
        dtypes = (torch.float32,)
        check_matrix("residual", residual, (rows, heads * classes), dtypes, device)
        if rows > 1 and residual.stride(0) < residual.shape[1]:
            raise ValueError(f"residual must have rows apart, got strides {residual.stride()}")
