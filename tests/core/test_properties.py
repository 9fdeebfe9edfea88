"""Laws that any right implementation obeys, on problems that Hypothesis draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    BACKENDS_AND_DTYPES,
    FIELDS,
    KINDS,
    Case,
    assert_close,
    generator,
    oracle_loss,
    random_case,
    refusal,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moso_fast.functional import LastLayerStats, last_layer_stats

laws = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
runs = st.sampled_from(BACKENDS_AND_DTYPES)
seeds = st.integers(0, 2**20)
SOFTMAX = [kind for kind, (loss, _, _) in KINDS.items() if loss == "cross_entropy"]
IDS = ["ids", "ids_smoothed"]

# Rounding of the quantities themselves: float32 results, float64 ones.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14}


@st.composite
def cases(draw, kinds=tuple(KINDS), least: int = 1, heads=(None, 2)):
    """Draw a backend, a dtype it runs and a small problem."""
    backend, dtype = draw(runs)
    case = random_case(
        draw(st.sampled_from(list(kinds))),
        n=draw(st.integers(least, 40)),
        c=draw(st.integers(1, 20)),
        d=draw(st.integers(1, 20)),
        heads=draw(st.sampled_from(heads)),
        bias=draw(st.booleans()),
        dtype=dtype,
        seed=draw(seeds),
    )
    assume(refusal(backend, case) is None)
    return backend, case


def stats_of(backend: str, case: Case, **options: object) -> LastLayerStats:
    return last_layer_stats(*case.args, backend=backend, **{**case.options, **options})


def assert_same(case: Case, left: Tensor, right: Tensor, what: str = "") -> None:
    """Equal up to the rounding of the dtype of the case."""
    dtype = case.features.dtype
    assert_close(left, right, TOLERANCE[dtype], FLOOR[dtype], what)


def norms(stats: LastLayerStats) -> Tensor:
    return torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64).reshape(-1)


@laws
@given(cases())
def test_alignments_sum_to_n_times_the_squared_mean_gradient(drawn):
    backend, case = drawn
    stats = stats_of(backend, case)
    a, q = stats.alignment.double(), stats.grad_sqnorm.double()
    n, g2 = stats.count, norms(stats)
    total = a.reshape(len(g2), -1).sum(1)
    scale = (g2.sqrt() * q.sqrt().reshape(len(g2), -1).sum(1)).clamp_min(1e-30)
    assert ((total - n * g2).abs() <= TOLERANCE[case.features.dtype] * scale + 1e-30).all()


@laws
@given(cases())
def test_cauchy_schwarz_and_signs(drawn):
    backend, case = drawn
    stats = stats_of(backend, case)
    a, q = (t.double().reshape(len(norms(stats)), -1) for t in (stats.alignment, stats.grad_sqnorm))
    bound = q.sqrt() * norms(stats).sqrt()[:, None]
    tolerance = TOLERANCE[case.features.dtype]
    assert (a.abs() <= bound * (1 + tolerance) + 1e-12).all()
    assert (q >= 0).all() and (stats.el2n >= 0).all()
    # The mean of the squared norms is at least the squared norm of the mean (variance >= 0).
    assert (q.mean(1) >= norms(stats) * (1 - tolerance) - 1e-12).all()


@laws
@given(cases(), seeds)
def test_permutation(drawn, seed):
    backend, case = drawn
    order = torch.randperm(len(case.features), generator=generator(seed))
    permuted = replace(case, features=case.features[order], labels=case.labels[order])
    left, right = stats_of(backend, case), stats_of(backend, permuted)
    for name in FIELDS:
        assert_same(case, getattr(right, name), getattr(left, name)[..., order], name)


@laws
@given(cases())
def test_duplicating_the_data_leaves_alignments_alone(drawn):
    """The mean gradient is the same; only N doubles."""
    backend, case = drawn
    twice = replace(
        case,
        features=torch.cat([case.features] * 2),
        labels=torch.cat([case.labels] * 2),
    )
    left, right = stats_of(backend, case), stats_of(backend, twice)
    assert right.count == 2 * left.count
    for name in FIELDS:
        half = getattr(left, name)
        assert_same(case, getattr(right, name), torch.cat([half, half], -1), name)
    assert_same(case, norms(right), norms(left))


@laws
@given(cases(kinds=SOFTMAX), seeds)
def test_softmax_does_not_see_a_vector_added_to_every_class(drawn, seed):
    backend, case = drawn
    g = generator(seed)
    vector = torch.randn(case.features.shape[1], generator=g).to(case.weight.dtype)
    shifted = replace(case, weight=case.weight + vector)
    left, right = stats_of(backend, case), stats_of(backend, shifted)
    for name in FIELDS:
        dtype = case.features.dtype
        value, expected = getattr(right, name), getattr(left, name)
        # The logits grow by a common number, and their rounding with them.
        assert_close(value, expected, 20 * TOLERANCE[dtype], 20 * FLOOR[dtype], name)


@laws
@given(cases(), seeds)
def test_order_of_the_classes(drawn, seed):
    backend, case = drawn
    order = torch.randperm(case.weight.shape[-2], generator=generator(seed))
    labels = case.labels
    labels = labels[:, order] if labels.dim() == 2 else order.argsort()[labels]
    permuted = replace(
        case,
        weight=case.weight[..., order, :],
        labels=labels,
        bias=None if case.bias is None else case.bias[..., order],
    )
    left, right = stats_of(backend, case), stats_of(backend, permuted)
    for name in FIELDS:
        assert_same(case, getattr(right, name), getattr(left, name), name)


@laws
@given(cases(), seeds)
def test_rotating_features_and_heads(drawn, seed):
    backend, case = drawn
    d = case.features.shape[1]
    random = torch.randn(d, d, generator=generator(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(random).Q
    rotated = replace(
        case,
        features=(case.features.double() @ rotation).to(case.features.dtype),
        weight=(case.weight.double() @ rotation).to(case.weight.dtype),
    )
    left, right = stats_of(backend, case), stats_of(backend, rotated)
    for name in FIELDS:
        dtype = case.features.dtype
        value, expected = getattr(right, name), getattr(left, name)
        assert_close(value, expected, 10 * TOLERANCE[dtype], 10 * FLOOR[dtype], name)


@laws
@given(cases(kinds=["ids"], heads=(None,)))
def test_two_class_softmax_is_logistic_regression(drawn):
    """Logits (0, z): the residual is the logistic one, once with each sign."""
    backend, case = drawn
    c, dtype = 1, case.features.dtype
    head = case.weight[:c]
    bias = None if case.bias is None else case.bias[:c]
    labels = torch.arange(len(case.features)).remainder(2)
    softmax = Case(
        case.features,
        torch.cat([torch.zeros_like(head), head]),
        labels,
        None if bias is None else torch.cat([torch.zeros_like(bias), bias]),
        {},
    )
    logistic = Case(
        case.features, head, labels[:, None].to(dtype), bias, {"loss": "binary_cross_entropy"}
    )
    two, one = stats_of(backend, softmax), stats_of(backend, logistic)
    for name in ("alignment", "grad_sqnorm"):
        assert_same(case, getattr(two, name), 2 * getattr(one, name), name)
    for name in ("loss", "margin", "entropy"):
        assert_same(case, getattr(two, name), getattr(one, name), name)
    assert_same(case, two.el2n, one.el2n * 2**0.5)


@pytest.mark.exhaustive
@laws
@given(cases(heads=(None,), least=2))
def test_finite_differences(drawn):
    """Moving the head along -G changes the loss of a sample at the rate -alignment."""
    backend, case = drawn
    stats = stats_of(backend, case)
    h = case.features.double()
    if case.bias is not None:
        h = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)
    theta = case.weight.double()
    if case.bias is not None:
        theta = torch.cat([theta, case.bias.double()[:, None]], 1)
    labels = case.labels.double() if case.labels.dim() == 2 else case.labels
    loss, smoothing = case.options["loss"], case.options["label_smoothing"]

    def losses(parameters: Tensor) -> Tensor:
        rows = zip(h @ parameters.T, labels, strict=True)
        return torch.stack([oracle_loss(z, label, loss, smoothing) for z, label in rows])

    theta.requires_grad_()
    (mean_grad,) = torch.autograd.grad(losses(theta).mean(), theta)
    step = 1e-5 / float(mean_grad.norm().clamp_min(1.0))
    with torch.no_grad():
        change = losses(theta + step * mean_grad) - losses(theta - step * mean_grad)
    assert_close(stats.alignment, change / (2 * step), 1e-4, 1e-5)


@laws
@given(cases(), st.floats(0.01, 10))
def test_equal_sample_weights_scale_gradients(drawn, factor):
    backend, case = drawn
    weight = torch.full((len(case.features),), factor)
    factor = float(weight[0])
    left, right = stats_of(backend, case), stats_of(backend, case, sample_weight=weight)
    for name in ("alignment", "grad_sqnorm"):
        assert_same(case, getattr(right, name) / factor**2, getattr(left, name), name)
    for name in ("loss", "el2n"):
        assert_same(case, getattr(right, name) / factor, getattr(left, name), name)
    for name in ("margin", "entropy"):
        assert_same(case, getattr(right, name), getattr(left, name), name)


@laws
@given(cases(kinds=IDS), seeds, st.integers(-5, 300))
def test_ignoring_rows_is_leaving_them_out(drawn, seed, ignore_index):
    backend, case = drawn
    keep = torch.rand(len(case.features), generator=generator(seed)) < 0.6
    ignore_index = ignore_index if ignore_index < 0 else case.weight.shape[-2] + ignore_index
    ignored = replace(case, labels=torch.where(keep, case.labels, ignore_index))
    subset = replace(case, features=case.features[keep], labels=case.labels[keep])
    left = stats_of(backend, ignored, ignore_index=ignore_index)
    right = stats_of(backend, subset)
    assert left.count == right.count == int(keep.sum())
    for name in FIELDS:
        value = getattr(left, name)
        assert value[..., ~keep].isnan().all()
        assert_same(case, value[..., keep], getattr(right, name), name)


@laws
@given(cases(), st.integers(1, 50))
def test_any_chunk_size(drawn, chunk_size):
    backend, case = drawn
    left, right = stats_of(backend, case), stats_of(backend, case, chunk_size=chunk_size)
    for name in FIELDS:
        assert_same(case, getattr(right, name), getattr(left, name), name)
    assert_same(case, norms(right), norms(left))


@laws
@given(cases(), st.lists(st.integers(0, 40), max_size=6), st.integers(1, 50))
def test_losses_and_mean_gradient_of_sequences(drawn, cuts, chunk_size):
    """Cutting rows into sequences keeps the total gradient and the total loss."""
    backend, case = drawn
    rows = len(case.features)
    offsets = torch.tensor([0, *sorted(min(cut, rows) for cut in cuts), rows])
    plain = stats_of(backend, case)
    cut = stats_of(backend, case, cu_seqlens=offsets, chunk_size=chunk_size)
    assert cut.count == int((offsets.diff() > 0).sum())
    assert_same(case, cut.loss.nansum(-1), plain.loss.sum(-1))
    # G is a mean over samples: N_sequences G_sequences = N_rows G_rows.
    assert_same(case, norms(cut) * cut.count**2, norms(plain) * plain.count**2)
    a, q = cut.alignment.double(), cut.grad_sqnorm.double()
    total = a.nansum(-1).reshape(-1)
    scale = norms(cut).sqrt() * q.nan_to_num().sqrt().sum(-1).reshape(-1)
    tolerance = TOLERANCE[case.features.dtype]
    assert ((total - cut.count * norms(cut)).abs() <= tolerance * scale + 1e-30).all()


@laws
@given(cases(kinds=["ids"]))
def test_one_hot_probabilities_are_class_ids(drawn):
    backend, case = drawn
    one_hot = F.one_hot(case.labels, case.weight.shape[-2]).to(case.features.dtype)
    left, right = stats_of(backend, case), stats_of(backend, replace(case, labels=one_hot))
    for name in FIELDS:
        assert_same(case, getattr(right, name), getattr(left, name), name)
