"""Runs the rows kernel of one wide head in guarded buffers and compares with float64."""

from __future__ import annotations

from typing import Any

import torch
from alignment_support import cut
from few_classes_support import (
    FIELDS,
    assert_close,
    draw_heads,
    guarded_arguments,
    guarded_outputs,
    reference,
)
from moso_fast.kernels import row_tiles as module
from moso_fast.kernels.operands import products_of
from moso_fast.kernels.row_tiles import row_tiles, stored_columns
from moso_fast.kernels.tiles import Tile
from torch import Tensor

from moso_fast.core.status import STATUS_SLOTS

# The gradient sum is another kernel's.
OURS = tuple(name for name in FIELDS if name != "grad")
SMALL = Tile(16, 16, 16, 4, 1, 255, 1, "HMMA")


def draw(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    loss: str = "cross_entropy",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight and bias of one head, labels; weights that bfloat16 holds exactly."""
    rows, classes, dim = shape
    features, weight, bias, labels = draw_heads((rows, 1, classes, dim), generator, dtype, loss)
    return features, cut(weight), bias, labels


def run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    status: Tensor | None = None,
    **options: Any,
) -> dict[str, Any]:
    """First pass in guarded buffers: the fields, ``lost``, ``counted`` and ``status`` (a list).

    ``stored`` are the residuals as they lie, ``residual`` those of the classes.
    """
    rows, classes = features.shape[0], weight.shape[1]
    out = guarded_outputs(rows, 1)
    if status is None:
        status = torch.full((STATUS_SLOTS,), rows, dtype=torch.int64)
    inputs = [features, weight, bias, labels, options.get("sample_weight")]
    before = [None if value is None else value.clone() for value in inputs]
    with guarded_arguments(module, "row_tiles_kernel", (11, 12, 13)):
        made = row_tiles(features, weight, bias, labels, out=out.rows, status=status, **options)
    for given, copy in zip(inputs, before, strict=True):
        assert given is None or torch.equal(given.nan_to_num(3.0), copy.nan_to_num(3.0))
    assert all(guard.intact() for guard in out.guards), "wrote outside an output"
    products = products_of(features.dtype, options.get("precision", "highest"))
    assert made.residual.shape == (rows, stored_columns(classes, products))
    assert not made.residual[:, classes:].any()  # zeros, and no NaN, behind the classes
    fields = {name: value.clone() for name, value in out.rows._asdict().items()}
    return fields | {
        "stored": made.residual,
        "residual": made.residual[:, None, :classes].float(),
        "lost": made.lost,
        "bias": made.bias[None],
        "status": status.tolist(),
    }


def check(result: dict[str, Any], *args: Any, loosely: float = 1.0, **options: Any) -> None:
    """Compare with float64; residuals that are stored rounded by what the rounding may take."""
    stored = result["stored"]
    if stored.dtype == torch.float32:
        assert result["lost"] is None
        assert_close(result, *args, loosely=loosely, fields=OURS, **options)
        return
    others = tuple(name for name in OURS if name != "residual")
    assert_close(result, *args, loosely=loosely, fields=others, **options)
    exact = reference(*args, **options)["residual"][:, 0]
    narrow = stored[:, : exact.shape[1]].double()
    # The interpreter cuts digits off: less than 2^-7 of a number.
    assert bool(((narrow - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all())
    lost = exact.square().sum(1) - narrow.square().sum(1)
    error = (result["lost"].double() - lost).abs()
    assert bool((error <= 1e-5 * loosely * exact.square().sum(1) + 1e-12).all())
