"""float32-accurate products on tensor cores that cut sums off: within 1e-5 where it is worst.

Worst are sums of equal terms, whose cuts all point the same way: over slabs as long as they come,
over wide features, over many classes.
"""

from __future__ import annotations

from typing import Any

import few_classes_support
import numpy as np
import pytest
import torch
from alignment_support import BF16, dots, launch_stored
from few_classes_support import run_second as second_pass
from moso_fast.kernels import (
    few_classes_tiles,
    gradient_sum,
    row_tiles,
    stacked_alignment,
    stored_alignment,
)
from moso_fast.kernels.few_classes import Recompute
from moso_fast.kernels.few_classes_tiles import FIRST_TILES, SECOND_TILES
from moso_fast.kernels.tiles import Tile
from residual_support import reference
from row_tiles_support import run as rows_pass
from stacked_support import Job
from torch import Tensor
from truncating import tensor_cores, three_products

CONTRACT = 1e-5
ENDLESS = 2**40  # rows: slabs are as long as they may be
WIDE = 8192  # columns, or classes


def relative(got: Any, exact: Tensor) -> float:
    """Largest error of a tensor as a whole, |got - exact| / |exact|."""
    return float((torch.as_tensor(got).double() - exact).norm() / exact.norm())


def exact_kind(choices: tuple) -> list:
    """Tiles for float32-accurate products under float32 features, and one under others."""
    kind = [
        choice
        for choice in choices
        if getattr(choice, "products", "tf32x3") == "tf32x3"
        and not getattr(choice, "rounded", False)
    ]
    pairs = [*((choice, torch.float32) for choice in kind), (kind[0], torch.float16)]
    return [
        pytest.param(choice, dtype, id=f"{choice.tile.classes}x{choice.tile.dim}-{dtype}")
        for choice, dtype in [*pairs, (kind[0], BF16)]
    ]


def same(rows: int, columns: int, generator: torch.Generator, dtype=torch.float32) -> Tensor:
    """Return equal rows, all behind one address."""
    return torch.randn(1, columns, generator=generator).to(dtype).expand(rows, columns)


def even(rows: int, columns: int, generator: torch.Generator, dtype=torch.float32) -> Tensor:
    """Return rows of equal positive numbers: every term of a sum over columns is the same."""
    values = 1 + torch.rand(rows, 1, generator=generator)
    return values.to(dtype).repeat(1, columns)


@pytest.mark.parametrize(
    ("rows", "carried", "expected"),
    [(2048, True, 1.6e-5), (512, True, 3.6e-6), (2048, False, 5.1e-7), (512, False, 1.6e-7)],
)
def test_the_model_alone(rows: int, carried: bool, expected: float) -> None:
    """What equal rows cost, 32 at a time: much where the sum stays in the tensor cores."""
    errors = []
    for seed in range(4):
        draw = np.random.default_rng(seed).standard_normal
        left, right = (draw((size, 1)).astype(np.float32).repeat(32, 1) for size in (16, 32))
        sums = np.zeros((16, 32), np.float32)
        for _ in range(rows // 32):
            sums = three_products(left, right.T, sums, carried=carried)
        exact = rows * (left[:, :1].astype(np.float64) @ right[:, :1].T.astype(np.float64))
        errors.append(np.linalg.norm(sums - exact) / np.linalg.norm(exact))
    assert np.mean(errors) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(("choice", "dtype"), exact_kind(gradient_sum.TILES))
def test_gradient_sum_of_equal_rows(choice, dtype, precision: str, generator) -> None:
    rows = gradient_sum.slab_rows(ENDLESS, 1, choice.tile.rows, precision)
    residual, features = same(rows, 17, generator), same(rows, 33, generator, dtype)
    out = gradient_sum.PartialSums(torch.empty(1, 17, 33), torch.empty(1, 17))
    with tensor_cores() as seen:
        gradient_sum.partial_sums(residual, features, None, out, 0, rows, choice.tile, precision)
    assert set(seen) == {"TF32x3"}
    exact = rows * torch.outer(residual[0].double(), features[0].double())
    assert relative(out.grad[0], exact) < CONTRACT
    assert relative(out.bias[0], rows * residual[0].double()) < CONTRACT


@pytest.mark.parametrize(("choice", "dtype"), exact_kind(FIRST_TILES))
def test_few_classes_first_of_equal_rows(choice, dtype, generator, monkeypatch) -> None:
    monkeypatch.setattr(few_classes_tiles, "_SLABS", 1)
    dim = choice.tile.dim
    precision = "high" if dtype == BF16 else "highest"  # four times as many rows: once is enough
    rows = few_classes_tiles.slab_rows(ENDLESS, choice.tile.rows, precision)
    features, bias = same(rows, dim, generator, dtype), torch.randn(1, 10, generator=generator)
    weight = torch.randn(1, 10, dim, generator=generator) * 2.5 / dim**0.5
    given = (features, weight, bias, torch.zeros(rows, dtype=torch.int64))
    with tensor_cores() as seen:
        result = few_classes_support.run(*given, choice=choice, precision=precision)
    assert set(seen) == {"TF32x3"}
    exact = few_classes_support.reference(features[:1], weight, bias, given[3][:1])
    for name in few_classes_support.FIELDS:
        got = result[name]
        if name in ("grad", "bias"):
            got = got / rows
        else:
            got = got[:, :1] if name in few_classes_support.STATISTICS else got[:1]
        assert relative(got, exact[name]) < CONTRACT, name


def wide_job(rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> Job:
    """Features, weights and gradients of which every number along D is the same.

    Gradients have the signs of the residuals, as they have of a mean of equal rows: the dot
    products lose nothing by cancellation.
    """
    job = Job((rows, 1, classes, WIDE), generator, dtype, labels=torch.zeros(rows).long())
    job.features = even(rows, WIDE, generator, dtype)
    job.weight = job.weight[:, :1].repeat(1, WIDE) / WIDE**0.5
    job.grad = even(classes, WIDE, generator) / WIDE
    job.grad[0] *= -1
    job.bias_grad = job.grad[:, 0].contiguous()
    return job


@pytest.mark.parametrize(("choice", "dtype"), exact_kind(row_tiles.TILES))
def test_row_tiles_of_wide_features(choice, dtype, generator) -> None:
    job = wide_job(9, choice.tile.classes, dtype, generator)
    exact = reference(job.logits(), job.labels)
    given = job.features, job.weight[None], job.bias[None], job.labels
    with tensor_cores() as seen:
        result = rows_pass(*given, tile=choice.tile)
    assert set(seen) == {"TF32x3"}
    for name in few_classes_support.STATISTICS:
        assert relative(result[name], exact[name]) < CONTRACT, name
    assert relative(result["residual"], exact["residual"]) < CONTRACT


@pytest.mark.parametrize(("choice", "dtype"), exact_kind(stacked_alignment.TILES))
def test_stacked_alignment_of_wide_features(choice, dtype, generator) -> None:
    job = wide_job(9, choice.tile.classes + 1, dtype, generator)
    exact = job.exact(reference(job.logits(), job.labels)["residual"])
    softmax = job.first_pass()[1]
    with tensor_cores() as seen:
        got = job.second_pass(softmax, tile=choice.tile)
    assert set(seen) == {"TF32x3"}
    assert relative(got, exact) < CONTRACT


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize(("choice", "dtype"), exact_kind(SECOND_TILES))
def test_few_classes_second_of_wide_features(choice, dtype, again: bool, generator) -> None:
    job = wide_job(9, 10, dtype, generator)
    residual = reference(job.logits(), job.labels)["residual"]
    heads = [t.unflatten(0, (1, 10)) for t in (job.weight, job.bias, job.grad, job.bias_grad)]
    given = {
        "features": job.features,
        "residual": residual.float().flatten(1),
        "mean_grad": heads[2],
        "mean_bias_grad": heads[3],
        "counted": torch.ones(9, dtype=torch.bool),
        "feature_sqnorm": job.features.float().square().sum(1),
        "made": Recompute(heads[0], heads[1], job.labels),
    }
    with tensor_cores() as seen:
        got = second_pass(given, again=again, choice=choice)
    assert set(seen) == {"TF32x3"}
    assert relative(got, job.exact(residual)) < CONTRACT


@pytest.mark.parametrize(("choice", "dtype"), exact_kind(stored_alignment.PROJECT_TILES))
def test_projections_of_wide_features(choice, dtype, generator) -> None:
    residual = torch.rand(9, 65, generator=generator)
    check_stored(even(9, WIDE, generator, dtype), residual, even(65, WIDE, generator), choice.tile)


@pytest.mark.parametrize(("choice", "dtype"), exact_kind(stored_alignment.PULL_TILES))
def test_gradients_pulled_back_over_many_classes(choice, dtype, generator) -> None:
    features = torch.rand(9, 40, generator=generator).to(dtype)
    grad = even(40, WIDE, generator).T.contiguous()
    check_stored(features, even(9, WIDE, generator), grad, choice.tile)


def check_stored(features: Tensor, residual: Tensor, grad: Tensor, tile: Tile) -> None:
    order = "pull" if len(grad) == WIDE else "project"
    bias = grad[:, 0].contiguous()
    with tensor_cores() as seen:
        got = launch_stored(features, residual, grad, mean_bias_grad=bias, order=order, tile=tile)
    assert set(seen) == {"TF32x3"}
    assert relative(got, dots(features, residual, grad, bias, 1)) < CONTRACT
