"""Dots of rows against float64: strides, columns to add, rows that do not count, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from far_memory import Sparse, each_written_once, walled
from moso_fast.kernels.row_norms import OwnTerm, row_dots
from residual_support import Guarded
from row_norms_support import BF16, COLUMNS, DTYPES, ROWS, SHAPES
from torch import Tensor


def own_term(rows: int, generator: torch.Generator, count: int = 7) -> OwnTerm:
    norms, lost = torch.rand(2, rows, generator=generator)
    return OwnTerm(norms, torch.tensor(count), lost)


def dots(
    left: Tensor, right: Tensor, own: OwnTerm, counted: Tensor | None = None, **options: Any
) -> Tensor:
    """Run ``row_dots`` into a guarded, NaN-filled vector, writing every number once."""
    rows = left.shape[0]
    out = Guarded(1, rows, rows)
    out.view.fill_(torch.nan)
    counted = torch.ones(rows, dtype=torch.bool) if counted is None else counted
    with each_written_once():
        row_dots(left, right, out.view[0], counted, own, **options)
    assert out.intact(), "wrote outside the output"
    return out.view[0].clone()


def check_dots(
    found: Tensor,
    left: Tensor,
    right: Tensor,
    own: OwnTerm,
    counted: Tensor | None = None,
    shift: Tensor | None = None,
    extra: Tensor | None = None,
) -> None:
    """Compare with float64, to what float32 sums of so large terms may lose."""
    x = left.double() + (0 if shift is None else shift.double())
    terms = x * right.double()
    rest = own.lost.double() * own.feature_sqnorm.double() / max(1, int(own.count))
    size = terms.abs().sum(1) + rest.abs()
    exact = terms.sum(1) + rest
    if extra is not None:
        exact, size = exact + extra.double().sum(1), size + extra.double().abs().sum(1)
    if counted is not None:
        exact, size = torch.where(counted, exact, 0), torch.where(counted, size, 0)
    assert bool(((found.double() - exact).abs() <= 3e-7 * size).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_dots(shape: tuple[int, int], dtype: torch.dtype, generator) -> None:
    left = torch.randn(shape, generator=generator)
    right = torch.randn(shape, generator=generator).to(dtype)
    shift, own = torch.randn(shape[1], generator=generator), own_term(shape[0], generator)
    check_dots(dots(left, right, own), left, right, own)
    check_dots(dots(left, right, own, shift=shift), left, right, own, shift=shift)


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_row_dots_add_columns_in_the_rows_of_the_left(columns: int, generator) -> None:
    """As they come with R [G | gb]: the product, a few columns more, and some of no meaning."""
    rows, dim = 2 * ROWS + 3, COLUMNS + 5
    wide = torch.full((rows, dim + 8), torch.nan)
    wide[:, : dim + columns] = torch.randn(rows, dim + columns, generator=generator)
    left, extra = wide[:, :dim], wide[:, dim : dim + columns]
    right = torch.randn(rows, dim, generator=generator).to(BF16)
    own, counted = own_term(rows, generator), torch.arange(rows) % 3 != 1
    found = dots(left, right, own, counted, extra=extra)
    check_dots(found, left, right, own, counted, extra=extra)
    shift = torch.randn(dim, generator=generator)
    found = dots(left, right, own, counted, extra=extra, shift=shift)
    check_dots(found, left, right, own, counted, shift, extra)
    one = dots(left[:1], right[:1], OwnTerm(own[0][:1], own[1], own[2][:1]), extra=extra[:1])
    check_dots(one, left[:1], right[:1], OwnTerm(own[0][:1], own[1], own[2][:1]), extra=extra[:1])


def test_row_dots_restore_what_rounding_took(generator: torch.Generator) -> None:
    """|r|^2 |h|^2 / N of what the stored residual lacks; no row that counts is as good as one."""
    left = right = torch.zeros(5, 3)
    own = own_term(5, generator)
    torch.testing.assert_close(dots(left, right, own), own.lost * own.feature_sqnorm / 7)
    none = own._replace(count=torch.tensor(0))
    torch.testing.assert_close(dots(left, right, none), own.lost * own.feature_sqnorm)


def test_row_dots_of_rows_that_do_not_count(generator: torch.Generator) -> None:
    """They are 0, whatever stands there."""
    rows, dim = 2 * ROWS + 1, 37
    wide = torch.randn(rows, dim + 8, generator=generator)
    right = torch.randn(rows, dim, generator=generator).to(BF16)
    own, counted = own_term(rows, generator), torch.arange(rows) % 5 != 0
    for values in (wide, right, own.feature_sqnorm, own.lost):
        values[~counted] = math.nan
    right[::10] = math.inf
    counted[::10] = False
    left, extra = wide[:, :dim], wide[:, dim : dim + 2]
    shift = torch.randn(dim, generator=generator)
    found = dots(left, right, own, counted, shift=shift, extra=extra)
    assert not found[~counted].any() and bool(found[counted].isfinite().all())
    kept = OwnTerm(own.feature_sqnorm[counted], own.count, own.lost[counted])
    given = left[counted], right[counted], kept
    check_dots(found[counted], *given, None, shift, extra[counted])


def test_row_dots_of_strided_and_expanded_rows(generator: torch.Generator) -> None:
    left = torch.full((40, 50), torch.nan)
    left[:, 3:40] = torch.randn(40, 37, generator=generator)
    right = torch.full((80, 41), torch.nan, dtype=BF16)
    right[::2, 1:38] = torch.randn(40, 37, generator=generator).to(BF16)
    own = own_term(40, generator)
    pairs = [(left[:, 3:40], right[::2, 1:38]), (left[:1, 3:40].expand(40, 37), right[::2, 1:38])]
    pairs.append((left[:, 3:40], right[:1, 1:38].expand(40, 37)))
    for x, y in pairs:
        check_dots(dots(x, y, own), x, y, own)


def test_row_dots_of_far_rows(generator: torch.Generator) -> None:
    far, other = Sparse(7), Sparse(7, BF16)
    for sparse in (far, other):
        sparse.fill(torch.randn(3, 7, generator=generator))
    own = own_term(3, generator)
    found = dots(far.matrix(), other.matrix(), own)
    check_dots(found, far.stacked(), other.stacked(), own)
    close = other.stacked()
    matrix = far.matrix()
    found = dots(matrix[:, :5], close[:, :5], own, extra=matrix[:, 5:])
    check_dots(found, far.stacked()[:, :5], close[:, :5], own, extra=far.stacked()[:, 5:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_dots_read_nothing_beyond_their_operands(shape: tuple[int, int], generator) -> None:
    left, right = (walled(torch.randn(shape, generator=generator)) for _ in range(2))
    shift = walled(torch.randn(shape[1], generator=generator))
    own = own_term(shape[0], generator)
    own = OwnTerm(walled(own.feature_sqnorm), own.count, walled(own.lost))
    counted = torch.ones(shape[0], dtype=torch.bool)
    check_dots(dots(left, right, own, counted, shift=shift), left, right, own, shift=shift)


def test_row_dots_of_no_rows(generator: torch.Generator) -> None:
    out = torch.empty(0)
    row_dots(torch.empty(0, 5), torch.empty(0, 5), out, out.bool(), own_term(0, generator))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("left", torch.zeros(4, 6).to(BF16), "left must be"),
        ("left", torch.zeros(6, 4).T, "left must have unit column stride"),
        ("right", torch.zeros(4, 5), "right must be"),
        ("right", torch.zeros(4, 6).double(), "right must be"),
        ("right", torch.zeros(6, 4).T, "right must have unit column stride"),
        ("out", torch.zeros(4, dtype=BF16), "out must be"),
        ("out", torch.zeros(8)[::2], "out must be"),
        ("counted", torch.ones(4), "counted must be"),
        ("own", OwnTerm(torch.zeros(3), torch.tensor(1), torch.zeros(4)), "own.feature_sqnorm"),
        ("own", OwnTerm(torch.zeros(4), torch.tensor(1), torch.zeros(5)), "own.lost must be"),
        ("own", OwnTerm(torch.zeros(4), torch.tensor(1.0), torch.zeros(4)), "own.count must be"),
        ("own", OwnTerm(torch.zeros(4), torch.ones(1).long(), torch.zeros(4)), "own.count must"),
        ("shift", torch.zeros(5), "shift must be"),
        ("shift", torch.zeros(6).double(), "shift must be"),
        ("extra", torch.zeros(3, 2), "extra must be"),
        ("extra", torch.zeros(4, 2), "extra must have the row stride of left"),
        ("right", torch.zeros(4, 6, device="meta"), "right must be on cpu"),
    ],
)
def test_row_dots_refuse_other_arguments(name: str, value: Any, message: str) -> None:
    given = {
        "left": torch.zeros(4, 6),
        "right": torch.zeros(4, 6),
        "out": torch.full((4,), 3.0),
        "counted": torch.ones(4, dtype=torch.bool),
        "own": OwnTerm(torch.zeros(4), torch.tensor(1), torch.zeros(4)),
        name: value,
    }
    with pytest.raises(ValueError, match=message) as caught:
        row_dots(**given)
    assert "\n" not in str(caught.value)
    assert name == "out" or bool((given["out"] == 3.0).all())
