"""What a backend is: whether it can run a problem, and two passes that it prepares for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..core.passes import Passes, Plan
from ..core.problem import Problem


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, why (not), and how to get it (empty when available)."""

    available: bool
    reason: str
    how: str = ""


class Backend(ABC):
    """Computes row statistics, gradient sums and alignments; knows no formula and no file.

    A new backend is one file with a subclass and its :class:`moso_fast.core.passes.Passes`,
    registered in ``backends/__init__.py``.
    """

    name: str
    #: Whether it takes features by ``problem.feature_rows``, hence from main memory too.
    streams = False
    #: Whether it takes the loss of a map of the heads' outputs (``problem.logit_map``).
    maps = False

    @abstractmethod
    def availability(self) -> Availability:
        """Say whether this backend can run on this machine, whatever the problem."""

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """Why this problem cannot run here, or None when it can."""

    def not_by_default(self, problem: Problem) -> str | None:
        """Why ``backend="auto"`` passes this backend over although it could run, or None."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem, plan: Plan) -> Passes:
        """Decide how a problem that it supports is run; costs nothing and touches no data."""
