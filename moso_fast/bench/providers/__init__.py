"""Everything that is timed, by family: ours, plain PyTorch, per-sample gradients."""

from __future__ import annotations

import importlib

from ..cases import Case
from . import autograd, network, ours, plain, sequences
from .base import FAMILIES, TOLERANCES, Job, Provider

__all__ = ["FAMILIES", "PROVIDERS", "TOLERANCES", "Job", "Provider", "providers_for", "registered"]

PROVIDERS: tuple[Provider, ...] = (
    *ours.PROVIDERS,
    *plain.PROVIDERS,
    *sequences.PROVIDERS,
    *autograd.PROVIDERS,
    *network.PROVIDERS,
)


def registered(registry: str = __name__) -> tuple[Provider, ...]:
    """Return ``PROVIDERS`` of the module of this name: this one, or one that adds to it.

    By name, because a process that measures memory cannot be sent a provider: it imports the
    module and looks the provider up there.
    """
    found: tuple[Provider, ...] = importlib.import_module(registry).PROVIDERS
    return found


def providers_for(case: Case, registry: str = __name__) -> list[Provider]:
    """Return the providers of a case among those that are :func:`registered`."""
    return [p for p in registered(registry) if p.takes(case)]
