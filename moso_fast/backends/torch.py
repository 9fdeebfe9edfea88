"""Plain PyTorch on any device: the backend that is always there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import FirstPass, RowBuffers
from ..losses import SOFT_LABEL_TOLERANCE, row_statistics
from ..problem import (
    STATUS_FEATURE,
    STATUS_LABEL,
    STATUS_LOGITS,
    STATUS_TARGET,
    Problem,
)
from .base import Availability, Backend

_MAX_CHUNK_ROWS = 8192
# A float32 partial of the mean gradient sums at most this many rows: BLAS adds them one by one,
# and with rows all alike (duplicates) the rounding errors do not average out.
_SLAB_ROWS = 2048
# Bytes of one chunk's logits and its elementwise temporaries: what the last-level cache holds.
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}


class TorchBackend(Backend):
    """Chunked closed form; float32 products whatever the global float32 matmul precision says."""

    name = "torch"

    def availability(self) -> Availability:
        """Return that it is there: PyTorch is what the package stands on."""
        return Availability(True, f"PyTorch {torch.__version__}")

    def supports(self, problem: Problem) -> str | None:
        """Return None: every problem."""
        return None

    def chunk_rows(self, problem: Problem) -> int:
        """Rows whose logits and temporaries fit the cache (CPU) or the chunk budget (GPU)."""
        item = torch.finfo(problem.compute_dtype).bits // 8
        a_row = item * 4 * problem.heads * problem.classes
        if problem.features.dtype != problem.compute_dtype:
            a_row += item * problem.dim
        budget = _CHUNK_BYTES.get(problem.device.type, _CHUNK_BYTES["cpu"])
        return max(1, min(_MAX_CHUNK_ROWS, max(64, budget // a_row)))

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        labels, counted, bad_label = _labels(problem, rows)
        features, finite, sqnorm = _features(problem, rows)
        bad_feature = counted & ~finite
        if problem.nonfinite == "exclude":
            counted = counted & finite
            bad_feature = torch.zeros_like(finite)
        residual, stats = _residual(problem, rows, features, labels, counted)
        out.loss[:, rows] = stats.loss.T
        out.residual_sqnorm[:, rows] = stats.residual_sqnorm.T
        out.margin[:, rows] = stats.margin.T
        out.entropy[:, rows] = stats.entropy.T
        out.feature_sqnorm[rows] = sqnorm
        out.counted[rows] = counted
        norms = stats.residual_sqnorm * sqnorm[:, None]
        total = norms + stats.loss
        if problem.loss != "mse":
            total = total + stats.entropy  # NaN where some logit is -inf, the others being finite
        overflow = counted & finite & ~torch.isfinite(total).all(1)
        _note(out.status, STATUS_LABEL, bad_label, rows)
        _note(out.status, STATUS_FEATURE, bad_feature, rows)
        _note(out.status, STATUS_LOGITS, overflow, rows)
        if problem.soft_labels:
            _note(out.status, STATUS_TARGET, _bad_target(problem, labels), rows)
        flat = residual.reshape(residual.shape[0], -1)
        grad_sum = _product_by_slabs(flat, features)
        return FirstPass(
            grad_sum.reshape(problem.weight.shape),
            residual.sum(0),
            residual if keep_residual else None,
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
        features, _, _ = _features(problem, rows)
        if residual is None:
            labels, _, _ = _labels(problem, rows)
            residual, _ = _residual(problem, rows, features, labels, out.counted[rows])
        if problem.classes <= problem.dim:
            projected = features @ mean_grad.reshape(-1, problem.dim).T
            dots = (residual * projected.reshape(residual.shape)).sum(-1).T
        else:
            pulled = residual.transpose(0, 1) @ mean_grad
            dots = (pulled * features).sum(-1)
        if mean_bias_grad is not None:
            dots = dots + torch.einsum("nkc,kc->kn", residual, mean_bias_grad)
        alignment.copy_(dots)


def _product_by_slabs(residual: Tensor, features: Tensor) -> Tensor:
    """Sum r_i (outer) h_i over the rows, (K C, D): slabs of rows, added up in float64."""
    slabs = list(zip(residual.split(_SLAB_ROWS), features.split(_SLAB_ROWS), strict=True))
    if len(slabs) == 1:
        return residual.T @ features
    total = torch.zeros(
        residual.shape[1], features.shape[1], dtype=torch.float64, device=features.device
    )
    for r, h in slabs:
        total += r.T @ h
    return total


def _labels(problem: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Safe labels (or targets) of the rows, the mask of counted rows, the mask of bad ones."""
    counted = problem.counted(rows)
    if problem.soft_labels:
        targets = problem.labels[rows].to(problem.compute_dtype)
        return targets, counted, torch.zeros_like(counted)
    labels = problem.labels[rows].long()
    bad = counted & ((labels < 0) | (labels >= problem.classes))
    return torch.where(counted & ~bad, labels, 0), counted, bad


def _features(problem: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Features in the compute dtype, non-finite rows as zeros, their mask, squared norms."""
    features = problem.features[rows].to(problem.compute_dtype)
    sqnorm = torch.linalg.vector_norm(features, dim=1).square()
    finite = torch.isfinite(sqnorm)
    if problem.device.type != "cpu" or not bool(finite.all()):
        # A norm may overflow although the row is finite: look at the numbers themselves.
        finite = torch.isfinite(features).all(1)
        features = torch.where(finite[:, None], features, 0)
        sqnorm = torch.where(finite, sqnorm, 0)
    return features, finite, sqnorm


def _residual(problem, rows, features, labels, counted):  # type: ignore[no-untyped-def]
    flat = problem.weight.reshape(-1, problem.dim)
    if problem.bias is None:
        logits = features @ flat.T
    else:
        logits = torch.addmm(problem.bias.reshape(-1), features, flat.T)
    weights = None if problem.sample_weight is None else problem.sample_weight[rows]
    stats = row_statistics(
        logits.reshape(-1, problem.heads, problem.classes),
        labels,
        loss=problem.loss,
        label_smoothing=problem.label_smoothing,
        sample_weight=weights,
    )
    return stats.residual.masked_fill_(~counted[:, None, None], 0.0), stats


def _bad_target(problem: Problem, targets: Tensor) -> Tensor:
    if problem.loss == "mse":
        return ~torch.isfinite(targets).all(1)
    bad = ~((targets >= 0) & (targets <= 1)).all(1)
    if problem.loss == "cross_entropy":
        bad |= (targets.sum(1) - 1).abs() > SOFT_LABEL_TOLERANCE
    return bad


def _note(status: Tensor, slot: int, bad: Tensor, rows: slice) -> None:
    """Keep the smallest bad row in the slot, without a device synchronisation."""
    index = torch.arange(rows.start, rows.stop, device=bad.device)
    first = torch.where(bad, index, status[slot]).amin() if bad.numel() else status[slot]
    status[slot] = torch.minimum(status[slot], first)
