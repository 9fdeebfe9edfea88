"""A job of one chunk in one native call: the same as pass by pass, and what it says of itself."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core_support import FIELDS, KINDS, Case, needs_cpu, prepared, random_case

from moso_fast import last_layer_stats, moso_scores
from moso_fast.backends.cpu import CpuBackend
from moso_fast.core.formulas import FORMULAS
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.core.status import STATUS_SLOTS
from moso_fast.util.native import load_native

CPU = sys.modules[CpuBackend.__module__]
pytestmark = needs_cpu


def problem_of(case: Case, **options: Any) -> Problem:
    return build_problem(*case.args, **{**case.options, **options})


def stats_of(case: Case, **options: Any) -> Any:
    return last_layer_stats(*case.args, **case.options, backend="cpu", **options)


def pass_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU.CpuPasses, "whole", lambda *_, **__: None)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_two_passes_bit_for_bit(kind, dtype, heads, bias, monkeypatch) -> None:
    weights = torch.rand(70, generator=torch.Generator().manual_seed(1))
    case = random_case(kind, n=70, heads=heads, bias=bias, dtype=dtype, sample_weight=weights)
    case.features[11, 2] = torch.nan
    if case.labels.dim() == 1:
        case.labels[::9] = -100
    for chunk_size in (None, 1000):  # residuals kept, and computed again
        whole = stats_of(case, nonfinite="exclude", chunk_size=chunk_size)
        with monkeypatch.context() as patch:
            pass_by_pass(patch)
            apart = stats_of(case, nonfinite="exclude", chunk_size=chunk_size)
        for name in FIELDS:
            a, b = getattr(whole, name), getattr(apart, name)
            if name == "el2n":  # PyTorch's vector code rounds some roots the wrong way
                torch.testing.assert_close(a, b, rtol=1.2e-7, atol=0.0, equal_nan=True)
            else:
                assert same(a, b), name
        assert whole.count == apart.count < 70
        torch.testing.assert_close(
            torch.as_tensor(whole.mean_grad_sqnorm, dtype=torch.float64),
            torch.as_tensor(apart.mean_grad_sqnorm, dtype=torch.float64),
            rtol=1e-14,
            atol=0.0,
        )


@pytest.mark.parametrize("rows", [100, 5000])
@pytest.mark.parametrize("heads", [None, 2])
def test_a_mean_gradient_that_is_made_at_once(rows, heads, monkeypatch) -> None:
    """Block by block, without float64 sums of the whole head: the same up to a last digit."""
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", rows)
    case = random_case("ids", n=rows, c=40, d=530, heads=heads)
    case.labels[::7] = -100
    whole = stats_of(case, ignore_index=-100)
    pass_by_pass(monkeypatch)
    apart = stats_of(case, ignore_index=-100)
    for name in FIELDS:
        a, b = getattr(whole, name), getattr(apart, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.nan_to_num().abs().max()),
                                   equal_nan=True)  # fmt: skip
    found, wanted = (torch.as_tensor(s.mean_grad_sqnorm).double() for s in (whole, apart))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("heads", [None, 2])
def test_scores_are_those_of_the_statistics(formula, heads) -> None:
    case = random_case("ids", n=60, heads=heads)
    case.labels[::4] = -100
    given = {**case.options, "backend": "cpu"}
    for scale in (1.0, 0.3, -2):
        scores = moso_scores(*case.args, formula=formula, scale=scale, **given)
        assert same(scores, stats_of(case).scores(formula, scale))
        assert int(scores.isnan().sum()) == 15 * (heads or 1)
    # No direction, no agreement: a gradient of zero.
    case.features.zero_()
    without = Case(case.features, case.weight, case.labels, None, case.options)
    scores = moso_scores(*without.args, formula=formula, **given)
    assert same(scores, stats_of(without).scores(formula))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("c", [5, 50])
def test_the_facts_it_is_judged_by(heads, bias, c) -> None:
    weights = torch.rand(90, generator=torch.Generator().manual_seed(2))
    case = random_case("ids", n=90, c=c, heads=heads, bias=bias, sample_weight=weights)
    case.labels[:8] = -100
    problem = problem_of(case)
    found = prepared("cpu", problem).whole("moso", 1.0, read=True)
    assert found is not None and int(found.counted.sum()) == int(found.results.count) == 82
    exact = closed_form_stats(*case.args, **case.options)
    facts = found.facts.tolist()
    assert facts[: STATUS_SLOTS + 1] == [90.0] * STATUS_SLOTS + [82.0]
    columns = found.facts[STATUS_SLOTS + 1 :].view(heads, 6).T
    sums = [
        torch.as_tensor(exact.mean_grad_sqnorm).double().reshape(heads),
        exact.alignment.nan_to_num().sum(1),
        exact.grad_sqnorm.sqrt().nan_to_num().sum(1),
        problem.weight.double().sum((1, 2)),
        torch.zeros(heads) if problem.bias is None else problem.bias.double().sum(1),
        weights.double().sum().expand(heads),
    ]
    for column, wanted in zip(columns, sums, strict=True):
        torch.testing.assert_close(column, wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [5, 50])
@pytest.mark.parametrize(
    ("name", "at"), [("weight", (1, 4, 6)), ("bias", (0, 2)), ("sample_weight", (7,))]
)
def test_parameters_that_are_not_finite_end_it(c, name, at) -> None:
    """Before rows that offend are looked at, as in the order of the errors."""
    case = random_case("ids", n=20, c=c, heads=2, sample_weight=torch.rand(20))
    case.labels[3] = c
    problem = problem_of(case)
    getattr(problem, name)[at] = torch.inf
    found = prepared("cpu", problem).whole(None, 1.0, read=True)
    assert found is not None and found.facts[: STATUS_SLOTS + 1].tolist() == [20.0] * 4 + [0.0]
    columns = found.facts[STATUS_SLOTS + 1 :].view(2, 6).T
    wrong = {"weight": 3, "bias": 4, "sample_weight": 5}[name]
    for number, column in enumerate(columns):
        assert column.isfinite().all() == (number != wrong)
    shown = {"weight": r"\[1, 4, 6\]", "bias": r"\[0, 2\]", "sample_weight": r"\[7\]"}[name]
    with pytest.raises(ValueError, match=f"^{name}{shown} is inf"):
        stats_of(case)


def test_a_thread_keeps_its_scratch_memory_up_to_a_limit() -> None:
    """What is kept is at hand for the next job of the size, and no thread's but its own."""
    module = load_native("_cpu").module

    def kept_after(rows: int, classes: int, dim: int) -> int:
        case = random_case("ids", n=rows, c=classes, d=dim)
        stats_of(case)
        return module.kept_bytes()

    def in_a_new_thread(sizes: list[tuple[int, int, int]]) -> list[int]:
        with ThreadPoolExecutor(1) as pool:
            start = pool.submit(module.kept_bytes).result()
            return [start, *pool.map(lambda size: kept_after(*size), sizes)]

    small, large = (100, 40, 30), (30_000, 200, 10)  # residuals of 16 kB and of 24 MB
    start, once, again, after_large = in_a_new_thread([small, small, large])
    assert start == 0 < once == again < 2**20
    assert 0 < after_large <= module.most_kept_bytes == 2**24
