"""Triton on a GPU: products by cuBLAS, everything between them in one kernel that works in place.

The logits of a chunk, float32, become its residuals where they lie, and the same launch writes
every row statistic: no second tensor of rows x classes, no softmax, no one-hot. The kernels are
proven in Triton's interpreter and compiled ahead of time for compute capability 8, 9 and 10; no
clock has seen them on a GPU yet.

bfloat16 features at precision "medium" stay bfloat16 as operands, and weights, residuals and the
mean gradient are rounded to it for the products alone. float16 cannot hold residuals (1e-8 is
below its smallest number): such features are expanded to float32 and multiplied in tf32, whose
ten digits hold them exactly. The same goes for float32 features at "high" and "medium".
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from ..engine import FirstPass, RowBuffers
from ..problem import STATUS_FEATURE, STATUS_LOGITS, Problem
from .base import Availability, Backend
from .common import alignments, gradient_sum, logits_of, note, safe_features

_MINIMUM = (3, 6)
_INSTALL = 'pip install "triton>=3.6"'
# Major compute capabilities that tests/test_triton_aot.py compiles every configuration for.
_PROVEN = (8, 9, 10)
# Bytes of one chunk's logits, products and copies. Large on a GPU, where a chunk costs some thirty
# launches; small in the interpreter, whose only purpose is to test.
_CHUNK_BYTES = {"cuda": 2**31, "cpu": 2**18}
# Rows of one float32 partial of the mean gradient: rounding of equal rows does not average out,
# and matters only where the operands themselves are not rounded.
_SLAB_ROWS = {"highest": 2048, "high": 8192, "medium": 8192}


class TritonBackend(Backend):
    """cuBLAS products around one fused kernel; every loss, any number of heads and classes."""

    name = "triton"

    def availability(self) -> Availability:
        """Whether Triton is there, new enough, and has a device; imports nothing."""
        if not _installed():
            return Availability(False, "Triton is not installed", _INSTALL)
        version = _version()
        if version is not None and _numbers(version) < _MINIMUM:
            needed = ".".join(map(str, _MINIMUM))
            return Availability(False, f"Triton {version} is older than {needed}", _INSTALL)
        label = f"Triton {version or 'of unknown version'}"
        if _interpreted():
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
            True, f"{label}, kernels proven by interpreter and compiler, not yet timed on a GPU"
        )

    def supports(self, problem: Problem) -> str | None:
        """float32, bfloat16 and float16 features on a CUDA device."""
        if problem.device.type != "cuda" and not (_interpreted() and problem.device.type == "cpu"):
            return f"features are on {problem.device}; Triton kernels read the memory of a GPU"
        if problem.compute_dtype == torch.float64:
            return "float64 features need float64 accumulators, which only torch has"
        return None

    def not_by_default(self, problem: Problem) -> str | None:
        """On a GPU of a generation that no test compiles for."""
        if problem.device.type != "cuda":
            return "the interpreter is for tests"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability[0] in _PROVEN:
            return None
        return (
            f"no test compiles its kernels for compute capability {capability[0]}.{capability[1]}"
        )

    def chunk_rows(self, problem: Problem) -> int:
        """Rows whose logits, products of the same size and operand copies fit the budget."""
        a_row = 8 * problem.heads * problem.classes
        operand = operand_dtype(problem)
        if operand.itemsize == 2:
            a_row += 2 * problem.heads * problem.classes
        if operand != problem.features.dtype:
            a_row += operand.itemsize * problem.dim
        if problem.classes > problem.dim:
            a_row += 4 * problem.heads * problem.dim
        budget = _CHUNK_BYTES.get(problem.device.type, _CHUNK_BYTES["cpu"])
        return max(1, budget // a_row)

    def describe(self, problem: Problem) -> str:
        """Operands of the products and the tile of the kernel."""
        from moso_fast.kernels.residual import choose_config

        config = choose_config(problem.classes, loss=problem.loss, soft=problem.soft_labels)
        operand = str(operand_dtype(problem)).removeprefix("torch.")
        if operand == "float32" and problem.precision != "highest":
            operand = "tf32"
        return (
            f"triton: {operand} products, residuals in place, tile {config.block_rows} x "
            f"{config.block_classes}, {config.num_warps} warps"
        )

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        counted = problem.counted(rows)
        features, finite, sqnorm = safe_features(
            problem, rows, operand_dtype(problem), look_first=not _capturing(problem)
        )
        if problem.nonfinite == "exclude":
            counted &= finite
        else:
            note(out.status, STATUS_FEATURE, counted & ~finite, rows)
        out.feature_sqnorm[rows] = sqnorm
        out.counted[rows] = counted
        residual = _residual(problem, rows, out, features)
        # The kernel reports its own overflows; |g|^2 = |r|^2 |h|^2 may be one more.
        norms = out.residual_sqnorm[:, rows] * sqnorm
        note(out.status, STATUS_LOGITS, counted & ~torch.isfinite(norms).all(0), rows)
        grad_sum = gradient_sum(
            residual.to(features.dtype), features, _SLAB_ROWS[problem.precision], batched=True
        )
        shape = (-1, problem.heads, problem.classes)
        return FirstPass(
            grad_sum.reshape(problem.weight.shape),
            residual.sum(0, dtype=torch.float64).reshape(shape[1:]),
            residual.reshape(shape) if keep_residual else None,
        )

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
        """See :class:`moso_fast.backends.base.Backend`."""
        # Rows that do not count may hold anything; each touches its own result alone.
        features = problem.features[rows].to(operand_dtype(problem))
        if residual is None:
            flat = _residual(problem, rows, out, features)
            residual = flat.reshape(-1, problem.heads, problem.classes)
        dots = alignments(features, residual, mean_grad, mean_bias_grad)
        if features.dtype.itemsize == 2 and problem.cu_seqlens is None:
            dots = dots + _lost_self_term(out, rows, residual, problem.classes > problem.dim)
        alignment.copy_(torch.where(out.counted[rows], dots, 0))


def operand_dtype(problem: Problem) -> torch.dtype:
    """Return the dtype in which this problem's features enter the products."""
    if problem.precision == "medium" and problem.features.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def _residual(problem: Problem, rows: slice, out: RowBuffers, features: Tensor) -> Tensor:
    """Residuals (n, K * C) in the memory of the logits; writes the statistics of the rows."""
    from moso_fast.kernels.residual import RowOutputs, residual_rows  # imports Triton

    labels = problem.labels[rows]
    if problem.soft_labels and not labels.is_floating_point():
        labels = labels.to(torch.float32)
    weights = None if problem.sample_weight is None else problem.sample_weight[rows].contiguous()
    logits = logits_of(problem, features)
    residual_rows(
        logits,
        labels.contiguous(),
        classes=problem.classes,
        out=RowOutputs(
            out.loss[:, rows],
            out.residual_sqnorm[:, rows],
            out.margin[:, rows],
            out.entropy[:, rows],
        ),
        status=out.status,
        first_row=rows.start,
        loss=problem.loss,
        label_smoothing=problem.label_smoothing,
        ignore_index=problem.ignore_index,
        sample_weight=weights,
        counted=out.counted[rows],
    )
    return logits


def _lost_self_term(out: RowBuffers, rows: slice, residual: Tensor, both_rounded: bool) -> Tensor:
    """Return what rounding residuals took from each row's dot product with itself, (K, n).

    Scores are N a - q with the exact q: what a holds of the row's own gradient must be as exact,
    or the rounding of the largest term of a confident row would decide its score.
    """
    rounded = residual.to(torch.bfloat16).float()
    other = residual + rounded if both_rounded else residual
    lost = ((residual - rounded) * other).sum(-1).T
    return lost * out.feature_sqnorm[rows] / out.counted.sum().clamp_min(1)


def _capturing(problem: Problem) -> bool:
    return problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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
