"""A backend whose products NumPy makes: one file and one line of registry, as CONTRIBUTING says.

As a pytest plugin (``pytest -p numpy_backend``) it is one more backend for the parametrised tests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moso_fast.backends import _REGISTRY
from moso_fast.backends.base import Availability, Backend
from moso_fast.backends.common import bad_targets, note, safe_features, safe_labels
from moso_fast.core.losses import KNOWN, RowStatistics, row_statistics
from moso_fast.core.passes import FirstPass, Passes, Plan, RowBuffers
from moso_fast.core.problem import Problem
from moso_fast.core.status import STATUS_FEATURE, STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET


class NumpyBackend(Backend):
    name = "numpy"

    def availability(self) -> Availability:
        return Availability(True, f"NumPy {np.__version__}")

    def supports(self, problem: Problem) -> str | None:
        return None if problem.device.type == "cpu" else "NumPy reads main memory"

    def prepare(self, problem: Problem, plan: Plan) -> Passes:
        return NumpyPasses(problem, plan)


class NumpyPasses(Passes):
    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self.chunk_rows = max(1, min(8192, 2**20 // (problem.heads * problem.classes)))

    def describe(self) -> str:
        return "numpy: closed form"

    def statistics(self, rows: slice, h: Tensor, y: Tensor, counted: Tensor) -> RowStatistics:
        p = self.problem
        z = torch.from_numpy(np.einsum("nd,kcd->nkc", h.numpy(), p.weight.numpy()))
        stats = row_statistics(
            (z if p.bias is None else z + p.bias).contiguous(),
            y,
            loss=p.loss,
            label_smoothing=p.label_smoothing,
            sample_weight=None if p.sample_weight is None else p.sample_weight[rows],
        )
        stats.residual[~counted] = 0
        return stats

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        p = self.problem
        y, counted, bad_label = safe_labels(p, rows)
        h, finite, norm = safe_features(p, rows, p.compute_dtype, look_first=True)
        note(out.status, STATUS_LABEL, bad_label, rows)
        if p.nonfinite == "exclude":
            counted = counted & finite
        note(out.status, STATUS_FEATURE, counted & ~finite, rows)
        if p.soft_labels:
            note(out.status, STATUS_TARGET, bad_targets(p, y), rows)
        stats = self.statistics(rows, h, y, counted)
        total = stats.residual_sqnorm * norm[:, None] + stats.loss
        if KNOWN[p.loss].entropy:
            total = total + stats.entropy
        note(out.status, STATUS_LOGITS, counted & finite & ~total.isfinite().all(1), rows)
        for name in ("loss", "residual_sqnorm", "margin", "entropy"):
            getattr(out, name)[:, rows] = getattr(stats, name).T
        out.feature_sqnorm[rows], out.counted[rows] = norm, counted
        r = stats.residual.double().numpy()
        grad = torch.from_numpy(np.einsum("nkc,nd->kcd", r, h.double().numpy()))
        kept = stats.residual if self.returns_residual else None
        return FirstPass(grad, torch.from_numpy(r.sum(0)), kept)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        p, counted = self.problem, out.counted[rows]
        h = safe_features(p, rows, p.compute_dtype, look_first=True)[0]
        if residual is None:
            residual = self.statistics(rows, h, safe_labels(p, rows)[0], counted).residual
        r = residual.numpy()
        dots = np.einsum("nkc,nkc->kn", np.einsum("nd,kcd->nkc", h.numpy(), self.mean_grad), r)
        if self.mean_bias_grad is not None:
            dots += np.einsum("nkc,kc->kn", r, self.mean_bias_grad.numpy())
        alignment.copy_(torch.where(counted, torch.from_numpy(dots), 0))


_REGISTRY["numpy"] = NumpyBackend()
