"""The options of a scoring call: listed once, checked once, passed whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .losses import LOSSES

PRECISIONS = ("highest", "high", "medium")
NONFINITE = ("raise", "exclude")
PER = ("sample", "token")  # sums over the tokens of a sequence, or means


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a scoring call is told beside its tensors; :func:`moso_fast.moso_scores` says what of.

    Raises
    ------
    TypeError, ValueError
        A value that is none of those allowed.
    """

    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    precision: str | None = None
    nonfinite: str = "raise"
    per: str = "sample"

    def __post_init__(self) -> None:
        smoothing, ignored = self.label_smoothing, self.ignore_index
        _one_of("loss", self.loss, LOSSES)
        if not isinstance(smoothing, (int, float)) or not 0.0 <= smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing!r}")
        if smoothing and self.loss != "cross_entropy":
            raise ValueError(
                f"label_smoothing goes with loss='cross_entropy', not with {self.loss!r}"
            )
        if isinstance(ignored, bool) or not isinstance(ignored, int):
            raise TypeError(f"ignore_index must be an int, got {ignored!r}")
        if not -(2**63) <= ignored < 2**63:
            raise ValueError(f"ignore_index must fit 64 bits, got {ignored}")
        if self.precision is not None and self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be None or one of {known}; got {self.precision!r}")
        _one_of("nonfinite", self.nonfinite, NONFINITE)
        _one_of("per", self.per, PER)

    @staticmethod
    def among(arguments: Mapping[str, Any]) -> Options:
        """Pick the options out of the arguments of a call, which may hold others."""
        return Options(**{name: arguments[name] for name in OPTION_NAMES if name in arguments})


OPTION_NAMES = tuple(field.name for field in fields(Options))


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
