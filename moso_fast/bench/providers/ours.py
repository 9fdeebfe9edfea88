"""The providers of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import last_layer_stats
from ..cases import Case
from ..inputs import Inputs
from .base import Job, Provider

__all__ = ["NAMES", "OURS", "PROVIDERS"]

OURS = "moso_fast"
NAMES = ("loss", "alignment", "grad_sqnorm")
_LINEAR = frozenset({"head", "heads", "sequences"})


def _on(backend: str) -> Any:
    def prepare(case: Case, inputs: Inputs) -> Job:
        def run() -> dict[str, Tensor]:
            stats = last_layer_stats(*inputs.head, cu_seqlens=inputs.cu_seqlens, backend=backend)
            return {name: getattr(stats, name) for name in NAMES}

        return run

    return prepare


PROVIDERS = (
    Provider(OURS, "ours", _LINEAR, _on("auto")),
    Provider(f"{OURS}, torch backend", "ours", _LINEAR, _on("torch")),
)
