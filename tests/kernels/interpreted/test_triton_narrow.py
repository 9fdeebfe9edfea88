"""Whole jobs whose residuals are kept rounded to bfloat16, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from core_support import FIELDS, Case, assert_close, assert_stats_match, random_case, score_with

from moso_fast.backends.triton.choice import REGIME_VARIABLE
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import memory
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import last_layer_stats, moso_scores

BF16 = torch.bfloat16
REGIMES = ("row_tiles", "stored", "blas")
# Of a row alone: float32 products of numbers that bfloat16 holds. Alignments are of rounded
# residuals, from which the interpreter cuts digits off where a GPU rounds.
OWN = ("grad_sqnorm", "loss", "el2n", "margin", "entropy")
EXACT, ROUNDED = 1e-5, 1e-2


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch) -> str:
    monkeypatch.setenv(REGIME_VARIABLE, request.param)
    return request.param


def draw(kind: str = "ids", n: int = 60, c: int = 10, d: int = 24, **options) -> Case:
    """A case whose weights bfloat16 holds exactly."""
    case = random_case(kind, n=n, c=c, d=d, dtype=BF16, **options)
    return Case(case.features, case.weight.to(BF16).float(), case.labels, case.bias, case.options)


def check(stats, exact, kept: torch.Tensor | None = None) -> None:
    """Compare the rows that count, and the norm of the mean gradient."""
    kept = torch.ones(stats.loss.shape[-1], dtype=torch.bool) if kept is None else kept
    for name in FIELDS:
        value = getattr(stats, name)
        assert value[~kept].isnan().all(), name
        tolerance = EXACT if name in OWN else ROUNDED
        assert_close(value[kept], getattr(exact, name)[0], tolerance, what=name)
    norm = torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64).reshape(-1)
    assert_close(norm, exact.mean_grad_sqnorm.double(), 2 * ROUNDED, what="mean_grad_sqnorm")


# C up to, at and beyond a multiple of 8; more classes than columns (the other order of a product);
# rows of features that are aligned and such that are not.
SHAPES = [(5, 24), (8, 16), (10, 33), (33, 9), (40, 64), (129, 16)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("classes, dim", SHAPES)
def test_matches_the_definition(classes: int, dim: int, bias: bool, regime: str) -> None:
    case = draw(c=classes, d=dim, bias=bias)
    check(score_with("triton", case), closed_form_stats(*case.args))


@pytest.mark.parametrize("kind", ["ids_smoothed", "soft"])
def test_weights_smoothing_and_targets(kind: str, regime: str) -> None:
    weights = torch.linspace(0.1, 2.0, 60)
    case = draw(kind, sample_weight=weights)
    for options in ({}, {"chunk_size": 17}):
        check(score_with("triton", case, **options), closed_form_stats(*case.args, **case.options))


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
def test_ignored_and_excluded_rows_may_hold_anything(
    kept: bool, chunk_size: int | None, regime: str, monkeypatch
) -> None:
    if not kept:
        monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    case = draw()
    labels, features = case.labels.clone(), case.features.clone()
    labels[[3, 29]] = -100
    features[3], features[29, 2] = torch.nan, torch.inf
    features[20, 5], features[44] = -torch.inf, torch.nan
    stats = last_layer_stats(
        features, case.weight, labels, case.bias,
        backend="triton", nonfinite="exclude", chunk_size=chunk_size,
    )  # fmt: skip
    counts = torch.ones(60, dtype=torch.bool)
    counts[[3, 20, 29, 44]] = False
    exact = closed_form_stats(features[counts], case.weight, labels[counts], case.bias)
    assert stats.count == 56
    check(stats, exact, counts)


def test_chunks_and_recomputed_residuals_change_nothing(regime: str, monkeypatch) -> None:
    case = draw()
    whole = score_with("triton", case)
    chunked = score_with("triton", case, chunk_size=7)
    monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    again = score_with("triton", case)
    for name in FIELDS:
        for other in (chunked, again):
            assert_close(getattr(other, name), getattr(whole, name), 1e-5, what=name)


# Both orders of the second product: C <= D and C > D.
ORDERS = [(10, 24), (16, 24), (40, 16), (43, 9)]


@pytest.fixture
def sums(monkeypatch) -> list[str]:
    """Which way each gradient sum of regime blas was made."""
    monkeypatch.setenv(REGIME_VARIABLE, "blas")
    found: list[str] = []

    def note(name: str, kind: str) -> None:
        given = getattr(triton_blas, name)

        def noted(*args, **options):
            found.append(kind)
            return given(*args, **options)

        monkeypatch.setattr(triton_blas, name, noted)

    note("gradient_sum", "cublas")
    note("sum_narrow_gradients", "masked")
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("chunk_size", [None, 25])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("classes, dim", ORDERS)
def test_blas_sums_gradients_by_cublas_where_all_is_finite(
    classes: int, dim: int, kept: bool, chunk_size: int | None, bias: bool, sums, monkeypatch
) -> None:
    if not kept:
        monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    case = draw(c=classes, d=dim, bias=bias)
    case.labels[[3, 29]] = -100  # rows that do not count, but hold numbers
    stats = score_with("triton", case, chunk_size=chunk_size)
    kept_rows = case.labels != -100
    exact = closed_form_stats(case.features[kept_rows], case.weight, case.labels[kept_rows],
                              case.bias)  # fmt: skip
    check(stats, exact, kept_rows)
    assert sums == ["cublas"] * (1 if chunk_size is None else 3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("classes, dim", ORDERS)
def test_blas_sums_gradients_by_the_masked_kernel_where_a_row_is_not_finite(
    classes: int, dim: int, kept: bool, bias: bool, sums, monkeypatch
) -> None:
    if not kept:
        monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    case = draw(c=classes, d=dim, bias=bias)
    counts = torch.ones(60, dtype=torch.bool)
    counts[[3, 29]] = False
    case.labels[3] = -100
    case.features[3, 1], case.features[29] = torch.nan, -torch.inf
    exact = closed_form_stats(case.features[counts], case.weight, case.labels[counts], case.bias)
    for chunk_size, ways in ((None, ["masked"]), (25, ["masked", "masked", "cublas"])):
        sums.clear()
        stats = last_layer_stats(*case.args, backend="triton", nonfinite="exclude",
                                 chunk_size=chunk_size)  # fmt: skip
        check(stats, exact, counts)
        assert sums == ways
    # An ignored row alone is as dangerous: 0 NaN is NaN in a product that knows no mask.
    case.features[29] = 0
    counts[29] = True
    exact = closed_form_stats(case.features[counts], case.weight, case.labels[counts], case.bias)
    sums.clear()
    check(score_with("triton", case), exact, counts)
    assert sums == ["masked"]


def test_blas_under_capture_takes_the_masked_kernel_and_asks_nobody(sums, monkeypatch) -> None:
    case = draw()
    expected = score_with("triton", case)
    monkeypatch.setattr(triton_blas, "capturing", lambda problem: True)
    found = score_with("triton", case)
    assert sums == ["cublas", "masked"]
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(expected, name), 1e-5, what=name)


@pytest.mark.parametrize("classes, dim", ORDERS)
def test_features_of_any_strides(classes: int, dim: int, regime: str) -> None:
    case = draw(n=33, c=classes, d=dim)
    wide = torch.full((33, dim + 3), torch.nan, dtype=BF16)
    wide[:, 1 : dim + 1] = case.features
    turned = case.features.T.contiguous().T  # columns apart, rows side by side
    for features in (wide[:, 1 : dim + 1], turned):
        given = Case(features, *case.args[1:], {})
        check(score_with("triton", given), closed_form_stats(*given.args))


def test_blas_sums_slabs_in_groups(sums, monkeypatch) -> None:
    """Groups of two slabs of 8 rows, one slab left over, and a rest."""
    case = draw(n=45, c=10, d=24)
    whole = score_with("triton", case)
    monkeypatch.setitem(triton_blas.SLAB_ROWS, "medium", 8)
    monkeypatch.setattr(triton_blas, "_BATCH_BYTES", 2 * 4 * 16 * 24)
    grouped = score_with("triton", case)
    for name in FIELDS:
        assert_close(getattr(grouped, name), getattr(whole, name), 1e-5, what=name)
    assert sums == ["cublas", "cublas"]


def test_no_row_counts(regime: str) -> None:
    case = draw(n=20)
    stats = score_with("triton", Case(*case.args[:2], 0 * case.labels - 100, case.bias, {}))
    assert stats.count == 0
    assert all(bool(getattr(stats, name).isnan().all()) for name in FIELDS)


def test_bad_input_is_named(regime: str) -> None:
    case = draw()
    features = case.features.clone()
    features[7, 2], features[9] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"^features\[7, 2\] is inf; row 7 is the first"):
        moso_scores(features, case.weight, case.labels, case.bias, backend="triton")
    labels = case.labels.clone()
    labels[11] = 10
    with pytest.raises(ValueError, match=r"^labels\[11\] is 10, outside \[0, 10\)"):
        moso_scores(case.features, case.weight, labels, case.bias, backend="triton")


@pytest.mark.parametrize("classes, dim", [(10, 24), (40, 16)])
def test_the_bias_part_keeps_its_digits(classes: int, dim: int, regime: str) -> None:
    """Features of 0: the alignment is <r_i, gb> alone, with a gb that bfloat16 does not hold."""
    case = draw(n=40, c=classes, d=dim)
    case = Case(0 * case.features, case.weight, case.labels, case.bias, {})
    exact = closed_form_stats(*case.args)
    found = score_with("triton", case)
    residual = torch.softmax(case.bias.double(), 0).expand(40, classes).clone()
    residual[torch.arange(40), case.labels] -= 1
    stored = (residual.float().view(torch.int32) & -65536).view(torch.float32).double()
    mean = {"row_tiles": residual, "stored": stored, "blas": stored}[regime].mean(0)
    assert_close(found.alignment, stored @ mean, 1e-5)
    assert_close(found.alignment, exact.alignment[0], ROUNDED)


def test_four_classes_and_fewer_stay_wide(monkeypatch) -> None:
    """As do several heads, other losses, sequences and exact precisions."""
    narrow = triton_blas.narrow_ones

    def asked(c: int = 10, precision: str = "medium", **options) -> bool:
        case = random_case(options.pop("kind", "ids"), c=c, dtype=BF16, **options)
        return narrow(build_problem(*case.args, **case.options, precision=precision))

    assert asked() and asked(5) and not asked(4)
    assert not asked(heads=2) and not asked(kind="mse")
    assert not asked(precision="highest") and not asked(cu_seqlens=torch.tensor([0, 4, 17]))
    monkeypatch.setenv(REGIME_VARIABLE, "stored")
    case = draw(c=4)
    assert_stats_match(score_with("triton", case), closed_form_stats(*case.args), ROUNDED)
