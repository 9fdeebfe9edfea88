"""Norms of rows, rows that are not finite, sums of columns, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from far_memory import Sparse, each_written_once, walled
from few_classes_support import GuardedMask, guarded_arguments
from moso_fast.kernels import row_norms as module
from moso_fast.kernels.row_norms import column_sums, row_norms
from residual_support import Guarded
from row_norms_support import BF16, COLUMNS, DTYPES, ROWS, SHAPES
from torch import Tensor

from moso_fast.core.status import STATUS_FEATURE, STATUS_SLOTS


def run(features: Tensor, counted: Tensor | None = None, **options: Any) -> tuple[Any, ...]:
    """Norms, which rows count, and status, from guarded outputs."""
    rows = features.shape[0]
    norms, mask = Guarded(1, rows, rows), GuardedMask(rows)
    norms.view.fill_(torch.nan)
    mask.view.copy_(torch.ones(rows, dtype=torch.bool) if counted is None else counted)
    status = torch.full((STATUS_SLOTS,), 10_000, dtype=torch.int64)
    row_norms(features, mask.view, norms.view[0], status, **options)
    assert norms.intact() and mask.intact(), "wrote outside an output"
    return norms.view[0].clone(), mask.view.clone(), status.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    features = torch.randn(shape, generator=generator).to(dtype)
    with each_written_once():
        norms, counted, status = run(features, exclude_nonfinite=True)
    exact = features.double().square().sum(1)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    assert bool(counted.all()) and status == [10_000] * 4


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(value: float, exclude: bool, generator) -> None:
    features = torch.randn(3 * ROWS, 2 * COLUMNS + 3, generator=generator)
    given = torch.arange(3 * ROWS) % 7 != 3
    given[2] = False
    bad = [2, ROWS, ROWS + 5, 3 * ROWS - 1]
    features[2, 0] = features[ROWS, -1] = features[ROWS + 5] = features[3 * ROWS - 1, 5] = value
    norms, counted, status = run(features, given, first_row=100, exclude_nonfinite=exclude)
    finite = torch.ones(3 * ROWS, dtype=torch.bool)
    finite[bad] = False
    assert not norms[bad].any()
    exact = features.double().square().sum(1)[finite]
    torch.testing.assert_close(norms[finite].double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(counted, given & finite if exclude else given)
    expected = [10_000] * 4
    if not exclude:  # row 2 does not count: nobody asks what stands there
        expected[STATUS_FEATURE] = 100 + ROWS
    assert status == expected


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_an_overflowing_norm_is_no_bad_feature(dtype: torch.dtype) -> None:
    features = torch.ones(ROWS + 3, 5, dtype=dtype)
    features[4], features[6, 1] = 3e38, torch.inf
    for exclude in (False, True):
        norms, counted, status = run(features, exclude_nonfinite=exclude)
        assert math.isinf(norms[4]) and norms[6] == 0.0 and norms[5] == 5.0
        assert bool(counted[4]) and bool(counted[6]) is not exclude
        assert status[STATUS_FEATURE] == (10_000 if exclude else 6)


def dirty_flag(features: Tensor, counted: Tensor | None = None, **options: Any) -> int:
    """What the kernel leaves of a flag of 0, whose neighbours must stay."""
    flags = torch.tensor([5, 0, 5], dtype=torch.int32)
    without = run(features, counted, **options)
    found = run(features, counted, dirty=flags[1:2], **options)
    for one, other in zip(found, without, strict=True):  # the flag changes nothing else
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert flags[[0, 2]].tolist() == [5, 5]
    return int(flags[1])


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dirty_says_whether_any_row_is_not_finite(dtype, exclude: bool, generator) -> None:
    shape = (3 * ROWS + 1, COLUMNS + 3)
    clean = torch.randn(shape, generator=generator).to(dtype)
    counted = torch.arange(shape[0]) % 2 == 0
    assert dirty_flag(clean, counted, exclude_nonfinite=exclude) == 0
    # Rows that count and rows that do not, in the first tile, in the last one, at either end.
    for row, column in ((0, 0), (1, COLUMNS + 2), (2 * ROWS, 7), (shape[0] - 1, COLUMNS + 2)):
        for value in (math.nan, -math.inf):
            spoiled = clean.clone()
            spoiled[row, column] = value
            assert dirty_flag(spoiled, counted, exclude_nonfinite=exclude) == 1, (row, column)
    assert dirty_flag(clean * math.nan, counted & False, exclude_nonfinite=exclude) == 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_norm_that_overflows_is_not_dirty(dtype: torch.dtype) -> None:
    features = torch.ones(ROWS + 3, 5, dtype=dtype)
    features[4] = 3e38
    assert dirty_flag(features) == 0
    for row in (0, -1):  # in the tile of that row, and in another one
        spoiled = torch.cat([features, features])
        spoiled[row, 2] = torch.inf
        assert dirty_flag(spoiled) == 1


def test_dirty_stays_once_it_is_set() -> None:
    """Chunk after chunk may share it."""
    dirty = torch.ones(1, dtype=torch.int32)
    run(torch.ones(3, 4), dirty=dirty)
    assert dirty.item() == 1


def test_dirty_knows_no_rows_beyond_the_matrix(generator: torch.Generator) -> None:
    wide = torch.full((ROWS + 5, COLUMNS + 9), torch.nan)
    wide[:-1, 2:-2] = torch.randn(ROWS + 4, COLUMNS + 5, generator=generator)
    assert dirty_flag(wide[:-1, 2:-2]) == 0


def test_norms_of_strided_expanded_and_far_rows(generator: torch.Generator) -> None:
    wide = torch.full((40, 50), torch.nan)
    wide[:, 3:40] = torch.randn(40, 37, generator=generator)
    for features in (wide[:, 3:40], wide[::2, 3:40], wide[:1, 3:40].expand(35, 37)):
        exact = features.double().square().sum(1)
        torch.testing.assert_close(run(features)[0].double(), exact, rtol=1e-6, atol=0)
    far = Sparse(7)
    far.fill(torch.arange(21.0).view(3, 7))
    assert torch.equal(run(far.matrix())[0], far.stacked().square().sum(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beyond_the_operands_is_read(shape: tuple[int, int], generator) -> None:
    matrix = walled(torch.randn(shape, generator=generator))
    run(matrix)
    assert column_sums(matrix).shape == shape[1:]


def test_no_rows() -> None:
    assert run(torch.empty(0, 5))[0].shape == (0,)
    assert torch.equal(column_sums(torch.empty(0, 5)), torch.zeros(5, dtype=torch.float64))


SUM_ROWS, SUM_COLUMNS = module._SUM_TILE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (SUM_ROWS - 1, SUM_COLUMNS + 1),
        (SUM_ROWS, SUM_COLUMNS),
        (SUM_ROWS + 1, SUM_COLUMNS - 1),
        (2 * module._SUM_ROWS + 1, 9),
    ],
    ids=str,
)
def test_column_sums(shape: tuple[int, int], dtype: torch.dtype, generator) -> None:
    matrix = torch.randn(shape, generator=generator).to(dtype)
    with guarded_arguments(module, "column_sums_kernel", (1,)), each_written_once():
        sums = column_sums(matrix)
    exact, scale = matrix.double().sum(0), matrix.double().abs().sum(0)
    assert sums.dtype == torch.float64 and sums.shape == exact.shape
    assert bool(((sums - exact).abs() <= 2e-7 * scale).all())


def test_column_sums_of_equal_rows_keep_their_digits() -> None:
    rows = 3 * module._SUM_ROWS
    matrix = torch.full((1, 3), 1.1).expand(rows, 3)
    exact = rows * matrix[0].double()
    torch.testing.assert_close(column_sums(matrix), exact, rtol=1e-5, atol=0)


def test_column_sums_of_strided_and_far_rows(generator: torch.Generator) -> None:
    wide = torch.randn(50, 40, generator=generator)
    for matrix in (wide[:, 3:10], wide[::3, 1:], wide[:1].expand(35, 40)):
        torch.testing.assert_close(
            column_sums(matrix), matrix.double().sum(0), rtol=1e-5, atol=1e-5
        )
    far = Sparse(7)
    far.fill(torch.arange(21.0).view(3, 7))
    assert torch.equal(column_sums(far.matrix()), far.stacked().double().sum(0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("counted", torch.ones(4), "counted must be"),
        ("counted", torch.ones(8).bool()[::2], "counted must be"),
        ("sqnorm", torch.zeros(3), "sqnorm must be"),
        ("sqnorm", torch.zeros(4, device="meta"), "sqnorm must be on cpu"),
        ("dirty", torch.zeros(1), "dirty must be"),
        ("dirty", torch.zeros(2, dtype=torch.int32), "dirty must be"),
    ],
)
def test_refused_arguments(name: str, value: Tensor, message: str) -> None:
    given = {
        "features": torch.zeros(4, 6),
        "counted": torch.ones(4, dtype=torch.bool),
        "sqnorm": torch.zeros(4),
        "status": torch.full((STATUS_SLOTS,), 4),
        name: value,
    }
    with pytest.raises(ValueError, match=message) as caught:
        row_norms(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("matrix", [torch.zeros(4), torch.zeros(6, 4).T, torch.zeros(4, 6).long()])
def test_column_sums_refuse_other_matrices(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix must"):
        column_sums(matrix)
