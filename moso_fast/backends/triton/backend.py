"""Triton on NVIDIA GPUs: finds out whether it can run, and hands each problem to a regime.

A regime (``regimes/``) is one way through the two passes: which kernels, which products by
cuBLAS, what is stored between. ``choice.py`` holds the table that decides;
``MOSO_FAST_TRITON_REGIME`` forces one, ``MOSO_FAST_AUTOTUNE=1`` searches the tiles. The kernels
are tested in Triton's interpreter and compiled ahead of time for compute capability 8, 9 and 10,
and most have run on an H200.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from importlib import metadata

import torch

from ...core.passes import Plan
from ...core.problem import Problem
from ..base import Availability, Backend
from .choice import choose_regime, forced_refusal, forced_regime
from .regime import TESTED_MAJORS, Regime, interpreted, operand_dtype

__all__ = ["TritonBackend", "operand_dtype"]

_MINIMUM = (3, 6)
_LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")  # of kernels/row_losses.py
_INSTALL = 'pip install "triton>=3.6"'


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
                "the kernels are tested for NVIDIA GPUs only and this PyTorch is for ROCm",
                "use backend='torch', which runs on ROCm",
            )
        if not torch.cuda.is_available():
            return Availability(
                False,
                f"{label} is installed but PyTorch {torch.__version__} finds no CUDA device",
                "run on a machine with an NVIDIA GPU and a PyTorch built for CUDA",
            )
        return Availability(
            True, f"{label}, kernels tested by interpreter and compiler, some timed on an H200"
        )

    def supports(self, problem: Problem) -> str | None:
        """float32, bfloat16 and float16 features on a CUDA device."""
        if problem.device.type != "cuda" and not (interpreted() and problem.device.type == "cpu"):
            return f"features are on {problem.device}; Triton kernels read the memory of a GPU"
        if problem.compute_dtype == torch.float64:
            return "float64 features need float64 accumulators, which only torch has"
        if problem.loss not in _LOSSES:
            return f"the Triton kernels know {', '.join(_LOSSES)}"
        try:
            forced = forced_regime(self._named)
        except ValueError as error:
            return str(error)
        return None if forced is None else forced_refusal(forced, problem)

    def not_by_default(self, problem: Problem) -> str | None:
        """On a GPU of a generation that no test compiles for."""
        if problem.device.type != "cuda":
            return "the interpreter is for tests"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability[0] in TESTED_MAJORS:
            return None
        return (
            f"no test compiles its kernels for compute capability {capability[0]}.{capability[1]}"
        )

    def prepare(self, problem: Problem, plan: Plan) -> Regime:
        """See :class:`moso_fast.backends.base.Backend`."""
        choice = choose_regime(problem, plan.keep_residual, forced_regime(self._named))
        return choice.regime(problem, plan, choice.reasons)


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
