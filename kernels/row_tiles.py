"""First pass for one head of up to 256 classes: logits, residuals, statistics from one read of H.

The kernel and its algorithm are in row_tiles_kernel.py; here are its tiles, the checks, the launch.
The gradient sum is left to gradient_sum.py, which reads the stored residuals and H again: the sum
over C x D of a wide head does not fit the registers beside the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .operands import (
    aligned,
    capability_major,
    check_matrix,
    check_vector,
    describe,
    input_precision,
    interpreted,
    products_of,
)
from .row_arguments import RowOutputs, check_heads, check_labels, check_outputs, kind_of
from .row_tiles_kernel import row_tiles_kernel
from .tiles import Tile


class Choice(NamedTuple):
    """A tile and what it is for: ``products``, rows ``aligned`` to 16 bytes, capabilities, losses.

    ``losses``: what row_losses.py calls them.
    """

    products: str  # "bf16", "tf32" or "tf32x3"
    aligned: bool
    tile: Tile
    majors: tuple[int, ...] = (8, 9, 10)  # compute capabilities: none spills there
    losses: tuple[str, ...] = ("ids", "soft", "binary", "squared")


# Of those for the same operands the first that holds all classes is taken: the quickest on an H200
# of those that spill no register with any Triton from 3.6 on. Tiles of 64 rows and more: Triton 3.6
# cannot compile the bfloat16 ones for sm_100.
_OLDER = (8, 9)
TILES = (
    Choice("bf16", True, Tile(64, 16, 64, 4, 4, 144, 40_992, "HGMMA"), _OLDER),
    Choice("bf16", True, Tile(32, 16, 64, 4, 4, 128, 24_576, "HMMA")),
    Choice("bf16", True, Tile(64, 32, 64, 4, 4, 248, 49_184, "HGMMA"), _OLDER),
    Choice("bf16", True, Tile(64, 64, 64, 4, 4, 255, 65_568, "HGMMA"), (9,), ("ids",)),
    Choice("bf16", True, Tile(32, 64, 64, 8, 4, 128, 36_864, "HMMA")),
    Choice("bf16", True, Tile(32, 128, 64, 8, 4, 224, 61_440, "HMMA")),
    Choice("bf16", True, Tile(16, 256, 64, 16, 3, 128, 69_632, "HMMA")),
    Choice("bf16", False, Tile(16, 16, 32, 4, 3, 96, 24_576, "HMMA")),
    Choice("bf16", False, Tile(32, 32, 32, 8, 3, 80, 24_576, "HMMA")),
    Choice("bf16", False, Tile(32, 64, 32, 8, 3, 128, 24_576, "HMMA")),
    Choice("bf16", False, Tile(32, 128, 32, 8, 3, 232, 24_576, "HMMA")),
    Choice("tf32x3", True, Tile(64, 16, 32, 4, 3, 128, 24_584, "HGMMA")),
    Choice("tf32x3", True, Tile(32, 64, 32, 16, 3, 128, 24_576, "HMMA")),
    Choice("tf32x3", True, Tile(32, 128, 32, 16, 3, 128, 40_960, "HMMA")),
    Choice("tf32x3", False, Tile(32, 32, 32, 4, 2, 216, 24_576, "HMMA")),
    Choice("tf32x3", False, Tile(32, 64, 32, 16, 2, 128, 24_576, "HMMA")),
    Choice("tf32x3", False, Tile(32, 128, 32, 16, 2, 128, 24_576, "HMMA")),
    Choice("tf32", True, Tile(32, 16, 32, 4, 3, 128, 24_576, "HMMA")),
    Choice("tf32", True, Tile(32, 64, 32, 8, 3, 128, 24_576, "HMMA")),
    Choice("tf32", True, Tile(32, 128, 32, 16, 3, 128, 40_960, "HMMA")),
    Choice("tf32", False, Tile(32, 32, 32, 4, 2, 128, 24_576, "HMMA")),
)


def stored_columns(classes: int, products: str) -> int:
    """Columns of the stored residuals: C rounded up to what keeps rows at multiples of 16 bytes."""
    step = 8 if products == "bf16" else 4
    return step * triton.cdiv(classes, step)


def choose_tile(
    classes: int,
    products: str,
    aligned: bool = True,
    shared_bytes: int = 232_448,
    major: int = 9,
    loss: str = "ids",
) -> Tile | None:
    """Return the first tile for these operands and this loss that holds C classes, or None."""
    fitting = (
        choice.tile
        for choice in TILES
        if (choice.products, choice.aligned) == (products, aligned)
        and major in choice.majors
        and loss in choice.losses
        and classes <= choice.tile.classes
        and choice.tile.shared_bytes <= shared_bytes
    )
    return next(fitting, None)


class RowTiles(NamedTuple):
    """What the first pass leaves for the products.

    ``residual`` (n, ``stored_columns``), bfloat16 where operands are, else float32, zeros behind
    the classes; ``lost`` (n,) float32, |r|^2 less that of the stored residual, or None where
    nothing is rounded; ``bias`` (C,) float64, sum of the unrounded residuals.
    """

    residual: Tensor
    lost: Tensor | None
    bias: Tensor


def row_tiles(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    out: RowOutputs,
    status: Tensor,
    first_row: int = 0,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    exclude_nonfinite: bool = False,
    precision: str = "highest",
    tile: Tile | None = None,
) -> RowTiles:
    """Write the statistics of every row and return its residuals, in one read of H.

    Equals, but for rounding, with ``moso_fast.core.losses.row_statistics``::

        stats = row_statistics(features @ weight.T + bias, labels, loss=loss, ...)
        RowTiles(stats.residual, ..., stats.residual.sum(0))    # 0 for rows that do not count

    A row does not count where its label is ``ignore_index`` or, with ``exclude_nonfinite``, where
    a feature is not finite. Such rows, and rows that the status reports, have residual 0 and NaN
    statistics; they may hold anything.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride.
    weight
        (1, C, D) float32, contiguous.
    bias
        (1, C) float32, contiguous, or None.
    labels
        (n,) integer class ids, contiguous; or (n, C) targets of any real dtype with unit column
        stride: probabilities for ``"cross_entropy"``, the only form for the other losses.
    out, status, first_row
        As in ``few_classes.few_classes_first``.
    loss, label_smoothing, ignore_index
        As in ``moso_fast.last_layer_stats``.
    sample_weight
        (n,) float32, contiguous: factors on loss and residual.
    exclude_nonfinite
        Whether rows with non-finite features are left out rather than reported.
    precision
        ``"highest"``, ``"high"``: float32-accurate products. ``"medium"``: bfloat16 features
        multiply weights rounded to bfloat16, others multiply as tf32.
    tile
        A tile of ``TILES``, or None for ``choose_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above, or a C that no tile holds.
    """
    rows, heads, classes, dim = check_heads(features, weight, bias)
    if heads != 1:
        raise ValueError(f"weight must be of one head, (1, C, D); got {describe(weight)}")
    check_labels(labels, loss, rows, classes, features.device)
    check_outputs(out, status, None, rows, heads, classes, features.device)
    check_matrix("out.loss", out.loss, (1, rows), (torch.float32,), features.device)
    check_vector("sample_weight", sample_weight, rows, torch.float32, features.device)
    products = products_of(features.dtype, precision)
    rounded = products == "bf16"
    if tile is None:
        major = capability_major(features.device)
        kind = kind_of(loss, labels)
        tile = choose_tile(classes, products, aligned(features), major=major, loss=kind)
    if tile is None or classes > tile.classes:
        raise ValueError(
            f"weight {tuple(weight.shape)} is beyond the tiles for {products} products: no tile "
            f"holds C = {classes}"
        )
    columns = stored_columns(classes, products)
    device, dtype = features.device, torch.bfloat16 if rounded else torch.float32
    programs = triton.cdiv(rows, tile.rows)
    residual = torch.empty(rows, columns, dtype=dtype, device=device)
    lost = torch.empty(rows, device=device) if rounded else None
    bias_partials = torch.empty(programs, classes, device=device)
    if rows:
        with torch.cuda.device_of(features):
            row_tiles_kernel[(programs,)](
                features,
                weight.to(dtype),
                bias,
                labels,
                sample_weight,
                *out,
                residual,
                lost,
                bias_partials,
                status,
                rows=rows,
                first_row=first_row,
                target_stride=labels.stride(0),
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                CLASSES=classes,
                COLUMNS=columns,
                DIM=dim,
                FEATURE_STRIDE=features.stride(0),
                BLOCK_ROWS=tile.rows,
                LANES=tile.classes,
                BLOCK_DIM=tile.dim,
                LOSS=kind_of(loss, labels),
                SMOOTH=label_smoothing != 0.0,
                EXCLUDE=exclude_nonfinite,
                ROUND=rounded,
                PRECISION=input_precision(precision),
                UPCAST=interpreted(),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
            )
    return RowTiles(residual, lost, bias_partials.sum(0, dtype=torch.float64))
