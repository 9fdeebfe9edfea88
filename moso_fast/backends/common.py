"""What the backends that stand on PyTorch's matrix products share: operands, products, status.

Operands may be 16-bit; accumulators and results are float32 (float64 for float64 operands).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.losses import KNOWN, SOFT_LABEL_TOLERANCE
from ..core.problem import Problem


def safe_labels(problem: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Safe labels (or targets) of the rows, the mask of counted rows, the mask of bad ones."""
    counted = problem.counted(rows)
    if problem.soft_labels:
        targets = problem.labels[rows].to(problem.compute_dtype)
        return targets, counted, torch.zeros_like(counted)
    labels = problem.labels[rows].long()
    bad = counted & ((labels < 0) | (labels >= problem.classes))
    return torch.where(counted & ~bad, labels, 0), counted, bad


def safe_features(
    problem: Problem, rows: slice, dtype: torch.dtype, *, look_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features in ``dtype``, non-finite rows as zeros, the mask of finite ones, squared norms.

    ``look_first``: ask the norms whether there is anything to clear, which waits for the device;
    otherwise every element is looked at, which costs sweeps over the features.
    """
    features = problem.feature_rows(rows).to(dtype)
    norm = torch.linalg.vector_norm(features, dim=1, dtype=problem.compute_dtype)
    sqnorm = norm.square()
    finite = torch.isfinite(sqnorm)
    if look_first and bool(finite.all()):
        return features, finite, sqnorm
    # A norm may overflow although the row is finite: look at its elements.
    finite = torch.isfinite(features).all(1)
    features = torch.where(finite[:, None], features, 0)
    return features, finite, torch.where(finite, sqnorm, 0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, (n, m) or batched, never rounded to 16 bits."""
    if left.dtype.itemsize > 2:
        return left @ right
    if not left.is_cuda:  # PyTorch offers out_dtype on CUDA alone
        return left.float() @ right.float()
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits (n, K * C) of features by heads (K * C, D) in the same operand dtype.

    ``bias`` (K, C) or (K * C,) in the compute dtype, or None.
    """
    if bias is None:
        return product(features, weight.T)
    bias = bias.reshape(-1)
    if features.dtype == bias.dtype:
        return torch.addmm(bias, features, weight.T)
    return product(features, weight.T).add_(bias)


def gradient_sum(
    residual: Tensor, features: Tensor, slab_rows: int, *, batch_bytes: int = 0
) -> Tensor:
    """Sum r_i (outer) h_i over the rows, (K C, D): slabs of rows, added up in float64.

    As many slabs go in one launch as have partial sums of no more than ``batch_bytes``.
    """
    rows = residual.shape[0]
    if rows <= slab_rows:
        return product(residual.T, features)
    shape = (residual.shape[1], features.shape[1])
    total = torch.zeros(shape, dtype=torch.float64, device=features.device)
    at_once = batch_bytes // (4 * total.numel()) * slab_rows
    whole = rows - rows % slab_rows
    for start in range(0, whole, at_once or slab_rows):
        part = slice(start, min(start + (at_once or slab_rows), whole))
        if part.stop - part.start == slab_rows:
            total += product(residual[part].T, features[part])
            continue
        slabs = [t[part].unflatten(0, (-1, slab_rows)) for t in (residual, features)]
        total += product(slabs[0].transpose(1, 2), slabs[1]).sum(0, dtype=torch.float64)
    if whole < rows:
        total += product(residual[whole:].T, features[whole:])
    return total


def alignments(
    features: Tensor, residual: Tensor, mean_grad: Tensor, mean_bias_grad: Tensor | None
) -> Tensor:
    """<g_i, G> of every row, (K, n), by the product that is smaller: H G^T or R G.

    ``residual`` (n, K, C) is rounded to the dtype of ``features`` only as an operand, where
    C > D. Rows whose features are not finite give NaN.
    """
    classes, dim = mean_grad.shape[1:]
    grad = mean_grad.to(features.dtype)
    if classes <= dim:
        projected = product(features, grad.reshape(-1, dim).T).reshape(residual.shape)
        dots = projected.mul_(residual).sum(-1).T
    else:
        pulled = product(residual.transpose(0, 1).to(features.dtype), grad)
        dots = pulled.mul_(features).sum(-1)
    if mean_bias_grad is not None:
        dots = dots + torch.einsum("nkc,kc->kn", residual, mean_bias_grad)
    return dots


def note(status: Tensor, slot: int, bad: Tensor, rows: slice) -> None:
    """Keep the smallest bad row in the slot, without a device synchronisation."""
    index = torch.arange(rows.start, rows.stop, device=bad.device)
    first = torch.where(bad, index, status[slot]).amin() if bad.numel() else status[slot]
    status[slot] = torch.minimum(status[slot], first)


def bad_targets(problem: Problem, targets: Tensor) -> Tensor:
    """Mask of the rows whose targets (n, C) are none for the loss."""
    loss = KNOWN[problem.loss]
    bad = loss.wrong(targets).any(1)
    if loss.sum_to_one:
        bad |= (targets.sum(1) - 1).abs() > SOFT_LABEL_TOLERANCE
    return bad
