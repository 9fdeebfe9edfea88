"""The definition against torch.autograd and F.linear_cross_entropy, both in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    FIELDS,
    KINDS,
    Case,
    assert_close,
    generator,
    oracle_gradients,
    random_case,
)

from moso_fast.core.reference import closed_form_stats, explicit_stats, per_sample_gradients

F64 = torch.float64
IDS = [kind for kind, (_, shape, _) in KINDS.items() if shape == "ids"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_equal_autograd(kind, classes, bias):
    case = random_case(kind, c=classes, bias=bias, dtype=F64)
    gradients, losses = oracle_gradients(case)
    got = per_sample_gradients(*case.args, **case.options)
    assert got.shape == (1, 17, classes, 8 if bias else 7)
    torch.testing.assert_close(got[0], gradients, rtol=1e-12, atol=1e-14)
    stats = explicit_stats(*case.args, **case.options)
    mean = gradients.mean(0)
    torch.testing.assert_close(stats.loss[0], losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.mean_grad[0], mean, rtol=1e-12, atol=1e-14)
    expected = {
        "alignment": (gradients * mean).sum((1, 2)),
        "grad_sqnorm": gradients.square().sum((1, 2)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name)[0], value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.mean_grad_sqnorm[0], mean.square().sum())
    assert stats.count == 17


@pytest.mark.parametrize("kind", KINDS)
def test_sample_weights_and_el2n(kind):
    weight = torch.rand(17, generator=generator(9), dtype=F64) * 2
    case = random_case(kind, dtype=F64, sample_weight=weight)
    gradients, losses = oracle_gradients(case)
    stats = explicit_stats(*case.args, **case.options)
    torch.testing.assert_close(stats.loss[0], losses, rtol=1e-12, atol=1e-14)
    norms = gradients.square().sum((1, 2))
    torch.testing.assert_close(stats.grad_sqnorm[0], norms, rtol=1e-12, atol=1e-14)
    h2 = case.features.square().sum(1) + 1
    torch.testing.assert_close(stats.el2n[0], (norms / h2).sqrt(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_equals_explicit(kind, bias, heads):
    case = random_case(kind, heads=heads, bias=bias, dtype=F64)
    explicit = explicit_stats(*case.args, **case.options)
    closed = closed_form_stats(*case.args, **case.options)
    for name in (*FIELDS, "mean_grad", "mean_grad_sqnorm"):
        assert_close(getattr(closed, name), getattr(explicit, name), 1e-13, 1e-15, name)
    assert closed.count == explicit.count == 17


@pytest.mark.parametrize("kind", IDS)
def test_ignored_rows_are_nan_and_do_not_count(kind):
    case = random_case(kind, dtype=F64)
    keep = torch.ones(17, dtype=torch.bool)
    keep[[0, 5, 16]] = False
    labels = torch.where(keep, case.labels, -7)
    subset = Case(case.features[keep], case.weight, case.labels[keep], case.bias, case.options)
    for form in (explicit_stats, closed_form_stats):
        stats = form(case.features, case.weight, labels, case.bias, ignore_index=-7, **case.options)
        expected = form(*subset.args, **subset.options)
        assert stats.count == 14
        for name in FIELDS:
            assert getattr(stats, name)[0, ~keep].isnan().all()
            assert_close(getattr(stats, name)[:, keep], getattr(expected, name), 1e-13, what=name)
        assert_close(stats.mean_grad, expected.mean_grad, 1e-13)
    gradients = per_sample_gradients(
        case.features, case.weight, labels, case.bias, ignore_index=-7, **case.options
    )
    assert (gradients[0, ~keep] == 0).all() and (gradients[0, keep] != 0).any()


def test_rows_with_nonfinite_features_are_excluded_on_request():
    case = random_case("ids", dtype=F64)
    features = case.features.clone()
    features[3, 2], features[7, 0] = float("nan"), float("inf")
    keep = torch.isfinite(features).all(1)
    rest = closed_form_stats(features[keep], case.weight, case.labels[keep], case.bias)
    for form in (explicit_stats, closed_form_stats):
        stats = form(features, case.weight, case.labels, case.bias, nonfinite="exclude")
        assert stats.count == 15
        assert stats.alignment[0, ~keep].isnan().all()
        assert_close(stats.alignment[:, keep], rest.alignment, 1e-13)


def test_ignoring_everything_leaves_nothing():
    case = random_case("ids", dtype=F64)
    labels = torch.full_like(case.labels, -100)
    for form in (explicit_stats, closed_form_stats):
        stats = form(case.features, case.weight, labels, case.bias)
        assert stats.count == 0 and stats.alignment.isnan().all()
        assert float(stats.mean_grad_sqnorm[0]) == 0.0


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no F.linear_cross_entropy"
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_mean_gradient_equal_linear_cross_entropy(smoothing):
    case = random_case("ids", n=40, c=9, dtype=F64)
    labels = case.labels.clone()
    labels[[2, 11]] = -100
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    loss = F.linear_cross_entropy(
        case.features, weight, labels, linear_bias=bias, label_smoothing=smoothing
    )
    weight_grad, bias_grad = torch.autograd.grad(loss, (weight, bias))
    stats = closed_form_stats(
        case.features, case.weight, labels, case.bias, label_smoothing=smoothing
    )
    mean_grad = torch.cat([weight_grad, bias_grad[:, None]], 1)
    torch.testing.assert_close(stats.loss.nansum() / stats.count, loss.detach())
    torch.testing.assert_close(stats.mean_grad[0], mean_grad, rtol=1e-11, atol=1e-14)


def test_equals_the_formula_in_the_docstring():
    case = random_case("ids", bias=False, dtype=F64)
    h, w, y, n = case.features, case.weight, case.labels, 17
    r = (h @ w.T).softmax(1) - F.one_hot(y, 5)
    mean = r.T @ h / n
    a = ((r @ mean) * h).sum(1)
    q = (r**2).sum(1) * (h**2).sum(1)
    stats = closed_form_stats(h, w, y)
    torch.testing.assert_close(stats.alignment[0], a, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(stats.grad_sqnorm[0], q, rtol=1e-12, atol=1e-15)


def test_gradient_of_a_sequence_is_the_sum_over_its_tokens():
    case = random_case("ids", dtype=F64)
    labels = case.labels.clone()
    labels[4] = -100
    offsets = torch.tensor([0, 3, 3, 8, 17])
    tokens = per_sample_gradients(case.features, case.weight, labels, case.bias)[0]
    got = per_sample_gradients(case.features, case.weight, labels, case.bias, cu_seqlens=offsets)[0]
    expected = torch.stack([tokens[a:b].sum(0) for a, b in ((0, 3), (3, 3), (3, 8), (8, 17))])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_closed_form_refuses_sequences_and_dtype_is_a_choice():
    case = random_case("ids")
    with pytest.raises(ValueError, match="closed_form_stats has no sequences"):
        closed_form_stats(*case.args, cu_seqlens=torch.tensor([0, 17]))
    single = explicit_stats(*case.args, dtype=torch.float32)
    double = explicit_stats(*case.args)
    assert single.alignment.dtype == torch.float32 and double.alignment.dtype == F64
    assert_close(single.alignment, double.alignment, 1e-5)
