"""What only the data show to be wrong, and the errors that are made of it.

Labels in range and finite features are checked in the first pass over the features, which leaves a
status word: for every kind of fault the first offending row. Weights, biases and sample weights
are judged by their sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import DataError
from .losses import KNOWN, SOFT_LABEL_TOLERANCE
from .problem import Problem

# Slots of the status word: each holds the first offending row, or the number of rows.
STATUS_LABEL, STATUS_FEATURE, STATUS_LOGITS, STATUS_TARGET = range(4)
STATUS_SLOTS = 4


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
        dtype = str(problem.compute_dtype).removeprefix("torch.")
        raise DataError(
            f"logits, loss or gradient of row {{row}} overflow {dtype} "
            "although features and weights are finite; scale them down or pass float64 features",
            row=first[STATUS_LOGITS],
        )


def _target_error(problem: Problem, row: int) -> DataError:
    target = problem.labels[row].double()
    loss = KNOWN[problem.loss]
    outside = loss.wrong(target).nonzero()
    if outside.numel() and (loss.least, loss.most) == (-math.inf, math.inf):
        return DataError("labels[{row}] holds a non-finite target", row=row)
    if outside.numel():
        column = int(outside[0])
        return DataError(
            "labels[{row}] holds {value} at class {column}; "
            f"targets must lie in [{loss.least:g}, {loss.most:g}]",
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
