"""One validated scoring problem: every check that shapes and dtypes allow, and every message.

Checks that need the data (labels in range, finite features) ride in the first pass over the
features as a status word; :func:`raise_for_status` turns it into the error a user reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .labels import fit_labels
from .logit_map import LogitMap
from .losses import LOSSES, SOFT_LABEL_TOLERANCE

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PRECISIONS = ("highest", "high", "medium")
NONFINITE = ("raise", "exclude")

# Slots of the status word: each holds the first offending row, or the number of rows.
STATUS_LABEL, STATUS_FEATURE, STATUS_LOGITS, STATUS_TARGET = range(4)
STATUS_SLOTS = 4


@dataclass(frozen=True)
class Problem:
    """Features, heads and labels of one scoring job; build with :func:`build_problem`.

    All tensors are on one device, but for ``features``, which may lie in main memory while the
    heads are on a CUDA device: backends get them by :meth:`feature_rows`. ``weight`` is (K, C, D)
    and ``bias`` (K, C) in the compute dtype; ``features`` and ``labels`` are as given. A *row* is
    a line of ``features``; a *sample* is a row, or the rows of one sequence where ``cu_seqlens``
    (B + 1 offsets) is given.
    """

    features: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    cu_seqlens: Tensor | None
    loss: str
    label_smoothing: float
    ignore_index: int
    precision: str
    nonfinite: str
    stacked: bool
    upload: Callable[[slice], Tensor] | None = None  # set by streaming.py
    # From the heads' outputs to the logits that the loss is taken of; None = they are the same.
    logit_map: LogitMap | None = None

    @property
    def rows(self) -> int:
        """Lines of ``features``."""
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        """D, the width of a feature row."""
        return self.features.shape[1]

    @property
    def heads(self) -> int:
        """K, heads over the same features."""
        return self.weight.shape[0]

    @property
    def classes(self) -> int:
        """C, classes of every head."""
        return self.weight.shape[1]

    @property
    def samples(self) -> int:
        """Samples: rows, or sequences."""
        return self.rows if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def soft_labels(self) -> bool:
        """Whether labels are (N, C) targets rather than class ids."""
        return self.labels.dim() == 2

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 features, else float32."""
        return compute_dtype(self.features)

    @property
    def device(self) -> torch.device:
        """Where the heads lie and the work is done."""
        return self.weight.device

    @property
    def asynchronous(self) -> bool:
        """Whether operations return before their results are there, so that reading one waits."""
        return self.device.type != "cpu"

    @property
    def streamed(self) -> bool:
        """Whether the features lie in main memory and the work is done elsewhere."""
        return self.features.device != self.device

    def feature_rows(self, rows: slice) -> Tensor:
        """Features of a chunk of the job, on :attr:`device`."""
        if self.upload is not None:
            return self.upload(rows)
        return self.features[rows].to(self.device)

    def counted(self, rows: slice) -> Tensor:
        """Mask of the rows that are not ignored by their label."""
        if self.soft_labels:
            return torch.ones(
                len(range(self.rows)[rows]), dtype=torch.bool, device=self.labels.device
            )
        # Compared as int64: in uint8 the default ignore_index -100 would wrap round to label 156.
        return self.labels[rows].long() != self.ignore_index


def compute_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of accumulators and results for these features."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def default_precision(features: Tensor) -> str:
    """``"highest"`` for float32 and float64 features, ``"medium"`` for 16-bit ones."""
    return "highest" if features.dtype in (torch.float32, torch.float64) else "medium"


def build_problem(
    features: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Any = None,
    cu_seqlens: Any = None,
    precision: str | None = None,
    nonfinite: str = "raise",
    logit_map: LogitMap | None = None,
) -> Problem:
    """Check the arguments of a scoring call and bring the heads to (K, C, D).

    With a ``logit_map`` m the loss is that of m(W h + b).

    Raises
    ------
    TypeError
        An argument of the wrong type or dtype.
    ValueError
        Wrong rank, shapes that disagree, devices that differ, unknown option.

    Notes
    -----
    Everything is on one device, or the heads are on a CUDA device and the features in main
    memory; then labels, sample weights and offsets may be on either and go to that of the heads.
    """
    _check_options(loss, label_smoothing, ignore_index, precision, nonfinite)
    _check_features(features)
    _check_head(features, weight, bias)
    classes = weight.shape[-2]
    devices = (features.device, weight.device)
    _check_tensor("labels", labels)
    labels = fit_labels(labels, classes, loss)
    _check_labels(features, labels, loss, classes, devices)
    _check_rows_argument("sample_weight", sample_weight, features, devices)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, features, devices)
    dtype, device = compute_dtype(features), weight.device
    stacked = weight.dim() == 3
    return Problem(
        features=features.detach(),
        weight=weight.detach().to(dtype).reshape(-1, classes, weight.shape[-1]),
        labels=labels.detach().to(device),
        bias=None if bias is None else bias.detach().to(dtype).reshape(-1, classes),
        sample_weight=None if sample_weight is None else sample_weight.detach().to(device, dtype),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.detach().to(device, torch.int64),
        loss=loss,
        label_smoothing=float(label_smoothing),
        ignore_index=int(ignore_index),
        precision=precision or default_precision(features),
        nonfinite=nonfinite,
        stacked=stacked,
        logit_map=logit_map,
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_options(
    loss: str, label_smoothing: float, ignore_index: int, precision: str | None, nonfinite: str
) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    if label_smoothing and loss != "cross_entropy":
        raise ValueError(f"label_smoothing goes with loss='cross_entropy', not with {loss!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, got {ignore_index}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"precision must be None or one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}; got {nonfinite!r}")


def _check_tensor(name: str, value: Any, hint: str = "") -> None:
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        if kind == "numpy.ndarray":
            hint = "; torch.from_numpy makes one without a copy"
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}{hint}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def _check_features(features: Any) -> None:
    _check_tensor("features", features)
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


def _check_head(features: Tensor, weight: Any, bias: Any) -> None:
    _check_tensor("weight", weight)
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
    _check_tensor("bias", bias)
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"bias must have shape {tuple(weight.shape[:-1])} to go with weight {_shape(weight)}, "
            f"got {_shape(bias)}"
        )
    if bias.dtype not in FEATURE_DTYPES:
        raise TypeError(f"bias must be floating point, got {_name(bias.dtype)}")
    of = "features" if weight.device == features.device else "weight"
    _check_head_device("bias", bias, weight.device, of)


def _check_labels(
    features: Tensor,
    labels: Any,
    loss: str,
    classes: int,
    devices: tuple[torch.device, torch.device],
) -> None:
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


def _check_rows_argument(
    name: str, value: Any, features: Tensor, devices: tuple[torch.device, torch.device]
) -> None:
    if value is None:
        return
    _check_tensor(name, value)
    if value.shape != features.shape[:1]:
        raise ValueError(f"{name} must have shape ({features.shape[0]},), got {_shape(value)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {_name(value.dtype)}")
    _check_device(name, value, devices)


def _check_cu_seqlens(
    cu_seqlens: Any, features: Tensor, devices: tuple[torch.device, torch.device]
) -> None:
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {_shape(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {_name(cu_seqlens.dtype)}")
    _check_device("cu_seqlens", cu_seqlens, devices)


def sequence_offsets(problem: Problem) -> Tensor:
    """``cu_seqlens`` on the CPU, checked: starts at 0, never decreases, ends at the row count."""
    assert problem.cu_seqlens is not None
    offsets = problem.cu_seqlens.cpu()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(offsets[0])}")
    if offsets[-1] != problem.rows:
        raise ValueError(
            f"cu_seqlens must end at the number of rows, {problem.rows}; got {int(offsets[-1])}"
        )
    down = (offsets.diff() < 0).nonzero()
    if down.numel():
        at = int(down[0]) + 1
        raise ValueError(
            f"cu_seqlens must not decrease, but entry {at} is {int(offsets[at])} "
            f"after {int(offsets[at - 1])}"
        )
    return offsets


def parameter_sums(problem: Problem) -> list[Tensor]:
    """Return the sums of weight, bias and sample_weight, of those that there are, each a number.

    Not finite where an entry is not. A sum reads once and writes one number; isfinite would make
    three tensors of that size. In the compute dtype, on the device of the job.
    """
    return [value.sum() for _, value in _parameters(problem)]


def check_parameters(problem: Problem, sums: Sequence[float]) -> None:
    """Raise ValueError at the first non-finite entry of weight, bias or sample_weight.

    ``sums``: what :func:`parameter_sums` holds.
    """
    for (name, value), total in zip(_parameters(problem), sums, strict=True):
        if math.isfinite(total):
            continue
        found = (~torch.isfinite(value)).nonzero()
        if not found.numel():  # the sum alone is beyond the largest number
            continue
        at = found[0].tolist()
        entry = float(value[tuple(at)])
        text = "; heads and weights must be finite"
        if name == "sample_weight":
            raise DataError(f"{name}[{{row}}] is {{value}}{text}", row=at[0], value=entry)
        raise ValueError(f"{name}{at if problem.stacked else at[1:]} is {entry}{text}")


def _parameters(problem: Problem) -> list[tuple[str, Tensor]]:
    """Weight, bias and sample weights by name, those that there are and that hold numbers."""
    given = [("weight", problem.weight)]
    if problem.bias is not None:
        given.append(("bias", problem.bias))
    if problem.sample_weight is not None and problem.rows:
        given.append(("sample_weight", problem.sample_weight))
    return given


def raise_for_status(problem: Problem, status: Sequence[float]) -> None:
    """Turn the status word of the first pass into one clear DataError, or return."""
    first = [int(row) for row in status]
    if first[STATUS_LABEL] < problem.rows:
        row = first[STATUS_LABEL]
        raise DataError(
            f"labels[{{row}}] is {{value}}, outside [0, {problem.classes}) "
            f"and not ignore_index ({problem.ignore_index})",
            row=row,
            value=int(problem.labels[row]),
        )
    if first[STATUS_FEATURE] < problem.rows:
        row = first[STATUS_FEATURE]
        values = problem.features[row]
        column = int((~torch.isfinite(values)).nonzero()[0])
        raise DataError(
            "features[{row}, {column}] is {value}; row {row} is the first with a non-finite value "
            "(nonfinite='exclude' scores the others)",
            row=row,
            column=column,
            value=float(values[column]),
        )
    if first[STATUS_TARGET] < problem.rows:
        raise _target_error(problem, first[STATUS_TARGET])
    if first[STATUS_LOGITS] < problem.rows:
        raise DataError(
            f"logits, loss or gradient of row {{row}} overflow {_name(problem.compute_dtype)} "
            "although features and weights are finite; scale them down or pass float64 features",
            row=first[STATUS_LOGITS],
        )


def _target_error(problem: Problem, row: int) -> DataError:
    target = problem.labels[row].double()
    if problem.loss == "mse":
        return DataError("labels[{row}] holds a non-finite target", row=row)
    outside = ((target >= 0) & (target <= 1)).logical_not().nonzero()
    if outside.numel():
        column = int(outside[0])
        return DataError(
            "labels[{row}] holds {value} at class {column}; targets must lie in [0, 1]",
            row=row,
            column=column,
            value=float(target[column]),
        )
    total = math.fsum(target.tolist())
    return DataError(
        "labels[{row}] sums to {value:g}; label probabilities must sum to 1 "
        f"(+- {SOFT_LABEL_TOLERANCE:g})",
        row=row,
        value=total,
    )
