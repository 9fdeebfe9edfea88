"""Everything that is timed, by family: ours, plain PyTorch, per-sample gradients, libraries."""

from __future__ import annotations

from ..cases import Case
from . import autograd, network, ours, plain, sequences
from .base import FAMILIES, TOLERANCES, Job, Provider
from .bergson import PROVIDERS as BERGSON
from .captum import PROVIDERS as CAPTUM
from .libraries import PROVIDERS as LIBRARIES

__all__ = ["FAMILIES", "PROVIDERS", "TOLERANCES", "Job", "Provider", "providers_for"]

PROVIDERS: tuple[Provider, ...] = (
    *ours.PROVIDERS,
    *plain.PROVIDERS,
    *sequences.PROVIDERS,
    *autograd.PROVIDERS,
    *network.PROVIDERS,
    *CAPTUM,
    *LIBRARIES,
    *BERGSON,
)


def providers_for(case: Case, peers: bool = False) -> list[Provider]:
    """Return the providers of a case; ``peers`` adds the other libraries."""
    return [p for p in PROVIDERS if p.takes(case) and (peers or p.family != "peer")]
