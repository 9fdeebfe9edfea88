"""Which regime of the Triton backend a problem gets, and why: one table, read from the top.

A rule applies where the problem lies within its bounds, a regime runs where ``fits`` says so.
Every line says what its bounds come from: times on an H200 (docs/tuning-notes.md), or a work model
(bytes at the memory's rate, products at the tensor cores' rate), where nobody has timed them.

The capability decides what is tested (8, 9 and 10, see ``triton.py``) and how much shared memory
a tile may take; the dtype and the precision decide operands and tiles within a regime.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...core.problem import Problem
from .regime import Regime, operand_dtype
from .regimes.blas import BlasRegime
from .regimes.few_classes import FewClassesRegime
from .regimes.recompute import RecomputeRegime
from .regimes.row_tiles import RowTilesRegime
from .regimes.stored import StoredRegime

REGIME_VARIABLE = "MOSO_FAST_TRITON_REGIME"

REGIMES: dict[str, type[Regime]] = {
    regime.name: regime
    for regime in (RowTilesRegime, FewClassesRegime, RecomputeRegime, StoredRegime, BlasRegime)
}


@dataclass(frozen=True)
class Rule:
    """Take ``regime`` where the problem lies within the bounds (None: no bound)."""

    regime: str
    why: str
    max_width: int | None = None  # K * C
    max_dim: int | None = None  # D
    rounded: bool | None = None  # whether the products round their operands to bfloat16
    residuals_kept: bool | None = None  # whether they stay in memory between the passes


RULES: tuple[Rule, ...] = (
    Rule(
        "row_tiles",
        "measured kernel by kernel on an H200: logits, residuals and norms of 1.28 million rows of "
        "512 bfloat16 elements take 0.58 ms for 10 classes and 0.96 ms for 60, their read 0.31 ms",
        max_width=64,
        rounded=True,
    ),
    Rule(
        "few_classes",
        "modelled, not measured with several heads: it reads the features twice where others read "
        "them four times",
        max_width=128,
        rounded=True,
    ),
    Rule(
        "recompute",
        "modelled, not measured: no logits are written in the second pass, which counts for more "
        "than the rate of cuBLAS while D is small",
        max_dim=1024,
        residuals_kept=False,
    ),
    Rule(
        "stored",
        "measured kernel by kernel on an H200: with 100 classes norms, logits by cuBLAS and "
        "residuals take 1.4 ms in three kernels as in one, which spills registers from there on",
        max_width=256,
        rounded=True,
    ),
    Rule(
        "blas",
        "measured on an H200: the gradient sum of 1000 classes takes 1.9 ms by cuBLAS and 4.6 by a "
        "kernel of our own, and with float32 operands plain PyTorch takes little more for all than "
        "that kernel alone",
    ),
)


@dataclass(frozen=True)
class Choice:
    """A regime, and one line for it and for each that was passed over."""

    regime: type[Regime]
    reasons: tuple[str, ...]


def forced_regime(named: str | None = None) -> str | None:
    """Name asked for by argument or environment, or None; ValueError for an unknown one."""
    source, name = "regime", named
    if name is None:
        source, name = REGIME_VARIABLE, os.environ.get(REGIME_VARIABLE) or None
    if name is not None and name not in REGIMES:
        raise ValueError(f"{source} must be one of {', '.join(REGIMES)}; got {name!r}")
    return name


def forced_refusal(forced: str, problem: Problem) -> str | None:
    """Say why the regime that somebody asked for cannot run this problem, or None."""
    reason = REGIMES[forced].fits(problem)
    return None if reason is None else f"regime {forced!r} cannot run this problem: {reason}"


def choose_regime(
    problem: Problem, residuals_kept: bool, forced: str | None = None, rules: Sequence[Rule] = RULES
) -> Choice:
    """Return the first regime of the table that fits; ``forced`` names one instead.

    Raises
    ------
    ValueError
        The forced regime cannot run this problem.
    """
    if forced is not None:
        refusal = forced_refusal(forced, problem)
        if refusal is not None:
            raise ValueError(refusal)
        return Choice(REGIMES[forced], (f"{forced}: asked for",))
    reasons: list[str] = []
    for rule in rules:
        regime = REGIMES[rule.regime]
        reason = _outside(rule, problem, residuals_kept) or regime.fits(problem)
        if reason is None:
            return Choice(regime, (*reasons, f"{rule.regime}: chosen, {rule.why}"))
        reasons.append(f"{rule.regime}: not used, {reason}")
    raise RuntimeError("no regime can run this problem: " + "; ".join(reasons))


def _outside(rule: Rule, problem: Problem, residuals_kept: bool) -> str | None:
    """Say which bound of the rule the problem breaks, or None."""
    width = problem.heads * problem.classes
    if rule.max_width is not None and width > rule.max_width:
        return f"K C = {width} is above {rule.max_width}"
    if rule.max_dim is not None and problem.dim > rule.max_dim:
        return f"D = {problem.dim} is above {rule.max_dim}"
    rounded = operand_dtype(problem) == torch.bfloat16
    if rule.rounded is not None and rounded != rule.rounded:
        return "operands are rounded to bfloat16" if rounded else "operands are float32"
    if rule.residuals_kept is not None and residuals_kept != rule.residuals_kept:
        return "residuals are kept" if residuals_kept else "residuals are not kept"
    return None
