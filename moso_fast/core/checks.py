"""What shapes, dtypes and devices show to be wrong with the arguments of a scoring call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: Any, hint: str = "") -> None:
    """Raise TypeError unless ``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        if kind == "numpy.ndarray":
            hint = "; torch.from_numpy makes one without a copy"
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}{hint}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_features(features: Any) -> None:
    """Raise unless features are (N, D), D > 0, of a known dtype."""
    check_tensor("features", features)
    if features.dim() != 2:
        raise ValueError(f"features must have shape (N, D), got {_shape(features)}")
    if features.shape[1] == 0:
        raise ValueError(f"features must have at least one column, got {_shape(features)}")
    if features.dtype not in FEATURE_DTYPES:
        known = ", ".join(_name(d) for d in FEATURE_DTYPES)
        raise TypeError(f"features must be one of {known}; got {_name(features.dtype)}")


def _check_device(name: str, value: Tensor, devices: tuple[torch.device, torch.device]) -> None:
    """Raise unless ``value`` is on the device of the features or of the heads."""
    if value.device in devices:
        return
    where = f"the device of features ({devices[0]})"
    if devices[1] != devices[0]:
        where += f" or of weight ({devices[1]})"
    raise ValueError(f"{name} must be on {where}, got {value.device}")


def _check_head_device(name: str, value: Tensor, expected: torch.device, of: str) -> None:
    if value.device != expected:
        raise ValueError(f"{name} must be on the device of {of} ({expected}), got {value.device}")


def check_head(features: Tensor, weight: Any, bias: Any) -> None:
    """Raise unless weight and bias go with each other and with the features."""
    check_tensor("weight", weight)
    dim = features.shape[1]
    if weight.dim() not in (2, 3) or 0 in weight.shape[:-1]:
        raise ValueError(
            "weight must have shape (C, D) or (K, C, D) with C and K at least 1, "
            f"got {_shape(weight)}"
        )
    if weight.shape[-1] != dim:
        raise ValueError(
            f"weight {_shape(weight)} and features {_shape(features)} disagree in D: "
            f"{weight.shape[-1]} against {dim}"
        )
    if weight.dtype not in FEATURE_DTYPES:
        raise TypeError(f"weight must be floating point, got {_name(weight.dtype)}")
    # Features may stay in main memory: they are streamed to the heads.
    if not (features.device.type == "cpu" and weight.device.type == "cuda"):
        _check_head_device("weight", weight, features.device, "features")
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"bias must have shape {tuple(weight.shape[:-1])} to go with weight {_shape(weight)}, "
            f"got {_shape(bias)}"
        )
    if bias.dtype not in FEATURE_DTYPES:
        raise TypeError(f"bias must be floating point, got {_name(bias.dtype)}")
    of = "features" if weight.device == features.device else "weight"
    _check_head_device("bias", bias, weight.device, of)


def check_labels(
    features: Tensor,
    labels: Any,
    loss: str,
    classes: int,
    devices: tuple[torch.device, torch.device],
) -> None:
    """Raise unless labels are ids or targets as ``loss`` wants them, one a row."""
    rows = features.shape[0]
    if loss == "cross_entropy" and labels.dim() == 1:
        expected: tuple[int, ...] = (rows,)
    else:
        expected = (rows, classes)
    if tuple(labels.shape) != expected:
        what = f"{(rows,)} class ids or {(rows, classes)} probabilities"
        if loss != "cross_entropy":
            what = f"{expected} targets for loss={loss!r}"
        raise ValueError(
            f"labels must have shape {what} to go with features {_shape(features)}, "
            f"got {_shape(labels)}"
        )
    if labels.dim() == 2 and not (labels.dtype in FEATURE_DTYPES or loss != "cross_entropy"):
        raise TypeError(f"labels of shape (N, C) must be floating point, got {_name(labels.dtype)}")
    if labels.is_complex():
        raise TypeError(f"labels must be real, got {_name(labels.dtype)}")
    _check_device("labels", labels, devices)


def check_rows_argument(
    name: str, value: Any, features: Tensor, devices: tuple[torch.device, torch.device]
) -> None:
    """Raise unless ``value`` is None or holds a real number for every row."""
    if value is None:
        return
    check_tensor(name, value)
    if value.shape != features.shape[:1]:
        raise ValueError(f"{name} must have shape ({features.shape[0]},), got {_shape(value)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {_name(value.dtype)}")
    _check_device(name, value, devices)


def check_cu_seqlens(
    cu_seqlens: Any, features: Tensor, devices: tuple[torch.device, torch.device]
) -> None:
    """Raise unless offsets are (B + 1,) integers; their values are looked at later."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {_shape(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {_name(cu_seqlens.dtype)}")
    _check_device("cu_seqlens", cu_seqlens, devices)
