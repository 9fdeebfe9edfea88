"""Launch of the kernels for few classes: tiles, slabs, checks, pointers, strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moso_fast.problem import STATUS_SLOTS

from .few_classes_first import few_classes_first_kernel
from .operands import (
    FLOAT_DTYPES,
    aligned,
    check_matrix,
    check_vector,
    describe,
    input_precision,
    interpreted,
)
from .tiles import Tile

LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")

# Rows of one float32 partial: rounding of equal rows does not average out.
_MOST_ROWS = {"highest": 2048, "high": 8192, "medium": 8192}
# Slabs come in multiples of two for every multiprocessor of an H100 or H200. A constant: the
# result does not depend on the GPU.
_SLABS = 264


class RowOutputs(NamedTuple):
    """What the first pass writes of n rows under K heads; unit stride along the rows.

    ``loss``, ``residual_sqnorm``, ``margin``, ``entropy``: (K, n) float32 of one head stride;
    ``feature_sqnorm``: (n,) float32, 0 where the features are not finite; ``counted``: (n,) bool.
    """

    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    feature_sqnorm: Tensor
    counted: Tensor


class GradientSums(NamedTuple):
    """Sums over the rows, float64: ``grad`` (K, C, D) and ``bias`` (K, C)."""

    grad: Tensor
    bias: Tensor


class Choice(NamedTuple):
    """A tile and what it is for: ``products`` of the operands, rows ``aligned`` to 16 bytes."""

    products: str  # "bf16", "tf32" or "tf32x3"
    aligned: bool
    tile: Tile


# By the compiler's figures, not yet by a clock: none spills on sm_80, sm_90 and sm_100. A tile of
# features stays in registers from one product to the next, which bounds rows x D. Two stages:
# the next tile is asked for before this one is worked on.
FIRST_TILES: tuple[Choice, ...] = ()


def products_of(dtype: torch.dtype, precision: str) -> str:
    """Return how features of this dtype are multiplied: ``"bf16"``, ``"tf32"`` or ``"tf32x3"``."""
    if dtype == torch.bfloat16 and precision == "medium":
        return "bf16"
    return input_precision(precision)


def choose_first_tile(
    classes: int,
    heads: int,
    dim: int,
    products: str,
    aligned: bool = True,
    shared_bytes: int = 232_448,
) -> Tile | None:
    """Return the tile of the first pass, or None where no shipped tile holds C and D.

    Of the tiles for these products that hold a row of features, a row of logits, and fit
    ``shared_bytes`` a block (what the GPU offers; 227 KiB on compute capability 9.0), the one
    that takes all heads in the fewest groups; then the narrowest, then the smallest.
    """
    fitting = [
        c.tile
        for c in FIRST_TILES
        if (c.products, c.aligned) == (products, aligned)
        and classes <= c.tile.classes
        and dim <= c.tile.dim
        and c.tile.shared_bytes <= shared_bytes
    ]
    return min(
        fitting,
        key=lambda t: (_groups(classes, heads, t)[2], t.dim, t.classes, t.shared_bytes),
        default=None,
    )


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
    tile: Tile | None = None,
) -> GradientSums:
    """Write the statistics of every row and return the sums of the gradients, in one read of H.

    Equals, but for rounding, with ``moso_fast.losses.row_statistics``::

        logits = torch.einsum("nd,kcd->nkc", features, weight) + bias
        stats = row_statistics(logits, labels, loss=loss, ...)   # 0 for rows that do not count
        GradientSums(torch.einsum("nkc,nd->kcd", stats.residual, features), stats.residual.sum(0))

    A row does not count where its label is ``ignore_index`` or, with ``exclude_nonfinite``, where
    a feature is not finite. Such rows, and rows that the status reports, have residual 0 and NaN
    statistics; they may hold anything.

    Allocates the result and S float32 partials, S (K C) (D + 1) numbers, where S is 264 times the
    least number that keeps a slab within 2048 rows (``"highest"``) or 8192. Never synchronises.

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
    tile
        One of ``FIRST_TILES``, or None for ``choose_first_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above, or a C or D that no tile holds.
    """
    rows, heads, classes, dim = check_operands(features, weight, bias, labels, loss, precision)
    _check_outputs(out, status, residual, rows, heads, classes, features.device)
    check_vector("sample_weight", sample_weight, rows, torch.float32, features.device)
    products = products_of(features.dtype, precision)
    if tile is None:
        tile = choose_first_tile(classes, heads, dim, products, aligned(features))
    if tile is None or classes > tile.classes or dim > tile.dim:
        raise ValueError(
            f"weight {tuple(weight.shape)} is beyond the tiles for {products} products: no tile "
            f"holds C = {classes} and D = {dim}"
        )
    heads_a_tile, lanes, groups = _groups(classes, heads, tile)
    length = slab_rows(rows, tile.rows, precision)
    slabs = triton.cdiv(rows, length)
    grad_partials = torch.empty(slabs, heads, classes, dim, device=features.device)
    bias_partials = torch.empty(slabs, heads, classes, device=features.device)
    if rows:
        with torch.cuda.device_of(features):
            few_classes_first_kernel[(groups, slabs)](
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
                PREFETCH=tile.num_stages > 1,
                ROUND=products == "bf16",
                PRECISION=input_precision(precision),
                UPCAST=interpreted(),
                num_warps=tile.num_warps,
                num_stages=1,  # the kernel prefetches by itself
                enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
            )
    return GradientSums(
        grad_partials.sum(0, dtype=torch.float64), bias_partials.sum(0, dtype=torch.float64)
    )


def slab_rows(rows: int, step: int, precision: str) -> int:
    """Rows of a slab: a multiple of ``step``, so many that rounding and balance allow it."""
    slabs = _SLABS * max(1, triton.cdiv(rows, _SLABS * _MOST_ROWS[precision]))
    return step * max(1, triton.cdiv(rows, slabs * step))


def kind_of(loss: str, labels: Tensor) -> str:
    """Return what row_losses.py calls this loss with these labels."""
    if loss == "cross_entropy":
        return "ids" if labels.dim() == 1 else "soft"
    return "binary" if loss == "binary_cross_entropy" else "squared"


def _groups(classes: int, heads: int, tile: Tile) -> tuple[int, int, int]:
    """Heads side by side in a tile, lanes of each, and groups of heads."""
    if heads == 1:
        return 1, tile.classes, 1
    together = tile.classes // triton.next_power_of_2(classes)
    together = min(together, triton.next_power_of_2(heads))
    return together, tile.classes // together, triton.cdiv(heads, together)


def check_operands(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: str,
    precision: str,
) -> tuple[int, int, int, int]:
    """Return (n, K, C, D), or raise ValueError naming what the kernels cannot address."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    input_precision(precision)
    device = features.device
    check_matrix("features", features, (None, None), FLOAT_DTYPES, device)
    rows, dim = features.shape
    if weight.dim() != 3 or 0 in weight.shape or weight.shape[2] != dim:
        raise ValueError(f"weight must be (K, C, {dim}) float32; got {describe(weight)}")
    heads, classes, _ = weight.shape
    for name, value, shape in (("weight", weight, weight.shape), ("bias", bias, (heads, classes))):
        if value is None:
            continue
        if value.shape != shape or value.dtype != torch.float32 or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {tuple(shape)} float32; got {describe(value)}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on {device} with features, got {value.device}")
    ids = loss == "cross_entropy" and labels.dim() == 1
    expected = (rows,) if ids else (rows, classes)
    if tuple(labels.shape) != expected or labels.is_complex():
        raise ValueError(f"labels must have shape {expected} for {loss}; got {describe(labels)}")
    if ids and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels of shape (n,) must be integers; got {describe(labels)}")
    if rows > 1 and labels.shape[-1] > 1 and labels.stride(-1) != 1:
        raise ValueError(
            f"labels must have unit stride along their last axis; got {labels.stride()}"
        )
    if labels.device != device:
        raise ValueError(f"labels must be on {device} with features, got {labels.device}")
    return rows, heads, classes, dim


def _check_outputs(
    out: RowOutputs,
    status: Tensor,
    residual: Tensor | None,
    rows: int,
    heads: int,
    classes: int,
    device: torch.device,
) -> None:
    for name, value in list(out._asdict().items())[:4]:
        if value.shape != (heads, rows) or value.dtype != torch.float32:
            raise ValueError(f"out.{name} must be {(heads, rows)} float32; got {describe(value)}")
        if (rows > 1 and value.stride(1) != 1) or value.stride(0) != out.loss.stride(0):
            raise ValueError(
                f"out.{name} must have unit row stride and the head stride of out.loss; "
                f"got strides {value.stride()}"
            )
        if value.device != device:
            raise ValueError(f"out.{name} must be on {device} with features, got {value.device}")
    check_vector("out.feature_sqnorm", out.feature_sqnorm, rows, torch.float32, device)
    check_vector("out.counted", out.counted, rows, torch.bool, device)
    check_vector("status", status, STATUS_SLOTS, torch.int64, device)
    if residual is not None:
        dtypes = (torch.float32,)
        check_matrix("residual", residual, (rows, heads * classes), dtypes, device)
        if rows > 1 and residual.stride(0) < residual.shape[1]:
            raise ValueError(f"residual must have rows apart, got strides {residual.stride()}")
