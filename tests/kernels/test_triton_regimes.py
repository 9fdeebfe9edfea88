"""Every regime of the Triton backend through the engine, with plain PyTorch for its kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import Case, assert_stats_match, random_case
from plain_kernels import PlainKernels
from triton_cases import needs_triton, problem_of

from moso_fast.backends import get
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIMES
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import engine, memory
from moso_fast.core.passes import Plan
from moso_fast.core.precision import own_precision
from moso_fast.core.reference import explicit_stats

pytestmark = needs_triton
BF16 = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PlainKernels:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return PlainKernels(monkeypatch)


def spoilt(case: Case) -> Case:
    """With rows that do not count: two ignored, one of them with no numbers."""
    if case.labels.dim() == 1:
        case.labels[[2, 13]] = -100
        case.features[13, 1] = float("nan")
    return case


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Classes fewer and more than columns, and everything that a job may have."""
    weights, offsets = torch.linspace(0.5, 2.0, 17), torch.tensor([0, 4, 4, 9, 17])
    holes = spoilt(random_case("ids", dtype=dtype, nonfinite="exclude"))
    holes.features[5, 2] = float("inf")
    found = {
        "ids": spoilt(random_case("ids", dtype=dtype)),
        "without a bias": spoilt(random_case("ids", dtype=dtype, bias=False)),
        "smoothed": spoilt(random_case("ids_smoothed", c=9, d=6, dtype=dtype)),
        "wide": random_case("ids", c=12, d=5, dtype=dtype),
        "wide without a bias": random_case("ids", c=12, d=5, dtype=dtype, bias=False),
        "soft": random_case("soft_smoothed", dtype=dtype),
        "binary": random_case("binary", c=6, d=6, dtype=dtype),
        "mse": random_case("mse", c=9, d=6, dtype=dtype),
        "weights": spoilt(random_case("ids_smoothed", dtype=dtype, sample_weight=weights)),
        "weights, wide": random_case("ids", c=12, d=5, dtype=dtype, sample_weight=weights),
        "heads": spoilt(random_case("ids_smoothed", heads=3, dtype=dtype)),
        "heads, wide": random_case("soft", c=9, d=5, heads=2, dtype=dtype),
        "holes": holes,
        "sequences": spoilt(random_case("ids", heads=2, dtype=dtype, cu_seqlens=offsets)),
        "sequences of one head": random_case("soft", dtype=dtype, cu_seqlens=offsets),
        "few": random_case("ids", c=3, dtype=dtype),
    }
    turned = random_case("ids", dtype=dtype)
    features = turned.features.T.contiguous().T
    found["turned"] = Case(features, *turned.args[1:], turned.options)
    return found


def run(regime: str, case: Case, chunk_size: int | None = None, **options: Any) -> Any:
    problem = problem_of(case, **options)
    backend = TritonBackend(regime)
    if REGIMES[regime].fits(problem) is not None:
        return None
    with own_precision(problem):
        return engine.run(problem, backend, chunk_size)


@pytest.mark.quick(3)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_job_equals_the_definition(kernels, monkeypatch, regime) -> None:
    """With residuals kept, and made again: for chunks, and for want of memory."""
    left_out = {
        "row_tiles": {name for name in cases(BF16) if "heads" in name or "sequences" in name},
        "recompute": {"soft", "binary", "mse", "heads, wide", "sequences of one head"},
    }
    for dtype, tolerance in ((torch.float32, 2e-6), (BF16, 1.5e-2)):
        done = set()
        for name, case in cases(dtype).items():
            expected = explicit_stats(*case.args, **case.options)
            for chunk_size, budget in ((None, 2**30), (7, 2**30), (None, 0)):
                monkeypatch.setattr(memory, "residual_budget", lambda device, b=budget: b)
                found = run(regime, case, chunk_size)
                if found is not None:
                    done.add(name)
                    found.count = int(found.count)
                    assert_stats_match(found, expected, tolerance, 1e-7)
        assert done == set(cases(dtype)) - left_out.get(regime, set())


@pytest.mark.parametrize("regime", REGIMES)
def test_bad_rows_are_reported_by_their_number(kernels, regime) -> None:
    """Whatever the chunk that they lie in; the first of each kind."""
    inf = float("inf")
    for dtype in (torch.float32, BF16):
        for chunk_size in (None, 7):
            case = random_case("ids", dtype=dtype)
            case.labels[[9, 12]] = 5
            with pytest.raises(ValueError, match=r"^labels\[9\] is 5, outside \[0, 5\)"):
                run(regime, case, chunk_size)
            case = random_case("ids", dtype=dtype)
            case.features[11, 3], case.features[14, 0] = inf, inf
            with pytest.raises(ValueError, match=r"^features\[11, 3\] is inf"):
                run(regime, case, chunk_size)
            case = random_case("ids", dtype=dtype)
            case.features[[10, 15]] = 1e25  # finite, as are its logits; its gradient is not
            with pytest.raises(ValueError, match=r"^logits, loss or gradient of row 10 overflow"):
                run(regime, case, chunk_size)
            if regime != "recompute":
                case = random_case("soft", dtype=dtype)
                case.labels[8] = 1.0
                with pytest.raises(ValueError, match=r"^labels\[8\] sums to 5"):
                    run(regime, case, chunk_size)


def test_rows_that_do_not_count_have_no_alignment(kernels) -> None:
    """Zero, whatever they hold, with residuals that were kept and that are made again."""
    for dtype in (torch.float32, BF16):
        for regime in (*REGIMES, "torch"):
            case = spoilt(random_case("ids", dtype=dtype, c=9, d=6))
            problem = problem_of(case)
            backend = get("torch") if regime == "torch" else TritonBackend(regime)
            passes = backend.prepare(problem, Plan(None, True, 0, 0))
            out, rows = engine._allocate(problem), slice(0, 17)
            out.count = torch.tensor(15)
            kept = passes.first(rows, out).residual
            slope = torch.arange(54.0).view(1, 9, 6) % 7  # some gradient
            passes.begin_second(slope, slope[..., 0])
            for residual in (kept, None):
                alignment = torch.full((1, 17), float("nan"))
                passes.second(rows, out, residual, alignment)
                assert alignment.isfinite().all() and not alignment[:, [2, 13]].any(), regime
                assert int((alignment == 0).sum()) == 2, regime


def last(kernels: PlainKernels, name: str) -> Any:
    return kernels.of(name)[-1]


def test_rounded_operands_get_their_own_term_back(kernels, monkeypatch) -> None:
    """|h|^2 of the rows, the number of those that count, and what rounding took from |r|^2."""
    for classes, dim in ((5, 7), (12, 5)):
        # Without a bias: with one, the norms grow by 1 when all is done.
        case = spoilt(random_case("ids", c=classes, d=dim, dtype=BF16, bias=False))
        for regime, kernel in (("stored", "stored_alignment"), ("row_tiles", "stored_alignment"),
                               ("blas", "row_dots")):  # fmt: skip
            run(regime, case, 9)
            call = last(kernels, kernel)
            norms, count, lost = call.own if regime == "blas" else call.self_term
            exact = case.features[9:].float().square().sum(1)
            torch.testing.assert_close(norms, torch.where(exact.isfinite(), exact, 0))
            assert int(count) == 15 and lost.shape == (8,)
            found = (
                last(kernels, "row_tiles").returned.lost
                if regime == "row_tiles"
                else last(kernels, "residual_rows").narrow.lost
            )
            assert bool((lost[[0, 1]] != 0).all()) and lost.equal(found)
        run("few_classes", case)
        assert int(last(kernels, "few_classes_second").count) == 15
        run("recompute", case)
        term = last(kernels, "stacked_alignment").self_term
        assert (int(term.count), term.lost) == (15, None) and term.feature_sqnorm.shape == (17,)
    # Operands that keep their digits, and sequences, have nothing to get back.
    exact_case = random_case("ids", dtype=BF16)
    for options in ({"precision": "highest"}, {"cu_seqlens": torch.tensor([0, 17])}):
        for regime, kernel in (("stored", "stored_alignment"), ("recompute", "stacked_alignment")):
            run(regime, exact_case, **options)
            assert last(kernels, kernel).self_term is None
        run("few_classes", exact_case, **options)
        assert last(kernels, "few_classes_second").count is None


def test_a_block_of_lost_terms_at_a_time(monkeypatch) -> None:
    """K, n numbers: |r|^2 less the product that the operands gave, |h|^2 / N times."""
    residual = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0))
    out: Any = SimpleNamespace(
        feature_sqnorm=torch.arange(1.0, 13.0), number_counted=lambda: torch.tensor(4)
    )
    rounded = residual.to(BF16).double()
    whole = residual.double()
    for both, product in ((False, whole * rounded), (True, rounded * rounded)):
        expected = (whole.square() - product).sum(2).T * torch.arange(3.0, 12.0) / 4
        for elements in (1, 25, 2**24):
            monkeypatch.setattr(triton_blas, "BLOCK_ELEMENTS", elements)
            found = triton_blas.lost_self_term(out, slice(2, 11), residual, both)
            assert found.shape == (2, 9)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    out.number_counted = lambda: torch.tensor(0)
    assert triton_blas.lost_self_term(out, slice(2, 11), residual, False).isfinite().all()


def test_under_capture_nobody_looks_at_the_data(kernels, monkeypatch) -> None:
    """Rows that are not finite then go to a kernel that skips them, or are cleared unseen."""
    case = random_case("ids", dtype=BF16)
    run("blas", case)
    assert kernels.of("gradient_sum") == []
    case.features[3, 0] = float("nan")
    case.labels[3] = -100
    run("blas", case)
    assert len(kernels.of("gradient_sum")) == 1  # asked the flag, which said so
    monkeypatch.setattr(triton_blas, "capturing", lambda problem: True)
    run("blas", random_case("ids", dtype=BF16), 7)
    assert len(kernels.of("gradient_sum")) == 4
    looked: list[bool] = []
    clean = triton_blas.safe_features

    def noted(*given: Any, look_first: bool) -> Any:
        looked.append(look_first)
        return clean(*given, look_first=look_first)

    monkeypatch.setattr(triton_blas, "safe_features", noted)
    run("blas", random_case("ids"))
    monkeypatch.setattr(triton_blas, "capturing", lambda problem: False)
    run("blas", random_case("ids"))
    assert looked == [False, True]
