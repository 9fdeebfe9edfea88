"""What engine and backends agree on: a plan, two passes over rows, and what they leave behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .problem import Problem


@dataclass(frozen=True)
class Plan:
    """How much of a problem may be kept in memory, decided before a backend prepares for it."""

    chunk_size: int | None  # rows of a chunk where the caller fixed them
    keep_residual: bool  # whether residuals stay between the passes
    residual_bytes: int  # of all residuals together
    budget_bytes: int  # of residuals that may stay; 0 where the caller fixed the chunk
    resident_bytes: int = 0  # of features from main memory that may stay on the device


@dataclass
class RowBuffers:
    """What the first pass writes for every row; (K, rows) unless said otherwise."""

    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    feature_sqnorm: Tensor  # (rows,)
    counted: Tensor  # (rows,) bool
    status: Tensor  # (STATUS_SLOTS,) int64, see status.py
    count: Tensor | None = None  # () int64, samples that count: known from the second pass on

    def number_counted(self) -> Tensor:
        """Rows that count, () int64 on the device; of single rows, not of sequences."""
        return self.counted.sum() if self.count is None else self.count


@dataclass
class FirstPass:
    """Sums over the rows of one chunk, and their residuals (n, K, C) if asked for."""

    grad_sum: Tensor  # (K, C, D), the engine's own from here on
    bias_grad_sum: Tensor  # (K, C)
    residual: Tensor | None


@dataclass
class Results:
    """Per-sample results, (K, samples); NaN where a sample does not count."""

    alignment: Tensor
    grad_sqnorm: Tensor
    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    mean_grad_sqnorm: Tensor  # (K,) float64
    count: Tensor  # () int64
    score: Tensor | None = None  # (K, samples), from backends that do that as well


@dataclass(frozen=True)
class Whole:
    """All that a backend which does a job in one go leaves behind."""

    results: Results  # NaN where a sample does not count
    counted: Tensor  # (samples,) bool
    facts: Tensor  # float64: what :meth:`moso_fast.core.verdict.Verdict.whole` reads


class Passes(ABC):
    """One job as a backend has prepared it: every choice is made, :meth:`first` and on only run.

    Operands that need a copy are made when a pass first asks for them, and once: an instance may
    also be asked to explain itself without running.

    Parameters
    ----------
    problem, plan
        The job, and what may be kept in memory.
    """

    #: Rows of a chunk where the caller has not fixed them.
    chunk_rows: int

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan

    @property
    def returns_residual(self) -> bool:
        """Whether the first pass is asked for residuals: norms of sequences need them at once."""
        return self.plan.keep_residual or self.problem.cu_seqlens is not None

    @abstractmethod
    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """Write the row statistics of ``rows`` to ``out``; return the sum of their gradients.

        Residuals of rows that do not count are zero and their statistics are free. The first
        offending row of each kind goes to ``out.status`` (see ``status.py``); with such a row the
        other results are free, but no access may leave the arrays.
        """

    def begin_second(self, mean_grad: Tensor, mean_bias_grad: Tensor | None) -> None:
        """Take G (K, C, D) and its bias part (K, C) or None, which the second pass is about."""
        self.mean_grad, self.mean_bias_grad = mean_grad, mean_bias_grad

    @abstractmethod
    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """Write <g_i, G> of ``rows`` to ``alignment`` (K, n), zero where a row does not count.

        ``residual`` is what the first pass returned for these rows, or None: compute it again.
        On a GPU this runs before anyone knows whether the first pass found an offending row: with
        one, or with parameters that are not finite, the results are free here too, but no access
        may leave the arrays.
        """

    def whole(self, formula: str | None, scale: float, *, read: bool) -> Whole | None:
        """Do all of a job whose rows are one chunk and each a sample, or None: pass by pass.

        Where the launches of the engine's own operations would take longer than the work.
        ``formula`` and ``scale``: also the scores. ``read``: the facts are to be there on return.
        """
        return None

    @abstractmethod
    def describe(self) -> str:
        """One line on how this job runs: regime, tiles, products."""

    def explain(self, chunk_rows: int) -> list[str]:
        """Lines for ``explain``: how this job runs in chunks of so many rows, and why so."""
        return [self.describe()]
