"""Heads whose output goes through a known map before the loss is taken of it, as one problem.

A factor s changes nothing but the weights: the logits are those of the head s W, and a gradient by
W is s times the one by s W. Any other map is applied within the passes (see `core.logit_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import choose
from ..core import engine
from ..core.logit_map import LogitMap
from ..core.losses import row_statistics
from ..core.options import Options
from ..core.passes import Results
from ..core.precision import own_precision
from ..core.problem import Problem, build_problem
from ..core.sequences import segment_sum

_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class HeadProblem:
    """The checked problem of heads over the same features, and a factor behind each of them.

    ``problem`` has the factors in its weights; ``scales`` (K,) float64 are those by which its
    gradients are still to be multiplied, None where all are 1.
    """

    problem: Problem
    scales: Tensor | None = None

    def of(self, problem: Problem) -> HeadProblem:
        """Return the same heads over the rows of another ``problem``."""
        return replace(self, problem=problem)

    def solve(self, backend: str = "auto", chunk_size: int | None = None) -> tuple[Results, str]:
        """Score the problem: statistics (K, samples) with gradients by W and b, and the backend.

        ``backend`` and ``chunk_size`` are those of `last_layer_stats`. EL2N is the norm of the
        derivative by the logits.

        Raises
        ------
        ValueError
            Data that cannot be scored; see `core.engine.run`.
        """
        problem = self.problem
        chosen = choose(problem, backend)[0]
        with own_precision(problem):
            found = engine.run(problem, chosen, chunk_size)
            if problem.logit_map is not None:
                found.el2n = _logit_residuals(problem, found.alignment)
        return found if self.scales is None else _scaled(found, self.scales), chosen.name


def head_problem(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_map: LogitMap | None = None,
    logit_scale: Sequence[float] | None = None,
    options: Options | None = None,
) -> HeadProblem:
    """Check the problem of the loss of m(s (W h + b)), once for all that is done with it.

    Parameters
    ----------
    features, weight, labels, bias, sample_weight, cu_seqlens
        As in `last_layer_stats`.
    logit_map
        m, the same for all heads; None = none.
    logit_scale
        s of each of the K heads; None = 1.
    options
        Loss and precision; None = the defaults.

    Raises
    ------
    TypeError, ValueError
        What shapes and dtypes show to be wrong.
    """
    options = Options() if options is None else options
    # log_softmax leaves cross-entropy as it is.
    if options.loss == "cross_entropy" and logit_map is not None:
        logit_map = None if logit_map.keeps_cross_entropy() else logit_map
    scales = None
    if logit_scale is not None and any(s != 1.0 for s in logit_scale):
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        scales = torch.tensor(logit_scale, dtype=torch.float64, device=weight.device)
        by_head = scales if weight.dim() == 3 else scales[0]
        weight = (weight.double() * by_head[..., None, None]).to(wide)
        bias = None if bias is None else (bias.double() * by_head[..., None]).to(wide)
    problem = build_problem(
        features,
        weight,
        labels,
        bias,
        sample_weight=sample_weight,
        cu_seqlens=cu_seqlens,
        logit_map=logit_map,
        options=options,
    )
    return HeadProblem(problem, scales)


def _scaled(found: Results, scales: Tensor) -> Results:
    """Statistics by W from those by s W: gradients are s times as long."""
    square = scales.square()
    by_head = square[:, None].to(found.alignment.device)
    return replace(
        found,
        alignment=(found.alignment * by_head).to(found.alignment.dtype),
        grad_sqnorm=(found.grad_sqnorm * by_head).to(found.grad_sqnorm.dtype),
        mean_grad_sqnorm=found.mean_grad_sqnorm * square.to(found.mean_grad_sqnorm.device),
    )


def _logit_residuals(problem: Problem, like: Tensor) -> Tensor:
    """EL2N: |dl/dm| of every sample; the passes know the derivative by the head's output alone."""
    assert problem.logit_map is not None
    heads, classes, dtype = problem.heads, problem.classes, problem.compute_dtype
    squared = torch.empty(heads, problem.rows, dtype=dtype, device=problem.device)
    step = max(1, _BLOCK_ELEMENTS // (heads * classes))
    for start in range(0, problem.rows, step):
        rows = slice(start, min(start + step, problem.rows))
        counted, labels = problem.counted(rows), problem.labels[rows]
        if not problem.soft_labels:
            labels = torch.where(counted, labels.long(), 0)
        h = torch.nan_to_num(problem.feature_rows(rows).to(dtype))
        z = torch.einsum("nd,kcd->nkc", h, problem.weight)
        if problem.bias is not None:
            z = z + problem.bias
        stats = row_statistics(
            problem.logit_map.apply(z),
            labels if labels.dim() == 1 else labels.to(dtype),
            loss=problem.loss,
            label_smoothing=problem.label_smoothing,
            sample_weight=None if problem.sample_weight is None else problem.sample_weight[rows],
        )
        squared[:, rows] = torch.where(counted[:, None], stats.residual_sqnorm, 0).T
    if problem.cu_seqlens is not None:
        squared = segment_sum(squared.double(), problem.cu_seqlens).to(dtype)
    el2n = squared.sqrt().reshape(like.shape)
    # Samples that do not count have no alignment either.
    return torch.where(torch.isnan(like), like, el2n)
