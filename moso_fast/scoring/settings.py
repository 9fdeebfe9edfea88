"""What a scoring run is told: by the scorer's constructor, and by one call of it.

Both are checked once, here, and passed whole to whoever does the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backends
from ..core.formulas import check_formula
from ..core.losses import LOSSES
from ..core.memory import check_chunk_size
from ..core.options import Options
from ..full.loss import check_loss
from ..full.scope import Scope, choose_parameters
from ..sources.data.arguments import Arguments
from ..sources.find_head import find_head
from ..tables.table import ScoreTable
from ..util.array_like import as_tensor
from .combine import check_combine
from .row_weights import check_class_weight, check_sample_weight

GRADIENTS = ("last_layer", "full")
FEATURE_CACHES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
    """Arguments of `MoSoScorer` that do not depend on the model, checked; it says what they mean.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type or value, or one that goes with the other gradient.
    """

    gradient: str = "last_layer"
    scope: Scope = None
    views: int = 1
    autocast: torch.dtype | None = None
    loss: Any = "cross_entropy"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_weight: Any = None  # (C,) float64 on the CPU once it is checked
    device: Any = None  # torch.device or None once it is checked
    dtype: torch.dtype | None = None
    precision: str | None = None
    backend: str = "auto"
    feature_cache: str = "auto"
    shift_labels: str | bool = "auto"
    per: str = "token"
    batch_size: int = 256
    columns: Sequence[str] | None = None
    chunk_size: int | None = None
    nonfinite: str = "raise"
    progress: bool = True
    #: Those of the scoring of rows; where the loss is a callable, the others.
    options: Options = field(init=False)

    def __post_init__(self) -> None:
        _one_of("gradient", self.gradient, GRADIENTS)
        if self.gradient == "last_layer" and callable(self.loss):
            raise ValueError(
                f"loss must be the name of a loss for gradient='last_layer' ({', '.join(LOSSES)}), "
                f"got {type(self.loss).__name__} (a callable)"
            )
        _one_of("feature_cache", self.feature_cache, FEATURE_CACHES)
        _one_of("backend", self.backend, ("auto", *backends()))
        shift, dtype = self.shift_labels, self.dtype
        if shift != "auto" and not isinstance(shift, bool):
            raise ValueError(f"shift_labels must be 'auto', True or False, got {shift!r}")
        _positive("batch_size", self.batch_size)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        _positive("views", self.views)
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be None, bfloat16 or float16, got {self.autocast!r}")
        self._check_gradient()
        if self.gradient == "full":
            check_loss(self.loss)
        device = None if self.device is None else torch.device(self.device)
        object.__setattr__(self, "device", device)
        check_chunk_size(self.chunk_size)
        loss = "cross_entropy" if callable(self.loss) else self.loss
        object.__setattr__(self, "options", Options.among({**vars(self), "loss": loss}))
        weight = check_class_weight(self.class_weight, self.loss, self.label_smoothing)
        object.__setattr__(self, "class_weight", weight)

    def _check_gradient(self) -> None:
        """Raise ValueError for an argument that was given and belongs to the other gradient."""
        full = {
            "scope": self.scope is not None,
            "views": self.views > 1,
            "autocast": self.autocast is not None,
        }
        last_layer = {
            "precision": self.precision is not None,
            "backend": self.backend != "auto",
            "feature_cache": self.feature_cache != "auto",
            "class_weight": self.class_weight is not None,
        }
        given, other = (last_layer, "last_layer") if self.gradient == "full" else (full, "full")
        for name, is_given in given.items():
            if is_given:
                raise _of_the_other(name, other, self.gradient)


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """The network of a run, and its last layer where the gradient is that of the last layer."""

    network: nn.Module
    head_name: str = ""
    head: nn.Module | None = None

    @staticmethod
    def of(network: nn.Module, head: str | nn.Module | None, settings: Settings) -> ScoredModel:
        """Find what is scored of ``network``; ``head`` is a name, a module or None.

        Raises
        ------
        TypeError, ValueError
            A head that cannot be found, or that was given for whole-network gradients; no
            parameter in scope; columns that are no names.
        """
        if settings.gradient == "full":
            if head is not None:
                raise _of_the_other("head", "last_layer", "full")
            choose_parameters(network, settings.scope)
            found = ScoredModel(network)
        else:
            found = ScoredModel(network, *find_head(network, head))
        Arguments(network, settings.columns)
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """Arguments of `MoSoScorer.score`, checked as far as they show it without the data."""

    data: Any
    checkpoints: Any = None
    formula: str = "moso"
    combine: str = "mean"
    num_steps: int | None = None
    partition: Any = None
    seed: int = 0
    resume: str | os.PathLike[str] | None = None
    index: Tensor | None = None  # (N,) int64, the call's own
    sample_weight: Tensor | None = None  # (N,) float64 on the CPU

    def checked(self, gradient: str) -> Call:
        """Return this call with tensors of its own, for a run with ``gradient``.

        Raises
        ------
        TypeError, ValueError
            An unknown formula or combination, an index or sample weights that cannot be those of
            any data, sample weights with whole-network gradients.
        """
        check_formula(self.formula)
        check_combine(self.combine, self.num_steps)
        index = _check_index(self.index)
        return replace(
            self, index=index, sample_weight=check_sample_weight(self.sample_weight, gradient)
        )


def _check_index(index: Any) -> Tensor | None:
    if index is None:
        return None
    # A copy: the table may be written to, and the caller's array must stay as it is.
    index = as_tensor("index", index).clone()
    if index.dim() != 1:
        raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}")
    # With the checks of the table, before any work.
    return ScoreTable(torch.zeros(len(index), device="cpu"), index=index).index


def _of_the_other(name: str, other: str, gradient: str) -> ValueError:
    return ValueError(f"{name} goes with gradient={other!r}, not with {gradient!r}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
