"""What a backend is: two primitives over a range of rows, and what it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..core.engine import FirstPass, Plan, RowBuffers, Whole
    from ..core.problem import Problem


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, why (not), and how to get it (empty when available)."""

    available: bool
    reason: str
    how: str = ""


class Backend(ABC):
    """Computes row statistics, gradient sums and alignments; knows no formula and no file.

    A new backend is one file with a subclass, registered in ``backends/__init__.py``.
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
    def chunk_rows(self, problem: Problem) -> int:
        """Rows of a chunk when the caller names no ``chunk_size``."""

    def describe(self, problem: Problem) -> str:
        """One line on how this problem would run: regime, tiles, products."""
        return f"{self.name}: chunked closed form"

    def explain(self, problem: Problem, plan: Plan) -> list[str]:
        """Lines for ``explain``: how this problem would run under this plan, and why so."""
        return [self.describe(problem)]

    @abstractmethod
    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """Write the row statistics of ``rows`` to ``out``; return the sum of their gradients.

        Residuals of rows that do not count are zero and their statistics are free. The first
        offending row of each kind goes to ``out.status`` (see ``problem.py``); with such a row
        the other results are free, but no access may leave the arrays.
        """

    @abstractmethod
    def second_pass(
        self,
        problem: Problem,
        rows: slice,
        out: RowBuffers,
        mean_grad: Tensor,
        mean_bias_grad: Tensor | None,
        residual: Tensor | None,
        alignment: Tensor,
    ) -> None:
        """Write <g_i, G> of ``rows`` to ``alignment`` (K, n), zero where a row does not count.

        ``mean_grad`` is G (K, C, D) and ``mean_bias_grad`` its bias part (K, C) or None.
        ``residual`` is what the first pass returned for these rows, or None: compute it again.
        On a GPU this runs before anyone knows whether the first pass found an offending row: with
        one, or with parameters that are not finite, the results are free here too, but no access
        may leave the arrays.
        """

    def whole(
        self, problem: Problem, formula: str | None, scale: float, *, read: bool
    ) -> Whole | None:
        """Do all of a job whose rows are one chunk and each a sample, or None: pass by pass.

        Where the launches of the engine's own operations would take longer than the work.
        ``formula`` and ``scale``: also the scores. ``read``: the facts are to be there on return.
        """
        return None
