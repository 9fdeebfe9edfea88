"""Plain PyTorch on any device: the backend that is always there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.losses import KNOWN, RowStatistics, mapped_statistics
from ..core.passes import FirstPass, Passes, Plan, RowBuffers
from ..core.problem import Problem
from ..core.status import STATUS_FEATURE, STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET
from .base import Availability, Backend
from .common import alignments, bad_targets, gradient_sum, logits_of, safe_features, safe_labels

# Rows of a chunk at most. A GPU wants few launches: chunks of 8192 rows took it 274 ms for 1.28
# million, 50 times what their sweeps need.
_MAX_CHUNK_ROWS = {"cpu": 8192, "cuda": 2**20}
# A float32 partial of the mean gradient sums at most this many rows: with rows all alike
# (duplicates) the rounding errors do not average out. cuBLAS adds them one by one, a CPU's BLAS in
# blocks of some hundred.
_SLAB_ROWS = {"cpu": 2048, "cuda": 512}
# Bytes of one chunk's logits and its elementwise temporaries: what the last-level cache holds.
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
# Bytes of partial sums that one product of many slabs may make; none on a CPU, where launches are
# free.
_PARTIAL_BYTES = {"cpu": 0, "cuda": 256 * 2**20}


class TorchBackend(Backend):
    """Chunked closed form; float32 products whatever the global float32 matmul precision says."""

    name = "torch"
    streams = True
    maps = True

    def availability(self) -> Availability:
        """Return that it is there: PyTorch is what the package stands on."""
        return Availability(True, f"PyTorch {torch.__version__}")

    def supports(self, problem: Problem) -> str | None:
        """Return None: every problem."""
        return None

    def prepare(self, problem: Problem, plan: Plan) -> TorchPasses:
        """See :class:`moso_fast.backends.base.Backend`."""
        return TorchPasses(problem, plan)


class TorchPasses(Passes):
    """Logits, residuals and products of a chunk by PyTorch, everything in the compute dtype."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self._slab_rows = _of(_SLAB_ROWS, problem.device)
        self._partial_bytes = _of(_PARTIAL_BYTES, problem.device)
        # Rows whose logits and temporaries fit the cache (CPU) or the chunk's budget (GPU).
        item = torch.finfo(problem.compute_dtype).bits // 8
        a_row = item * 4 * problem.heads * problem.classes
        if problem.features.dtype != problem.compute_dtype:
            a_row += item * problem.dim
        budget = max(64, _of(_CHUNK_BYTES, problem.device) // a_row)
        self.chunk_rows = min(_of(_MAX_CHUNK_ROWS, problem.device), budget)

    def describe(self) -> str:
        """See :class:`moso_fast.core.passes.Passes`."""
        return "torch: chunked closed form"

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        labels, counted, bad_label = safe_labels(problem, rows)
        features, finite, sqnorm = safe_features(
            problem, rows, problem.compute_dtype, look_first=not problem.asynchronous
        )
        bad_feature = counted & ~finite
        if problem.nonfinite == "exclude":
            counted = counted & finite
            bad_feature = torch.zeros_like(finite)
        residual, stats = self._residual(rows, features, labels, counted)
        out.loss[:, rows] = stats.loss.T
        out.residual_sqnorm[:, rows] = stats.residual_sqnorm.T
        out.margin[:, rows] = stats.margin.T
        out.entropy[:, rows] = stats.entropy.T
        out.feature_sqnorm[rows] = sqnorm
        out.counted[rows] = counted
        norms = stats.residual_sqnorm * sqnorm[:, None]
        total = norms + stats.loss
        if KNOWN[problem.loss].entropy:
            total = total + stats.entropy  # NaN where some logit is -inf, the others being finite
        overflow = counted & finite & ~torch.isfinite(total).all(1)
        bad = {STATUS_LABEL: bad_label, STATUS_FEATURE: bad_feature, STATUS_LOGITS: overflow}
        if problem.soft_labels:
            bad[STATUS_TARGET] = bad_targets(problem, labels)
        _note(out.status, bad, rows)
        flat = residual.reshape(residual.shape[0], -1)
        grad_sum = gradient_sum(flat, features, self._slab_rows, batch_bytes=self._partial_bytes)
        return FirstPass(
            grad_sum.reshape(problem.weight.shape),
            residual.sum(0),
            residual if self.returns_residual else None,
        )

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        # Rows that do not count may hold anything; each touches its own result alone.
        features = problem.feature_rows(rows).to(problem.compute_dtype)
        counted = out.counted[rows]
        if residual is None:
            labels, _, _ = safe_labels(problem, rows)
            residual, _ = self._residual(rows, features, labels, counted)
        dots = alignments(features, residual, self.mean_grad, self.mean_bias_grad)
        alignment.copy_(torch.where(counted, dots, 0))

    def _residual(
        self, rows: slice, features: Tensor, labels: Tensor, counted: Tensor
    ) -> tuple[Tensor, RowStatistics]:
        """Residuals (n, K, C), zero where a row does not count, and the statistics of the rows."""
        problem = self.problem
        weights = None if problem.sample_weight is None else problem.sample_weight[rows]
        logits = logits_of(features, problem.weight.reshape(-1, problem.dim), problem.bias)
        stats = mapped_statistics(
            problem.logit_map,
            logits.reshape(-1, problem.heads, problem.classes),
            labels,
            loss=problem.loss,
            label_smoothing=problem.label_smoothing,
            sample_weight=weights,
        )
        return stats.residual.masked_fill_(~counted[:, None, None], 0.0), stats


def _of(table: dict[str, int], device: torch.device) -> int:
    """Entry of a kind of device; others are treated like a CPU."""
    return table.get(device.type, table["cpu"])


def _note(status: Tensor, bad: dict[int, Tensor], rows: slice) -> None:
    """Keep the smallest bad row of every slot: all slots at once, and nobody waits for a device.

    ``bad`` has the masks of the first slots, by slot.
    """
    if rows.start == rows.stop:
        return
    masks = torch.stack([bad[slot] for slot in range(len(bad))])
    known = status[: len(bad)]
    index = torch.arange(rows.start, rows.stop, device=status.device)
    torch.minimum(known, torch.where(masks, index, known[:, None]).amin(1), out=known)
