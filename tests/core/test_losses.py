"""Row statistics of every loss against torch.nn.functional, autograd and exact limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    CPU_BACKENDS,
    KINDS,
    generator,
    oracle_loss,
    random_case,
    rank_correlation,
    score_with,
)
from torch import Tensor

from moso_fast.core.losses import row_statistics


def logits_of(case, dtype=torch.float64) -> Tensor:
    z = case.features.to(dtype) @ case.weight.to(dtype).T
    return (z + case.bias.to(dtype))[:, None, :]


def statistics(logits: Tensor, case, **extra):
    labels = case.labels.to(logits.dtype) if case.labels.dim() == 2 else case.labels
    return row_statistics(logits, labels, **case.options, **extra)


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_residual_equal_autograd(kind, classes):
    case = random_case(kind, c=classes, dtype=torch.float64)
    logits = logits_of(case)
    stats = statistics(logits, case)
    for row in range(len(logits)):
        z = logits[row, 0].clone().requires_grad_()
        loss = oracle_loss(
            z, case.labels[row], case.options["loss"], case.options["label_smoothing"]
        )
        (residual,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(stats.loss[row, 0], loss.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(stats.residual[row, 0], residual, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            stats.residual_sqnorm[row, 0], residual.square().sum(), rtol=1e-11, atol=1e-26
        )


@pytest.mark.parametrize("kind", ["ids", "ids_smoothed", "soft", "soft_smoothed", "one_hot"])
def test_margin_and_entropy_of_cross_entropy(kind):
    case = random_case(kind, n=40, dtype=torch.float64)
    logits = logits_of(case)
    stats = statistics(logits, case)
    label = case.labels if case.labels.dim() == 1 else case.labels.argmax(1)
    for row in range(len(logits)):
        z = logits[row, 0]
        others = [float(z[k]) for k in range(len(z)) if k != int(label[row])]
        assert float(stats.margin[row, 0]) == float(z[label[row]]) - max(others)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["binary", "binary_soft"])
def test_margin_and_entropy_of_binary_cross_entropy(kind):
    case = random_case(kind, n=40, dtype=torch.float64)
    logits = logits_of(case)
    stats = statistics(logits, case)
    signed = torch.where(case.labels >= 0.5, logits[:, 0], -logits[:, 0])
    assert torch.equal(stats.margin[:, 0], signed.min(1).values)
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1)
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-12, atol=1e-14)


def test_a_binary_target_of_one_half_counts_as_on():
    logits, targets = torch.tensor([[[3.0, -2.0]]]), torch.tensor([[0.5, 0.0]])
    stats = row_statistics(logits, targets, loss="binary_cross_entropy")
    assert float(stats.margin) == 2.0


def test_mse_has_neither_margin_nor_entropy():
    case = random_case("mse", dtype=torch.float64)
    stats = statistics(logits_of(case), case)
    assert stats.margin.isnan().all() and stats.entropy.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_sample_weight_multiplies_loss_and_residual_only(kind):
    case = random_case(kind, dtype=torch.float64)
    logits = logits_of(case)
    weight = torch.rand(len(logits), generator=generator(1), dtype=torch.float64) * 3
    weight[0] = 0.0
    plain, weighted = statistics(logits, case), statistics(logits, case, sample_weight=weight)
    torch.testing.assert_close(weighted.loss, plain.loss * weight[:, None])
    torch.testing.assert_close(weighted.residual, plain.residual * weight[:, None, None])
    torch.testing.assert_close(
        weighted.residual_sqnorm, plain.residual_sqnorm * weight[:, None] ** 2
    )
    for name in ("margin", "entropy"):
        torch.testing.assert_close(getattr(weighted, name), getattr(plain, name), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_independent(kind):
    case = random_case(kind, heads=3, dtype=torch.float64)
    logits = torch.einsum("nd,kcd->nkc", case.features, case.weight) + case.bias
    together = statistics(logits, case)
    for head in range(3):
        alone = statistics(logits[:, head : head + 1], case)
        for left, right in zip(together, alone, strict=True):
            torch.testing.assert_close(left[:, head : head + 1], right, equal_nan=True)


def confident_logits() -> tuple[Tensor, Tensor]:
    """Logits whose label leads by 15 to 40: losses of 1e-6 to 1e-17."""
    g = generator(2)
    labels = torch.randint(10, (4000,), generator=g)
    logits = torch.randn(4000, 10, generator=g)
    lead = 15 + 25 * torch.rand(4000, generator=g)
    return (logits + F.one_hot(labels, 10) * lead[:, None]).double().float(), labels


@pytest.mark.parametrize("form", ["ids", "one_hot", "binary"])
def test_confident_rows_keep_float32_accuracy(form):
    logits, labels = confident_logits()
    loss = "cross_entropy"
    if form == "binary":
        loss = "binary_cross_entropy"
        logits = (15 + 5 * logits.abs()) * (2 * F.one_hot(labels, 10) - 1)
    targets = labels if form == "ids" else F.one_hot(labels, 10).float()
    exact_targets = targets.double() if form != "ids" else targets
    got = row_statistics(logits[:, None], targets, loss=loss)
    exact = row_statistics(logits.double()[:, None], exact_targets, loss=loss)
    for name in ("loss", "residual", "residual_sqnorm", "entropy"):
        value, truth = getattr(got, name).double(), getattr(exact, name)
        visible = truth.abs() > 1e-30  # squares below that are subnormal in float32
        error = ((value - truth).abs() / truth.abs())[visible].max()
        assert error < 3e-5, (name, float(error))


def test_the_textbook_forms_lose_confident_rows():
    """The point of the complement form: ``p - 1`` and ``lse - z_y`` fail on these very rows."""
    logits, labels = confident_logits()
    exact = row_statistics(logits.double()[:, None], labels)
    textbook_loss = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    textbook_residual = logits.softmax(1) - F.one_hot(labels, 10)
    assert (textbook_loss == 0).float().mean() > 0.5
    assert (textbook_residual.gather(1, labels[:, None]) == 0).float().mean() > 0.5
    assert rank_correlation(textbook_loss, exact.loss[:, 0]) < 0.95
    ours = row_statistics(logits[:, None], labels)
    assert rank_correlation(ours.loss[:, 0], exact.loss[:, 0]) > 0.9999


@pytest.mark.parametrize("mix", [0.0, 1e-6, 0.1, 0.5])
def test_soft_labels_near_one_hot_are_as_exact_as_ids(mix):
    logits, labels = confident_logits()
    targets = F.one_hot(labels, 10).double() * (1 - mix) + mix / 10
    exact = row_statistics(logits.double()[:, None], targets.float().double())
    got = row_statistics(logits[:, None], targets.float())
    for name in ("loss", "residual"):
        value, truth = getattr(got, name).double(), getattr(exact, name)
        assert float((value - truth).norm() / truth.norm()) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_label_with_a_gap_of_200(dtype):
    logits = torch.tensor([[[0.0, 200.0, -50.0]]], dtype=dtype)
    stats = row_statistics(logits, torch.tensor([0]))
    assert float(stats.loss) == 200.0
    assert float(stats.margin) == -200.0
    expected = torch.tensor([-1.0, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(stats.residual[0, 0], expected, rtol=0, atol=1e-80)
    assert 0 <= float(stats.entropy) < 1e-80


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_logits_of_ten_thousand_stay_finite_and_right(loss, label):
    z = torch.tensor([1e4, -1e4, 1e4 - 1])
    labels = torch.tensor([label])
    if loss != "cross_entropy":
        labels = F.one_hot(labels, 3).float()
    got = row_statistics(z[None, None], labels, loss=loss)
    exact_labels = labels.double() if labels.dim() == 2 else labels
    exact = row_statistics(z.double()[None, None], exact_labels, loss=loss)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.residual.double(), exact.residual, rtol=1e-6, atol=1e-30)
    expected = oracle_loss(z.double(), exact_labels[0], loss)
    torch.testing.assert_close(exact.loss[0, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38])
@pytest.mark.parametrize("soft", [False, True])
def test_equal_logits_are_the_uniform_distribution(value, soft):
    classes = 7
    labels = torch.tensor([3])
    targets = F.one_hot(labels, classes).float() if soft else labels
    stats = row_statistics(torch.full((1, 1, classes), value), targets)
    assert math.isclose(float(stats.loss), math.log(classes), rel_tol=1e-6)
    assert math.isclose(float(stats.entropy), math.log(classes), rel_tol=1e-6)
    assert float(stats.margin) == 0.0
    expected = torch.full((classes,), 1 / classes)
    expected[3] -= 1
    torch.testing.assert_close(stats.residual[0, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
def test_one_class_has_nothing_to_learn(smoothing, soft):
    labels = torch.ones(2, 1) if soft else torch.zeros(2, dtype=torch.long)
    stats = row_statistics(torch.tensor([[[1e4]], [[-3.0]]]), labels, label_smoothing=smoothing)
    assert (stats.residual == 0).all() and (stats.loss == 0).all() and (stats.entropy == 0).all()
    assert (stats.margin == float("inf")).all()


@pytest.mark.parametrize("kind", ["ids", "ids_smoothed", "soft", "one_hot"])
def test_residuals_of_a_softmax_sum_to_zero(kind):
    case = random_case(kind, n=50, c=33, dtype=torch.float64)
    stats = statistics(logits_of(case), case)
    assert stats.residual.sum(-1).abs().max() < 1e-14
    assert (stats.residual_sqnorm <= 2).all() and (stats.entropy >= 0).all()


@pytest.mark.parametrize("classes", [2, 40, 300])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_counts_one_half_as_on(backend, classes):
    case = random_case("binary", c=classes)
    half = replace(case, labels=torch.full_like(case.labels, 0.5))
    margin = score_with(backend, half).margin
    lowest = logits_of(half)[:, 0].min(1).values
    # Counted as off, it would be the highest logit, negated.
    torch.testing.assert_close(margin.double(), lowest, rtol=1e-5, atol=1e-5)
