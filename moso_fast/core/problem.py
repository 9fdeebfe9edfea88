"""One checked scoring problem: tensors where and as the work wants them, and the options.

What shapes and dtypes show to be wrong is refused here (``checks.py``), what only the data show in
the first pass over them (``status.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_cu_seqlens,
    check_features,
    check_head,
    check_labels,
    check_rows_argument,
    check_tensor,
)
from .labels import fit_labels
from .logit_map import LogitMap
from .options import Options

# Rows of features that are looked through at a time.
_BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Problem(Options):
    """Features, heads and labels of one scoring job; build with :func:`build_problem`.

    All tensors are on one device, but for ``features``, which may lie in main memory while the
    heads are on a CUDA device: backends get them by :meth:`feature_rows`. ``weight`` is (K, C, D)
    and ``bias`` (K, C) in the compute dtype; ``features`` and ``labels`` are as given. A *row* is
    a line of ``features``; a *sample* is a row, or the rows of one sequence where ``cu_seqlens``
    (B + 1 offsets) is given. Of the options ``precision`` is settled, and ``per`` is part of the
    sample weights already.
    """

    features: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    cu_seqlens: Tensor | None
    precision: str
    stacked: bool = True  # whether the caller's weight was (K, C, D) rather than (C, D)
    upload: Callable[[slice], Tensor] | None = None  # set by streaming.py
    # From the heads' outputs to the logits that the loss is taken of; None = they are the same.
    logit_map: LogitMap | None = None

    def __post_init__(self) -> None:
        """Nothing: `build_problem` is handed options that were checked."""

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
    sample_weight: Any = None,
    cu_seqlens: Any = None,
    logit_map: LogitMap | None = None,
    options: Options | None = None,
    **more: Any,
) -> Problem:
    """Check the arguments of a scoring call and bring the heads to (K, C, D).

    With a ``logit_map`` m the loss is that of m(W h + b). ``options`` as one object, or each by its
    name.

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
    if options is None:
        options = Options(**more)
    check_features(features)
    check_head(features, weight, bias)
    classes = weight.shape[-2]
    devices = (features.device, weight.device)
    check_tensor("labels", labels)
    labels = fit_labels(labels, classes, options.loss)
    check_labels(features, labels, options.loss, classes, devices)
    check_rows_argument("sample_weight", sample_weight, features, devices)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, features, devices)
    dtype, device = compute_dtype(features), weight.device
    problem = Problem(
        features=_numbers(features),
        weight=_numbers(weight, dtype=dtype).reshape(-1, classes, weight.shape[-1]),
        labels=_numbers(labels, device),
        bias=None if bias is None else _numbers(bias, dtype=dtype).reshape(-1, classes),
        sample_weight=None if sample_weight is None else _numbers(sample_weight, device, dtype),
        cu_seqlens=None if cu_seqlens is None else _numbers(cu_seqlens, device, torch.int64),
        loss=options.loss,
        label_smoothing=float(options.label_smoothing),
        ignore_index=int(options.ignore_index),
        precision=options.precision or default_precision(features),
        nonfinite=options.nonfinite,
        stacked=weight.dim() == 3,
        logit_map=logit_map,
    )
    return problem if options.per == "sample" else _by_length(problem)


def _numbers(
    tensor: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor without its graph, where and as it is wanted; itself where it is so already.

    To ask first is quicker than operations that change nothing, and a small job notices.
    """
    if tensor.requires_grad or type(tensor) is not Tensor:
        tensor = tensor.detach()
    if device is not None and tensor.device != device:
        tensor = tensor.to(device)
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def _by_length(problem: Problem) -> Problem:
    """Return the problem with the mean over the tokens of a sequence in place of their sum.

    A mean is a sum whose rows weigh 1 / (number of counted tokens of their sequence); nothing
    changes where every row is a sample.
    """
    if problem.cu_seqlens is None:
        return problem
    # Offsets that do not fit are refused later by name: here they must only not lead outside.
    offsets, sequences = problem.cu_seqlens, max(1, problem.cu_seqlens.shape[0] - 1)
    places = torch.arange(problem.rows, device=offsets.device)
    owner = (torch.searchsorted(offsets, places, right=True) - 1).clamp(0, sequences - 1)
    used = problem.counted(slice(0, problem.rows))
    if problem.nonfinite == "exclude":
        # Which rows are left out is wanted before the first pass: a sweep of its own.
        finite = [block.isfinite().all(1) for block in problem.features.split(_BLOCK_ROWS)]
        used = used & torch.cat(finite).to(used.device)
    counted = used.to(problem.compute_dtype)
    counts = counted.new_zeros(sequences).index_add_(0, owner, counted)
    weights = 1.0 / counts.clamp_min(1)[owner]
    if problem.sample_weight is not None:
        weights *= problem.sample_weight
    return replace(problem, sample_weight=weights)
