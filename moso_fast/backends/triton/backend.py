"""Triton on NVIDIA GPUs: finds out whether it can run, and hands each problem to a regime.

A regime (``regimes/``) is one way through the two passes: which kernels, which products by
cuBLAS, what is stored between. ``choice.py`` holds the table that decides;
``MOSO_FAST_TRITON_REGIME`` forces one, ``MOSO_FAST_AUTOTUNE=1`` searches the tiles. The kernels
are proven in Triton's interpreter and compiled ahead of time for compute capability 8, 9 and 10,
and most have run on an H200.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from ...core import engine
from ...core.problem import Problem
from ..base import Availability, Backend
from .choice import Choice, choose_regime, forced_regime
from .regimes.regime import PROVEN_MAJORS, Regime, interpreted, operand_dtype

__all__ = ["TritonBackend", "operand_dtype"]

_MINIMUM = (3, 6)
_INSTALL = 'pip install "triton>=3.6"'
# A number of the mean gradient, as the engine keeps it: float64, and float32 for the second pass.
_GRADIENT_BYTES = 12
# Where a job leaves the regime of its first pass for its second, in RowBuffers.scratch.
_REGIME = "regime"


class TritonBackend(Backend):
    """Fused kernels in several regimes; every loss, any number of heads and classes.

    ``regime`` names one of ``choice.REGIMES`` to use whatever the table says, as the
    environment variable does; the tests run each one so.
    """

    name = "triton"
    streams = True

    def __init__(self, regime: str | None = None) -> None:
        self._named = regime

    def availability(self) -> Availability:
        """Whether Triton is there, new enough, and has a device; imports nothing."""
        if not _installed():
            return Availability(False, "Triton is not installed", _INSTALL)
        version = _version()
        if version is not None and _numbers(version) < _MINIMUM:
            needed = ".".join(map(str, _MINIMUM))
            return Availability(False, f"Triton {version} is older than {needed}", _INSTALL)
        label = f"Triton {version or 'of unknown version'}"
        if interpreted():
            return Availability(True, f"{label} in its interpreter, for tests: slow")
        if torch.version.hip is not None:
            return Availability(
                False,
                "the kernels are proven for NVIDIA GPUs only and this PyTorch is for ROCm",
                "use backend='torch', which runs on ROCm",
            )
        if not torch.cuda.is_available():
            return Availability(
                False,
                f"{label} is installed but PyTorch {torch.__version__} finds no CUDA device",
                "run on a machine with an NVIDIA GPU and a PyTorch built for CUDA",
            )
        return Availability(
            True, f"{label}, kernels proven by interpreter and compiler, some timed on an H200"
        )

    def supports(self, problem: Problem) -> str | None:
        """float32, bfloat16 and float16 features on a CUDA device."""
        if problem.device.type != "cuda" and not (interpreted() and problem.device.type == "cpu"):
            return f"features are on {problem.device}; Triton kernels read the memory of a GPU"
        if problem.compute_dtype == torch.float64:
            return "float64 features need float64 accumulators, which only torch has"
        try:
            self._choose(problem, residuals_kept=True)  # raises where a forced regime cannot run
        except ValueError as error:
            return str(error)
        return None

    def not_by_default(self, problem: Problem) -> str | None:
        """On a GPU of a generation that no test compiles for."""
        if problem.device.type != "cuda":
            return "the interpreter is for tests"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability[0] in PROVEN_MAJORS:
            return None
        return (
            f"no test compiles its kernels for compute capability {capability[0]}.{capability[1]}"
        )

    def chunk_rows(self, problem: Problem) -> int:
        """Rows whose working memory fits the budget of the regime."""
        return self._regime(problem).chunk_rows(problem)

    def describe(self, problem: Problem) -> str:
        """Regime, operands and tiles."""
        return _headline(self._regime(problem), problem)

    def explain(self, problem: Problem, plan: engine.Plan) -> list[str]:
        """Regime, tiles, sweeps over the features, peak memory, and the reasons."""
        choice = self._choose(problem, plan.keep_residual)
        regime = choice.regime
        rows = min(plan.chunk_rows, problem.rows)
        stored = regime.stores_residuals and plan.keep_residual
        kept = regime.state_bytes(problem) + (plan.residual_bytes if stored else 0)
        peak = kept + regime.fixed_bytes(problem) + rows * regime.row_bytes(problem)
        peak += _GRADIENT_BYTES * problem.weight.numel()
        if problem.streamed:
            row = problem.dim * problem.features.dtype.itemsize
            peak += min(plan.resident_bytes, row * problem.rows) + 2 * rows * row
        return [
            _headline(regime, problem),
            *choice.reasons,
            f"features read {regime.feature_reads} times in all; at most about "
            f"{peak / 2**20:.1f} MiB beyond inputs and results",
        ]

    def first_pass(
        self, problem: Problem, rows: slice, out: engine.RowBuffers, keep_residual: bool
    ) -> engine.FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        if _REGIME not in out.scratch:
            # With sequences the engine wants the residuals of a chunk whether or not it keeps them.
            kept = keep_residual if problem.cu_seqlens is None else engine.residuals_fit(problem)
            out.scratch[_REGIME] = self._choose(problem, kept).regime
        regime: Regime = out.scratch[_REGIME]
        return regime.first_pass(problem, rows, out, keep_residual)

    def second_pass(
        self,
        problem: Problem,
        rows: slice,
        out: engine.RowBuffers,
        mean_grad: Tensor,
        mean_bias_grad: Tensor | None,
        residual: Tensor | None,
        alignment: Tensor,
    ) -> None:
        """See :class:`moso_fast.backends.base.Backend`."""
        regime: Regime = out.scratch[_REGIME]
        regime.second_pass(problem, rows, out, mean_grad, mean_bias_grad, residual, alignment)

    def _regime(self, problem: Problem) -> Regime:
        """Return the regime of a job whose chunks nobody has fixed."""
        return self._choose(problem, engine.residuals_fit(problem)).regime

    def _choose(self, problem: Problem, residuals_kept: bool) -> Choice:
        return choose_regime(problem, residuals_kept, forced_regime(self._named))


def _headline(regime: Regime, problem: Problem) -> str:
    return f"triton: regime {regime.name}, {regime.describe(problem)}"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _version() -> str | None:
    """Version by the installed package's record, whatever that package is called; else None."""
    for name in metadata.packages_distributions().get("triton", []):
        return metadata.version(name)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
