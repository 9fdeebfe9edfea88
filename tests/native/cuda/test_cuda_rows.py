"""The CUDA kernels in the emulator: rows that do not count, are not finite or are refused."""

from __future__ import annotations

import math

import cuda_emulator
import pytest
import torch
from core_support import FIELDS, assert_close, assert_stats_match, prepared, random_case
from cuda_cases import DTYPES, first_pass_of, run, score

from moso_fast.core.engine import _allocate
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_ignored_rows_may_hold_anything(gpu, chunk_size, dtype) -> None:
    case = random_case("ids", n=30, dtype=dtype)
    labels, features = case.labels.clone(), case.features.clone()
    labels[[3, 29]] = -100
    features[3], features[29, 2] = float("nan"), float("inf")
    kept = labels != -100
    exact = closed_form_stats(features[kept], case.weight, labels[kept], case.bias)
    stats = score(features, case.weight, labels, case.bias, chunk_size=chunk_size,
                  precision="highest")  # fmt: skip
    for name in FIELDS:
        value = getattr(stats, name)
        assert value[~kept].isnan().all(), name
        assert_close(value[kept], getattr(exact, name)[0], 1e-5, what=name)


@pytest.mark.parametrize("heads", [None, 2])
def test_rows_that_do_not_count_have_no_residual_and_no_alignment(gpu, heads) -> None:
    case = random_case("ids", n=20, heads=heads)
    case.labels[[0, 7]] = -100
    case.features[7, 3] = float("nan")
    problem = build_problem(*case.args)
    out = _allocate(problem)
    passes = prepared(gpu, problem)
    first = passes.first(slice(0, 20), out)
    assert out.counted.tolist() == [i not in (0, 7) for i in range(20)]
    assert bool((first.residual[[0, 7]] == 0).all())
    alignment = torch.full_like(out.loss, float("nan"))
    passes.begin_second(torch.ones_like(problem.weight), torch.ones_like(problem.bias))
    passes.second(slice(0, 20), out, first.residual, alignment)
    assert bool((alignment[:, [0, 7]] == 0).all()) and bool(torch.isfinite(alignment).all())


def test_all_rows_ignored(gpu) -> None:
    case = random_case("ids", n=20)
    stats = score(case.features, case.weight, torch.full((20,), -100), case.bias)
    assert stats.count == 0 and stats.alignment.isnan().all() and stats.mean_grad_sqnorm == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 2])
def test_excluded_rows(gpu, dtype, heads) -> None:
    case = random_case("ids", n=70, heads=heads, dtype=dtype, nonfinite="exclude")
    case.features[4, 1], case.features[69, 6] = float("nan"), float("-inf")
    exact = closed_form_stats(*case.args, **case.options)
    assert exact.count == 68
    for options in ({}, {"chunk_size": 24}):
        assert_stats_match(run(case, precision="highest", **options), exact, 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_bad_rows_are_named(gpu, chunk_size) -> None:
    case = random_case("ids", n=30)
    for label in (5, -1, 2**40):
        labels = case.labels.clone()
        labels[21] = labels[25] = label
        with pytest.raises(ValueError, match=rf"^labels\[21\] is {label}, outside \[0, 5\)"):
            score(case.features, case.weight, labels, case.bias, chunk_size=chunk_size)
    features = case.features.clone()
    features[17, 2] = features[20, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^features\[17, 2\] is nan; row 17 is the first"):
        score(features, *case.args[1:], chunk_size=chunk_size)
    features = case.features.clone()
    features[19] = 3e38
    with pytest.raises(ValueError, match=r"row 19 overflow float32"):
        score(features, *case.args[1:], chunk_size=chunk_size)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_stay_in_their_row(gpu, dtype, precision, shift) -> None:
    """Rows in every place of an operand: products with them reach no other norm or residual."""
    case = random_case("ids", n=64, c=10, d=70, dtype=dtype, nonfinite="exclude")
    kept = torch.arange(64) % 4 != shift
    bad = (~kept).nonzero().flatten().tolist()
    for at, row in enumerate(bad):
        column = (7 * row) % 70
        case.features[row, column] = (math.inf, math.nan, -math.inf)[at % 3]
        case.features[row, (column + 31) % 70] = (math.inf, 1.0)[at % 2]
    out = first_pass_of(gpu, case, precision=precision)
    assert out.counted.bool().tolist() == kept.tolist()
    exact = case.features[kept].double().square().sum(1)
    assert_close(out.feature_sqnorm[kept], exact, 1e-6, what="norms")
    assert bool((out.feature_sqnorm[~kept] == 0).all())
    exact = closed_form_stats(*case.args, **case.options)
    assert_stats_match(
        run(case, precision=precision), exact, 1e-2 if precision == "medium" else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_that_overflow_are_not_holes(gpu, dtype) -> None:
    """Every number is finite, their squares are not: the row is refused for its logits alone."""
    case = random_case("ids", n=40, c=4, d=40, dtype=dtype)
    case.features[19] = 1e25
    with pytest.raises(ValueError, match=r"row 19 overflow float32"):
        score(*case.args)
