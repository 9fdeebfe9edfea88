"""Inputs, float64 references and bounds that the tests of both alignment kernels share."""

from __future__ import annotations

import torch
from moso_fast.kernels.stored_alignment import stored_alignment
from moso_fast.kernels.tiles import Tile
from residual_support import Guarded
from torch import Tensor

BF16 = torch.bfloat16
SMALL = Tile(16, 16, 16, 4, 2, 255, 65536, "HMMA")


def draw(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return normal numbers that ``dtype`` holds exactly."""
    return torch.randn(shape, generator=generator).to(dtype)


def cut(values: Tensor) -> Tensor:
    """Round to bfloat16 as the interpreter does, towards zero; hardware rounds to the nearest."""
    return (values.float().view(torch.int32) & -65536).view(torch.float32)


def dots(
    features: Tensor,
    residual: Tensor,
    mean_grad: Tensor,
    mean_bias_grad: Tensor | None,
    heads: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """<g_i, G> (K, n) from explicit projections on every class, in ``dtype``."""
    rows = features.shape[0]
    projected = features.to(dtype) @ mean_grad.to(dtype).T
    if mean_bias_grad is not None:
        projected = projected + mean_bias_grad.to(dtype)
    terms = residual.to(dtype) * projected
    return terms.view(rows, heads, -1).sum(-1).T


def guarded_out(heads: int, rows: int, padding: int = 3) -> Guarded:
    """Return a NaN-filled (K, n) output with guards, heads ``padding`` numbers apart."""
    out = Guarded(heads, rows, rows + padding)
    out.view.fill_(torch.nan)
    return out


def assert_dots(
    got: Tensor,
    exact: Tensor,
    features: Tensor,
    residual: Tensor,
    mean_grad: Tensor,
    mean_bias_grad: Tensor | None = None,
) -> None:
    """Compare with float64: at most twice the error of float32 PyTorch, plus a small floor."""
    heads = got.shape[0]
    given = (features, residual, mean_grad, mean_bias_grad)
    own = (dots(*given, heads, torch.float32).double() - dots(*given, heads)).abs()
    scale = dots(*(None if t is None else t.abs() for t in given), heads)
    bound = 2.0 * own.nan_to_num(0.0).amax() + 2e-7 * scale.nan_to_num(0.0) + 1e-30
    error = (got.double() - exact).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


def launch_stored(
    features: Tensor, residual: Tensor, mean_grad: Tensor, heads: int = 1, **options: object
) -> Tensor:
    """Run in a guarded, NaN-filled output; check the guards and that inputs stay as they are."""
    out = guarded_out(heads, features.shape[0])
    inputs = [features, residual, mean_grad]
    before = [t.clone() for t in inputs]
    stored_alignment(features, residual, mean_grad, out.view, **options)
    assert out.intact(), "wrote outside the output"
    for given, copy in zip(inputs, before, strict=True):
        assert torch.equal(given.contiguous().view(torch.uint8), copy.view(torch.uint8))
    return out.view.clone()
