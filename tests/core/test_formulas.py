"""The formulas against brute force: retraining one step without the sample, and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_support import Case, oracle_gradients, random_case, rank_correlation
from torch import Tensor

from moso_fast.core.formulas import FORMULAS, check_count, check_formula, check_scale, score
from moso_fast.functional import last_layer_stats, moso_scores

F64 = torch.float64


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


def problem(n: int = 12) -> Case:
    return random_case("ids", n=n, c=4, d=5, dtype=F64, seed=3)


def losses_at(case: Case, theta: Tensor) -> Tensor:
    """Loss of every sample at head parameters [weight, bias]."""
    h = torch.cat([case.features, torch.ones(len(case.features), 1, dtype=F64)], 1)
    return torch.nn.functional.cross_entropy(h @ theta.T, case.labels, reduction="none")


def parameters(case: Case) -> Tensor:
    return torch.cat([case.weight, case.bias[:, None]], 1)


def others(n: int, i: int) -> Tensor:
    return torch.arange(n) != i


def leave_one_out(case: Case, eta: float, renormalised: bool) -> Tensor:
    """L(S without z, w without z) - L(S without z, w) after one SGD step, for every z."""
    theta, n = parameters(case), len(case.features)
    gradients, _ = oracle_gradients(case)
    values = []
    for i in range(n):
        rest = others(n, i)
        total = gradients[rest].sum(0)
        without = theta - eta * total / (n - 1 if renormalised else n)
        full = theta - eta * gradients.mean(0)
        risk_without, risk_full = losses_at(case, without), losses_at(case, full)
        values.append(risk_without[rest].mean() - risk_full[rest].mean())
    return torch.stack(values)


@pytest.mark.parametrize("renormalised, formula", [(True, "one_step"), (False, "moso")])
def test_formula_is_the_leave_one_out_value_to_first_order(renormalised, formula):
    """The error of eta * formula falls with eta, as that of a first-order expansion must."""
    case = problem()
    n = len(case.features)
    predicted = moso_scores(*case.args, formula=formula)
    if not renormalised:
        predicted = predicted / n  # removal that keeps 1/N: the step differs by g/N
    errors = []
    for eta in (1e-2, 1e-3, 1e-4):
        truth = leave_one_out(case, eta, renormalised)
        errors.append(float((truth / eta - predicted).norm() / predicted.norm()))
    assert errors[0] < 0.2
    assert errors[1] < errors[0] / 7 and errors[2] < errors[1] / 7
    assert errors[2] < 1e-3


def test_moso_is_the_papers_equation_exactly():
    """<grad L(S without z), grad l(z)> with both gradients by autograd."""
    case = problem()
    n, theta = len(case.features), parameters(case)
    expected = []
    for i in range(n):
        w = theta.clone().requires_grad_()
        losses = losses_at(case, w)
        (h,) = torch.autograd.grad(losses[others(n, i)].mean(), w, retain_graph=True)
        (g,) = torch.autograd.grad(losses[i], w)
        expected.append((h * g).sum())
    got = moso_scores(*case.args)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("formula", ["official", "official_exact"])
def test_official_formulas_equal_the_authors_expressions(formula, n):
    """Evaluate what the authors' scoring computes from the full mean and one sample's gradient."""
    case = problem(n)
    gradients, _ = oracle_gradients(case)
    overall = gradients.mean(0)
    expected = []
    for g in gradients:
        rest_part = ((overall - g / n) * g).sum()
        if formula == "official":
            expected.append(rest_part)
            continue
        value = (2 * n - 3) / (n - 1) ** 2 * (overall * overall).sum()
        value = value - 1 / (n - 1) ** 2 * (g * g).sum()
        expected.append(value + (2 * n - 4) / (n - 1) ** 2 * rest_part)
    got = moso_scores(*case.args, formula=formula)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-15)


def test_alignment_is_the_dot_product_with_the_mean():
    case = problem()
    gradients, _ = oracle_gradients(case)
    expected = (gradients * gradients.mean(0)).sum((1, 2))
    got = moso_scores(*case.args, formula="alignment")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "formula, expected",
    [
        # a = 3, q = 5, |G|^2 = 2, N = 4
        ("moso", (4 * 3 - 5) / 3),
        ("one_step", (5 * 3 - 4 * 2 - 5) / 9),
        ("official", 3 - 5 / 4),
        ("official_exact", (5 * 2 - 5 + 4 * (3 - 5 / 4)) / 9),
        ("alignment", 3.0),
        ("cosine", 3 / (5 * 2) ** 0.5),
    ],
)
def test_values_by_hand(formula, expected):
    got = score(formula, one(3.0), one(5.0), one(2.0), torch.tensor(4))
    assert got.item() == pytest.approx(expected, rel=1e-15)


def test_a_gradient_of_zero_agrees_with_nothing():
    alignment, norms = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0])
    got = score("cosine", alignment, norms, one(4.0), torch.tensor(2))
    assert got.tolist() == [0.0, 0.5]
    assert score("cosine", alignment, norms, one(0.0), torch.tensor(2)).tolist() == [0.0, 0.0]
    unknown = torch.full((2,), torch.nan)
    assert score("cosine", unknown, unknown, one(4.0), torch.tensor(2)).isnan().all()


def test_relations_between_the_formulas():
    case = problem(30)
    n = 30
    stats = last_layer_stats(*case.args)
    moso, g2 = stats.scores("moso"), stats.mean_grad_sqnorm
    torch.testing.assert_close(stats.scores("official"), moso * (n - 1) / n)
    one_step = ((n + 1) * stats.alignment - n * g2 - stats.grad_sqnorm) / (n - 1) ** 2
    torch.testing.assert_close(stats.scores("one_step"), one_step)
    assert rank_correlation(stats.scores("official"), moso) == pytest.approx(1.0)
    assert rank_correlation(stats.scores("one_step"), moso) > 0.99
    assert rank_correlation(stats.scores("official_exact"), moso) < 1.0


def test_every_head_uses_its_own_mean_gradient():
    case = random_case("ids", heads=3, dtype=F64)
    together = last_layer_stats(*case.args)
    for formula in FORMULAS:
        scores = together.scores(formula)
        assert scores.shape == (3, 17)
        for head in range(3):
            args = case.features, case.weight[head], case.labels, case.bias[head]
            alone = moso_scores(*args, formula=formula)
            torch.testing.assert_close(scores[head], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("formula", FORMULAS)
def test_scale_is_a_factor_and_the_dtype_is_kept(formula):
    case = random_case("ids")
    plain = moso_scores(*case.args, formula=formula)
    scaled = moso_scores(*case.args, formula=formula, scale=0.25)
    assert plain.dtype == torch.float32
    assert torch.equal(scaled, plain * 0.25)
    for scale in (0, np.float32(0.5), -1):
        got = moso_scores(*case.args, formula=formula, scale=scale)
        assert torch.equal(got, plain * float(scale))


def test_cancellation_happens_in_float64():
    """N a - q of two nearly equal float32 numbers is exact, not rounded at their size."""
    a, q = torch.tensor([1.0 + 2**-20]), torch.tensor([1000.0])
    got = score("moso", a, q, one(1.0), torch.tensor(1000))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(1000 * 2**-20 / 999, rel=1e-7)


def test_two_samples_score_their_dot_product():
    case = problem(2)
    gradients, _ = oracle_gradients(case)
    dot = (gradients[0] * gradients[1]).sum()
    torch.testing.assert_close(moso_scores(*case.args), dot.expand(2), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("formula", FORMULAS)
def test_one_counted_sample(formula):
    case = problem(3)
    labels = torch.tensor([-100, int(case.labels[1]), -100])
    if formula in ("official", "alignment", "cosine"):  # none divides by N - 1
        scores = moso_scores(case.features, case.weight, labels, case.bias, formula=formula)
        g2 = oracle_gradients(case)[0][1].square().sum()
        expected = {"official": 0 * g2, "alignment": g2, "cosine": g2 / g2}[formula]
        torch.testing.assert_close(scores[1], expected, rtol=1e-12, atol=1e-13)
        assert scores[[0, 2]].isnan().all()
        return
    message = f"formula='{formula}' compares a sample with the others, but only 1 sample counts"
    with pytest.raises(ValueError, match=message):
        moso_scores(case.features, case.weight, labels, case.bias, formula=formula)
    stats = last_layer_stats(case.features, case.weight, labels, case.bias)
    assert stats.count == 1
    with pytest.raises(ValueError, match=message):
        stats.scores(formula)


def test_checks_name_what_is_right():
    assert check_formula("moso") == "moso"
    with pytest.raises(ValueError, match=r"formula must be one of moso, .*, cosine; got 'mos'"):
        check_formula("mos")
    with pytest.raises(ValueError, match="formula must be one of"):
        score("mos", one(1), one(1), one(1), torch.tensor(3))
    for bad in ("0.1", None, True, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match="scale must be a number, got"):
            check_scale(bad)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite, got"):
            check_scale(bad)
    check_count("moso", 0)
    check_count("moso", 2)
    with pytest.raises(ValueError, match="only 1 sample counts"):
        check_count("moso", 1)
