"""Launch of the kernels for few classes: checks, partial sums, pointers, strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .few_classes_first import few_classes_first_kernel
from .few_classes_second import few_classes_second_kernel
from .few_classes_tiles import (
    Choice,
    choose_first_tile,
    choose_second_tile,
    groups_of,
    slab_rows,
)
from .operands import (
    aligned,
    check_matrix,
    check_vector,
    describe,
    input_precision,
    interpreted,
    products_of,
)
from .row_arguments import RowOutputs, check_heads, check_labels, check_outputs, kind_of


class GradientSums(NamedTuple):
    """Sums over the rows, float64: ``grad`` (K, C, D) and ``bias`` (K, C)."""

    grad: Tensor
    bias: Tensor


def few_classes_first(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    out: RowOutputs,
    status: Tensor,
    first_row: int = 0,
    residual: Tensor | None = None,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    exclude_nonfinite: bool = False,
    precision: str = "highest",
    choice: Choice | None = None,
) -> GradientSums:
    """Write the statistics of every row and return the sums of the gradients, in one read of H.

    Equals, but for rounding, with ``moso_fast.core.losses.row_statistics``::

        logits = torch.einsum("nd,kcd->nkc", features, weight) + bias
        stats = row_statistics(logits, labels, loss=loss, ...)   # 0 for rows that do not count
        GradientSums(torch.einsum("nkc,nd->kcd", stats.residual, features), stats.residual.sum(0))

    A row does not count where its label is ``ignore_index`` or, with ``exclude_nonfinite``, where
    a feature is not finite. Such rows, and rows that the status reports, have residual 0 and NaN
    statistics; they may hold anything.

    Allocates the result and S float32 partials, S (K C) (D + 1) elements, where S is 264 times the
    least number that keeps a slab within ``operands.MOST_ROWS``. Never synchronises.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride.
    weight
        (K, C, D) float32, contiguous.
    bias
        (K, C) float32, contiguous, or None.
    labels
        (n,) integer class ids, contiguous; or (n, C) targets of any real dtype with unit column
        stride: probabilities for ``"cross_entropy"``, the only form for the other losses.
    out
        Where the statistics go.
    status
        (STATUS_SLOTS,) int64, lowered to ``first_row`` + the smallest row with a label out of
        range, non-finite features, a bad target, or an overflow (slots of ``moso_fast.problem``).
    first_row
        What row 0 is called in ``status``.
    residual
        (n, K C) float32, unit column stride, any row stride: where the residuals go, if anywhere.
    loss, label_smoothing, ignore_index
        As in ``moso_fast.last_layer_stats``.
    sample_weight
        (n,) float32, contiguous: factors on loss and residual.
    exclude_nonfinite
        Whether rows with non-finite features are left out rather than reported.
    precision
        ``"highest"``, ``"high"``: float32-accurate products. ``"medium"``: bfloat16 features
        multiply weights and residuals rounded to bfloat16, others multiply as tf32.
    choice
        One of ``FIRST_TILES``, or None for ``choose_first_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above, or a C or D that no tile holds.
    """
    rows, heads, classes, dim = check_heads(features, weight, bias)
    check_labels(labels, loss, rows, classes, features.device)
    input_precision(precision)
    check_outputs(out, status, residual, rows, heads, classes, features.device)
    check_vector("sample_weight", sample_weight, rows, torch.float32, features.device)
    products = products_of(features.dtype, precision)
    choice = choice or choose_first_tile(classes, heads, dim, products, aligned(features))
    if choice is None or classes > choice.tile.classes or dim > choice.tile.dim:
        raise ValueError(
            f"weight {tuple(weight.shape)} is beyond the tiles for {products} products: no tile "
            f"holds C = {classes} and D = {dim}"
        )
    tile = choice.tile
    heads_a_tile, lanes, groups = groups_of(classes, heads, tile)
    length = slab_rows(rows, tile.rows, precision)
    slabs = triton.cdiv(rows, length)
    grad_partials = torch.empty(slabs, heads, classes, dim, device=features.device)
    bias_partials = torch.empty(slabs, heads, classes, device=features.device)
    if rows:
        with torch.cuda.device_of(features):
            few_classes_first_kernel[(groups * slabs,)](
                features,
                weight,
                bias,
                labels,
                sample_weight,
                *out,
                residual,
                status,
                grad_partials,
                bias_partials,
                rows=rows,
                slab_rows=length,
                first_row=first_row,
                target_stride=labels.stride(0),
                head_stride=out.loss.stride(0),
                residual_stride=0 if residual is None else residual.stride(0),
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                HEADS=heads,
                CLASSES=classes,
                DIM=dim,
                FEATURE_STRIDE=features.stride(0),
                BLOCK_ROWS=tile.rows,
                HEADS_A_TILE=heads_a_tile,
                LANES=lanes,
                PARTS=tile.num_warps,
                BLOCK_DIM=tile.dim // tile.num_warps,
                LOSS=kind_of(loss, labels),
                SMOOTH=label_smoothing != 0.0,
                EXCLUDE=exclude_nonfinite,
                PREFETCH=choice.prefetch,
                RELOAD=choice.reload,
                ROUND=products == "bf16",
                PRECISION=input_precision(precision),
                UPCAST=interpreted(),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
            )
    return GradientSums(
        grad_partials.sum(0, dtype=torch.float64), bias_partials.sum(0, dtype=torch.float64)
    )


class Recompute(NamedTuple):
    """What residuals are made from: arguments of ``few_classes_first`` of the same name."""

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    sample_weight: Tensor | None = None


def few_classes_second(
    features: Tensor,
    residual: Tensor | Recompute,
    mean_grad: Tensor,
    mean_bias_grad: Tensor | None,
    *,
    counted: Tensor,
    feature_sqnorm: Tensor,
    out: Tensor,
    count: Tensor | None = None,
    precision: str = "highest",
    choice: Choice | None = None,
) -> None:
    """Write every row's dot product with the mean gradient, in one read of H.

    Equals, but for rounding::

        s = torch.einsum("nd,kcd->nkc", features, mean_grad) + mean_bias_grad
        out.copy_(torch.where(counted, (residual.view(s.shape) * s).sum(-1).T, 0))

    With bfloat16 products and ``count`` given, what rounding residuals took from the row's dot
    product with itself is added: sum_c (r - bf16(r)) r |h|^2 / N. Allocates nothing and never
    synchronises.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride. Rows that do not
        count may hold anything.
    residual
        (n, K C) float32, unit column stride, any row stride: what the first pass wrote; or a
        :class:`Recompute`, to make them again with the operands of the first pass.
    mean_grad
        (K, C, D) float32, contiguous.
    mean_bias_grad
        (K, C) float32, contiguous, or None.
    counted, feature_sqnorm
        (n,) bool and float32, as the first pass wrote them.
    out
        (K, n) float32, unit row stride: where the results go, 0 for rows that do not count.
    count
        () int64 on the device: N. None: leave the self-term as it is (samples of several rows).
    precision
        As in ``few_classes_first``.
    choice
        One of ``SECOND_TILES``, or None for ``choose_second_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above, or a C that no tile holds.
    """
    made = residual if isinstance(residual, Recompute) else None
    rows, heads, classes, dim = _check_second(features, residual, mean_grad, mean_bias_grad)
    device = features.device
    input_precision(precision)
    check_vector("counted", counted, rows, torch.bool, device)
    check_vector("feature_sqnorm", feature_sqnorm, rows, torch.float32, device)
    check_matrix("out", out, (heads, rows), (torch.float32,), device)
    if count is not None and (count.shape != () or count.dtype != torch.int64):
        raise ValueError(f"count must be () int64; got {describe(count)}")
    products = products_of(features.dtype, precision)
    choice = choice or choose_second_tile(classes, heads, products, aligned(features))
    if choice is None or classes > choice.tile.classes:
        raise ValueError(
            f"mean_grad {tuple(mean_grad.shape)} is beyond the tiles for {products} products: "
            f"no tile holds C = {classes}"
        )
    if rows == 0:
        return
    tile = choice.tile
    heads_a_tile, lanes, groups = groups_of(classes, heads, tile)
    stored = residual if isinstance(residual, Tensor) else None
    with torch.cuda.device_of(features):
        few_classes_second_kernel[(groups * triton.cdiv(rows, tile.rows),)](
            features,
            made.weight if made else None,
            made.bias if made else None,
            made.labels if made else None,
            made.sample_weight if made else None,
            stored,
            mean_grad,
            mean_bias_grad,
            counted,
            feature_sqnorm,
            count if products == "bf16" else None,
            out,
            rows=rows,
            target_stride=made.labels.stride(0) if made else 0,
            residual_stride=0 if stored is None else stored.stride(0),
            head_stride=out.stride(0),
            ignore_index=made.ignore_index if made else 0,
            smoothing=made.label_smoothing if made else 0.0,
            HEADS=heads,
            CLASSES=classes,
            DIM=dim,
            FEATURE_STRIDE=features.stride(0),
            BLOCK_ROWS=tile.rows,
            HEADS_A_TILE=heads_a_tile,
            LANES=lanes,
            BLOCK_DIM=tile.dim,
            LOSS=kind_of(made.loss, made.labels) if made else "ids",
            SMOOTH=made is not None and made.label_smoothing != 0.0,
            ROUND=products == "bf16",
            PRECISION=input_precision(precision),
            UPCAST=interpreted(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )


def _check_second(
    features: Tensor,
    residual: Tensor | Recompute,
    mean_grad: Tensor,
    mean_bias_grad: Tensor | None,
) -> tuple[int, int, int, int]:
    """Return (n, K, C, D), or raise ValueError naming what the kernel cannot address."""
    rows, heads, classes, dim = check_heads(
        features, mean_grad, mean_bias_grad, ("mean_grad", "mean_bias_grad")
    )
    device = features.device
    if isinstance(residual, Tensor):
        shape = (rows, heads * classes)
        check_matrix("residual", residual, shape, (torch.float32,), device)
    else:
        check_heads(features, residual.weight, residual.bias)
        if residual.weight.shape != mean_grad.shape:
            raise ValueError(
                f"residual.weight must be {tuple(mean_grad.shape)} like mean_grad; "
                f"got {describe(residual.weight)}"
            )
        check_labels(residual.labels, residual.loss, rows, classes, device)
        weights = residual.sample_weight
        check_vector("residual.sample_weight", weights, rows, torch.float32, device)
    return rows, heads, classes, dim
