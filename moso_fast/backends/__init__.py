"""The backends by name, whether each can run, and which one a problem gets and why."""

from __future__ import annotations

import os

from ..core.problem import Problem
from .base import Availability, Backend
from .cpu import CpuBackend
from .cuda.backend import CudaBackend
from .torch import TorchBackend
from .triton.backend import TritonBackend

__all__ = ["Availability", "Backend", "backends", "choose", "get"]

ENVIRONMENT_VARIABLE = "MOSO_FAST_BACKEND"

_REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuBackend(), TritonBackend(), CudaBackend(), TorchBackend())
}
# What "auto" tries, in order, on each kind of device; "torch" is always there and comes last.
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


def backends() -> dict[str, Availability]:
    """Every backend by name, with whether it can run here, why (not) and how to get it."""
    return {name: backend.availability() for name, backend in _REGISTRY.items()}


def get(name: str) -> Backend:
    """Return the backend of that name; ValueError names the known ones, or says what is missing."""
    if name not in _REGISTRY:
        known = ", ".join(["auto", *_REGISTRY])
        raise ValueError(f"backend must be one of {known}; got {name!r}")
    return _REGISTRY[name]


def choose(problem: Problem, requested: str = "auto") -> tuple[Backend, list[str]]:
    """Return the backend for ``problem`` and the reasons, one line each.

    A backend asked for by name (argument or ``MOSO_FAST_BACKEND``) is used or refused, never
    replaced.

    Raises
    ------
    ValueError
        Unknown name, or a backend asked for by name that cannot run this problem.
    """
    source = f"backend={requested!r}"
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = f"{ENVIRONMENT_VARIABLE}={requested}"
    if requested != "auto":
        backend = get(requested)
        reason = _refusal(backend, backend.availability(), problem)
        if reason is not None:
            raise ValueError(f"{source} cannot run this problem: {reason}")
        return backend, [f"{requested}: asked for by {source}"]
    reasons: list[str] = []
    for name in _PREFERENCE.get(problem.device.type, ("torch",)):
        backend = get(name)
        availability = backend.availability()
        reason = _refusal(backend, availability, problem) or backend.not_by_default(problem)
        if reason is None:
            return backend, [*reasons, f"{name}: chosen, {availability.reason}"]
        reasons.append(f"{name}: not used, {reason}")
    raise RuntimeError("no backend can run this problem: " + "; ".join(reasons))


def _refusal(backend: Backend, availability: Availability, problem: Problem) -> str | None:
    """Why ``backend`` cannot run ``problem``, or None."""
    if not availability.available:
        return availability.reason
    if problem.streamed and not backend.streams:
        return f"features lie in main memory, and it streams none to {problem.device}"
    if problem.logit_map is not None and not backend.maps:
        return f"the logits are {problem.logit_map.describe()} of the head's output z"
    return backend.supports(problem)
