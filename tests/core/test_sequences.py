"""Sequences through cu_seqlens against explicit gradients, on every CPU backend."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from core_support import (
    CPU_BACKENDS,
    FIELDS,
    assert_close,
    assert_stats_match,
    generator,
    oracle_gradients,
    random_case,
    score_with,
)

from moso_fast.core import sequences
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import last_layer_stats, moso_scores

LAYOUTS = {
    "plain": [0, 4, 9, 10, 17],
    "one": [0, 17],
    "single_tokens": list(range(18)),
    "empty_in_front": [0, 0, 0, 6, 17],
    "empty_in_the_middle": [0, 6, 6, 6, 12, 17],
    "empty_at_the_end": [0, 6, 17, 17, 17],
    "empty_everywhere": [0, 0, 4, 4, 8, 8, 17, 17],
}
each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 6, 16, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_layouts_and_chunks_equal_explicit_gradients(backend, layout, chunk_size):
    """Chunks of 4 and 6 end exactly where some layouts have empty sequences."""
    case = random_case("ids", cu_seqlens=torch.tensor(LAYOUTS[layout]))
    stats = score_with(backend, case, chunk_size=chunk_size)
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["ids", "ids_smoothed", "soft", "binary", "mse"])
@each_backend
def test_losses_heads_and_bias(backend, kind, bias, heads):
    offsets = torch.tensor([0, 5, 6, 6, 17], dtype=torch.int32)
    case = random_case(kind, heads=heads, bias=bias, cu_seqlens=offsets)
    stats = score_with(backend, case, chunk_size=6)
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@each_backend
def test_float64_equals_explicit_gradients_to_1e_12(backend):
    case = random_case("ids", heads=2, dtype=torch.float64, cu_seqlens=torch.tensor([0, 5, 17]))
    stats = score_with(backend, case)
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-12)


def test_scores_equal_autograd_over_whole_sequences():
    case = random_case("ids", dtype=torch.float64)
    tokens, losses = oracle_gradients(case)
    bounds = [0, 5, 6, 17]
    pairs = list(pairwise(bounds))
    gradients = torch.stack([tokens[a:b].sum(0) for a, b in pairs])
    mean = gradients.mean(0)
    alignment, norms = (gradients * mean).sum((1, 2)), gradients.square().sum((1, 2))
    got = moso_scores(*case.args, cu_seqlens=torch.tensor(bounds))
    torch.testing.assert_close(got, (3 * alignment - norms) / 2, rtol=1e-12, atol=1e-14)
    stats = last_layer_stats(*case.args, cu_seqlens=torch.tensor(bounds))
    expected = torch.stack([losses[a:b].sum() for a, b in pairs])
    torch.testing.assert_close(stats.loss, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["ids", "soft"])
@each_backend
def test_means_over_tokens_equal_autograd(backend, kind, layout):
    bounds = LAYOUTS[layout]
    case = random_case(kind, dtype=torch.float64 if backend == "torch" else torch.float32)
    if kind == "ids":
        case.labels[5] = -100
    weights = torch.linspace(0.5, 2.0, 17)
    exact = random_case(kind, dtype=torch.float64)
    tokens, losses = oracle_gradients(exact)
    counted = torch.ones(17, dtype=torch.bool)
    if kind == "ids":
        counted[5] = False
    factors = torch.where(counted, weights.double(), 0.0)
    pairs = list(pairwise(bounds))
    used = torch.tensor([bool(counted[a:b].any()) for a, b in pairs])
    means = [1.0 / max(1, int(counted[a:b].sum())) for a, b in pairs]
    gradients = torch.stack(
        [
            (factors[a:b, None, None] * tokens[a:b]).sum(0) * m
            for (a, b), m in zip(pairs, means, strict=True)
        ]
    )
    expected = torch.stack(
        [(factors[a:b] * losses[a:b]).sum() * m for (a, b), m in zip(pairs, means, strict=True)]
    )
    given = {**case.options, "cu_seqlens": torch.tensor(bounds), "sample_weight": weights}
    stats = last_layer_stats(*case.args, **given, per="token", backend=backend)
    mean = gradients[used].mean(0)
    assert torch.equal(stats.alignment.isnan(), ~used)
    for found, wanted in (
        (stats.alignment, (gradients * mean).sum((1, 2))),
        (stats.grad_sqnorm, gradients.square().sum((1, 2))),
        (stats.loss, expected),
    ):
        assert_close(found[used], wanted[used], 1e-5)


def test_length_of_samples_is_refused_by_name():
    case = random_case("ids", cu_seqlens=torch.tensor([0, 5, 17]))
    with pytest.raises(ValueError, match=r"^per must be one of sample, token; got 'row'"):
        moso_scores(*case.args, **case.options, per="row")
    with pytest.raises(ValueError, match=r"^cu_seqlens must end at the number of rows"):
        moso_scores(*case.args, cu_seqlens=torch.tensor([0, 5, 16]), per="token")
    with pytest.raises(ValueError, match=r"^cu_seqlens must not decrease"):
        moso_scores(*case.args, cu_seqlens=torch.tensor([0, 25, 3, 17]), per="token")


@each_backend
def test_tokens_that_are_left_out_are_none_of_the_mean(backend):
    case = random_case("ids", cu_seqlens=torch.tensor([0, 5, 12, 17]))
    features = case.features.clone()
    features[[1, 7, 8]] = float("nan")
    labels = case.labels.clone()
    labels[[1, 7, 8]] = -100
    options = {**case.options, "per": "token", "backend": backend}
    found = last_layer_stats(
        features, case.weight, case.labels, case.bias, **options, nonfinite="exclude"
    )
    expected = last_layer_stats(case.features, case.weight, labels, case.bias, **options)
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(expected, name), 1e-6, what=name)
    assert found.mean_grad_sqnorm == pytest.approx(expected.mean_grad_sqnorm, rel=1e-6)


def test_rows_that_are_samples_have_no_length():
    case = random_case("ids")
    assert torch.equal(moso_scores(*case.args, per="token"), moso_scores(*case.args))


@each_backend
def test_fields_are_sums_and_means_over_the_counted_tokens(backend):
    labels = random_case("ids").labels.clone()
    labels[[1, 6, 7]] = -100
    case = random_case("ids")
    token = closed_form_stats(case.features, case.weight, labels, case.bias)
    bounds = [0, 4, 9, 17]
    stats = last_layer_stats(
        case.features, case.weight, labels, case.bias,
        cu_seqlens=torch.tensor(bounds), backend=backend,
    )  # fmt: skip
    for s, (a, b) in enumerate(pairwise(bounds)):
        part = slice(a, b)
        assert float(stats.loss[s]) == pytest.approx(float(token.loss[0, part].nansum()), rel=1e-5)
        el2n = float(token.el2n[0, part].square().nansum().sqrt())
        assert float(stats.el2n[s]) == pytest.approx(el2n, rel=1e-5)
        for name in ("margin", "entropy"):
            mean = float(getattr(token, name)[0, part].nanmean())
            assert float(getattr(stats, name)[s]) == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 5])
@each_backend
def test_ignored_tokens_and_wholly_ignored_sequences(backend, chunk_size):
    case = random_case("ids")
    labels = case.labels.clone()
    labels[[0, 4, 5, 6, 7, 8, 16]] = -100  # all of the second sequence, some of the others
    offsets = torch.tensor([0, 4, 9, 9, 17])
    case = random_case("ids", cu_seqlens=offsets)
    case = type(case)(case.features, case.weight, labels, case.bias, case.options)
    stats = score_with(backend, case, chunk_size=chunk_size)
    assert stats.count == 2
    assert stats.alignment.isnan().tolist() == [False, True, True, False]
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("classes, dim", [(3, 5), (40, 33), (200, 100)])
@each_backend
def test_norms_by_pairs_and_by_products_agree_with_the_definition(backend, classes, dim, length):
    """The two ways to a sequence's norm meet at length C D / (C + D): 1.9, 18 and 67 here."""
    case = random_case(
        "ids", n=length + 12, c=classes, d=dim,
        cu_seqlens=torch.tensor([0, 2, length + 2, length + 12]),
    )  # fmt: skip
    stats = score_with(backend, case, chunk_size=16)  # shorter than the long sequence
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_short_sequences_go_through_in_several_rounds(monkeypatch, bias):
    offsets = torch.cat(
        [
            torch.zeros(1, dtype=torch.long),
            torch.arange(1, 34) * 3,
        ]
    )
    case = random_case("ids", n=99, c=30, d=30, bias=bias, heads=2, cu_seqlens=offsets)
    whole = score_with("torch", case)
    monkeypatch.setattr(sequences, "_BLOCK_ELEMENTS", 3000)  # a handful of sequences a round
    rounds = score_with("torch", case)
    assert_close(rounds.grad_sqnorm, whole.grad_sqnorm, 1e-6)
    assert_stats_match(rounds, explicit_stats(*case.args, **case.options), 1e-5)


@each_backend
def test_sequences_of_one_token_are_plain_samples(backend):
    case = random_case("ids")
    plain = score_with(backend, case)
    tokens = score_with(backend, case, cu_seqlens=torch.arange(18))
    for name in FIELDS:
        assert_close(getattr(tokens, name), getattr(plain, name), 2e-6, 1e-9, name)


@each_backend
def test_sample_weights_and_excluded_tokens(backend):
    weight = torch.rand(17, generator=generator(5))
    case = random_case("ids", cu_seqlens=torch.tensor([0, 4, 9, 17]), sample_weight=weight)
    case.features[5, 1] = float("nan")
    case = case.with_options(nonfinite="exclude")
    stats = score_with(backend, case, chunk_size=5)
    assert stats.count == 3 and torch.isfinite(stats.alignment).all()
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
@each_backend
def test_no_rows(backend, offsets, heads):
    case = random_case("ids", n=0, heads=heads, cu_seqlens=torch.tensor(offsets))
    stats = score_with(backend, case)
    lead = () if heads is None else (heads,)
    for name in FIELDS:
        assert getattr(stats, name).shape == (*lead, len(offsets) - 1)
        assert getattr(stats, name).isnan().all()
    assert stats.count == 0 and stats.scores("moso").isnan().all()


@each_backend
def test_one_counted_sequence_has_no_others(backend):
    case = random_case("ids", cu_seqlens=torch.tensor([0, 17, 17]))
    assert score_with(backend, case).count == 1
    with pytest.raises(ValueError, match="only 1 sample counts"):
        moso_scores(*case.args, backend=backend, **case.options)


@pytest.mark.exhaustive
@each_backend
def test_many_sequences_under_every_cut(backend):
    """Sequences stay whole: a chunk is chunk_size rows at most, or one longer sequence."""
    g = generator(3)
    lengths = torch.randint(1, 40, (60,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    case = random_case("ids", n=int(offsets[-1]), c=11, d=6, cu_seqlens=offsets)
    reference = explicit_stats(*case.args, **case.options)
    for chunk_size in (1, 16, 39, 40, 41, 10_000):
        assert_stats_match(score_with(backend, case, chunk_size=chunk_size), reference, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_norm_of_a_long_sequence_is_summed_in_float64(monkeypatch, bias):
    """20,000 tokens and a result of float32 precision, the same bits for any number of threads."""
    tokens = 20_000
    case = random_case("ids", n=tokens, c=3, d=5, bias=bias, cu_seqlens=torch.tensor([0, tokens]))
    # Every token has the same gradient, so that float32 sums round the same way every time.
    case.features.fill_(0.1)
    case.weight.zero_()
    case.labels.zero_()
    exact = explicit_stats(*case.args, **case.options).grad_sqnorm
    monkeypatch.setattr(sequences, "_DIRECT_ROWS", 16)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(score_with("torch", case).grad_sqnorm)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found[1:])
    assert_close(found[0], exact.reshape(found[0].shape), 3e-7)
