"""Accuracy where float32 is hard: confident models, huge logits, cancellation, duplicates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    CPU_BACKENDS,
    FIELDS,
    Case,
    assert_close,
    assert_stats_match,
    confident_case,
    generator,
    random_case,
    rank_correlation,
    relative_error,
    runs_here,
    score_with,
)
from torch import Tensor

from moso_fast.core.formulas import FORMULAS
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import last_layer_stats, moso_scores

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
# The contract of bitwise equality is about the backend that "auto" takes on a CPU; BLAS, which
# the torch backend stands on, promises it for one thread count only.
any_thread_count = pytest.mark.parametrize(
    "backend",
    [name for name in CPU_BACKENDS if name != "torch"]
    or [pytest.param("cpu", marks=pytest.mark.skip(reason="the C++ backend is not installed"))],
)


def exact_scores(case: Case) -> Tensor:
    reference = closed_form_stats(*case.args, **case.options)
    n = reference.count
    return (n * reference.alignment[0] - reference.grad_sqnorm[0]) / (n - 1)


def textbook(case: Case) -> tuple[Tensor, Tensor]:
    """Loss and scores by ``lse - z_y`` and ``p - 1``, in float32 throughout."""
    h, y, n = case.features, case.labels, len(case.labels)
    z = h @ case.weight.T
    loss = z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]
    r = z.softmax(1) - F.one_hot(y, z.shape[1])
    mean = r.T @ h / n
    a = ((r @ mean) * h).sum(1)
    q = (r**2).sum(1) * (h**2).sum(1)
    return loss, (n * a - q) / (n - 1)


@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@each_backend
def test_entropy_of_a_confident_row_keeps_its_digits_whatever_its_label(
    backend, classes, smoothing
):
    """One class far ahead: the entropy, down to 1e-20, has the digits of float32."""
    gaps = torch.linspace(5, 45, 60)
    logits = -gaps[:, None] - torch.rand(60, classes, generator=generator(5))
    winner = torch.randint(classes, (60,), generator=generator(6))
    logits[torch.arange(60), winner] = 0.0
    labels = (winner + torch.arange(60) % 3) % classes  # right, wrong, wrong, right, ...
    weight = torch.eye(classes)  # the features are the logits, exactly
    stats = last_layer_stats(logits, weight, labels, label_smoothing=smoothing, backend=backend)
    # log S - <z> with log S = log1p(the others): even float64 rounds S itself to 1.
    e = logits.double().exp()
    others = e.scatter(1, winner[:, None], 0.0).sum(1)
    exact = others.log1p() - (e * logits.double()).sum(1) / (1 + others)
    error = (stats.entropy.double() - exact).abs() / exact
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("labels", ["ids", "one_hot"])
@each_backend
def test_confident_model(backend, labels):
    """Losses of 1e-8: relative errors stay at 1e-6 and the ranking is right."""
    case = confident_case()
    reference = closed_form_stats(*case.args)
    assert reference.loss[0].median() < 1e-7
    if labels == "one_hot":
        case = Case(case.features, case.weight, F.one_hot(case.labels, 10).float(), None)
    stats = score_with(backend, case)
    assert_stats_match(stats, reference, 1e-5)
    truth = exact_scores(confident_case())
    assert relative_error(stats.scores(), truth) <= 1e-5
    assert rank_correlation(stats.scores(), truth) > 0.9999
    assert rank_correlation(stats.loss, reference.loss[0]) > 0.9999
    assert rank_correlation(stats.grad_sqnorm, reference.grad_sqnorm[0]) > 0.9999
    # Row by row, not only on the whole: the smallest losses are as exact as the largest.
    for name in ("loss", "el2n"):
        value, exact = getattr(stats, name).double(), getattr(reference, name)[0]
        assert ((value - exact).abs() / exact).max() < 2e-5, name


def test_the_textbook_form_fails_on_the_confident_model():
    """What makes the test above worth its name: p - 1 and lse - z_y lose these samples."""
    case = confident_case()
    reference = closed_form_stats(*case.args)
    loss, scores = textbook(case)
    assert (loss == 0).float().mean() > 0.5
    assert rank_correlation(loss, reference.loss[0]) < 0.95
    assert rank_correlation(scores, exact_scores(case)) < 0.99
    assert relative_error(scores, exact_scores(case)) > 1e-4


@pytest.mark.parametrize("samples_per_class", [2, 20])
@pytest.mark.parametrize("classes", [10, 300])
@each_backend
def test_random_problems_with_cancellation(backend, classes, samples_per_class):
    """With few samples a class N a and q are of equal size and the score is their difference."""
    case = random_case("ids", n=classes * samples_per_class, c=classes, d=64, seed=classes)
    labels = torch.arange(classes).repeat(samples_per_class)
    case = Case(case.features, case.weight, labels, case.bias)
    scores = score_with(backend, case).scores()
    truth = exact_scores(case)
    assert relative_error(scores, truth) <= 1e-5
    assert rank_correlation(scores, truth) > 0.9999


@pytest.mark.skipif(not runs_here("torch", torch.float64), reason="no float64 backend")
@pytest.mark.parametrize("confident", [False, True])
def test_float64_features_to_1e_12(confident):
    case = confident_case() if confident else random_case("ids", n=500, c=20, d=33)
    case = Case(case.features.double(), case.weight, case.labels, case.bias)
    scores = moso_scores(*case.args)
    assert scores.dtype == torch.float64
    assert relative_error(scores, exact_scores(case)) <= 1e-12


@pytest.mark.parametrize("classes", [2, 10, 40])
@each_backend
def test_wrong_label_with_a_gap_of_200(backend, classes):
    """exp(-200) is no float32: the loss must still be the gap."""
    features = torch.eye(3, 5)
    weight = torch.zeros(classes, 5)
    weight[1, 0] = 200.0  # row 0 is predicted as class 1, its label is 0
    labels = torch.tensor([0, 0, 1])
    case = Case(features, weight, labels, None)
    stats = score_with(backend, case)
    assert float(stats.loss[0]) == 200.0 and float(stats.margin[0]) == -200.0
    assert float(stats.el2n[0]) == pytest.approx(2**0.5, rel=1e-6)
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("classes", [2, 10, 40])
@pytest.mark.parametrize("kind", ["ids", "soft", "binary", "mse"])
@each_backend
def test_logits_of_ten_thousand(backend, kind, classes):
    """Integers throughout: float32 logits are exact, so results must be right to rounding."""
    g = generator(11)
    features = torch.randint(-10, 11, (60, 10), generator=g).float()
    weight = torch.randint(-100, 101, (classes, 10), generator=g).float()
    features[0], features[1] = 10.0, -10.0
    weight[0], weight[1] = 100.0, -100.0
    logits = features @ weight.T
    assert logits.max() == 1e4 and logits.min() == -1e4
    case = random_case(kind, n=60, c=classes)
    case = Case(features, weight, case.labels, None, case.options)
    stats = score_with(backend, case)
    for name in FIELDS[:4]:
        assert torch.isfinite(getattr(stats, name)).all(), name
    assert_stats_match(stats, closed_form_stats(*case.args, **case.options), 1e-5, floor=1e-30)


@pytest.mark.parametrize("classes", [1, 2, 3, 40])
@each_backend
def test_all_logits_equal(backend, classes):
    case = random_case("ids", n=50, c=classes, d=9)
    # Sums of eighths are exact in any order.
    features = (8 * case.features).round() / 8
    case = Case(features, torch.ones(classes, 9), case.labels, torch.zeros(classes))
    stats = score_with(backend, case)
    reference = closed_form_stats(*case.args)
    if classes == 1:
        assert (stats.alignment == 0).all() and (stats.grad_sqnorm == 0).all()
        assert (stats.loss == 0).all() and (stats.margin == float("inf")).all()
    assert_stats_match(stats, reference, 1e-5, floor=1e-12)
    assert torch.equal(stats.margin, reference.margin[0].float())


@each_backend
def test_rows_of_very_different_size(backend):
    """Feature norms from 1e-4 to 1e4: small rows keep their own relative accuracy."""
    case = random_case("ids", n=400, c=10, d=16)
    scale = torch.logspace(-4, 4, 400)[torch.randperm(400, generator=generator(6))]
    case = Case(case.features * scale[:, None], case.weight / 1e3, case.labels, case.bias)
    stats, reference = score_with(backend, case), closed_form_stats(*case.args)
    assert_stats_match(stats, reference, 1e-5)
    error = (stats.grad_sqnorm.double() / reference.grad_sqnorm[0] - 1).abs()
    assert error.max() < 1e-3 and error[scale < 1].max() < 1e-5


@each_backend
def test_logits_far_from_zero(backend):
    """A common offset of 1000 changes nothing but the rounding of the logits."""
    case = random_case("ids", n=100, c=10, d=16)
    shifted = Case(case.features, case.weight, case.labels, case.bias + 1000.0)
    stats = score_with(backend, shifted)
    assert_stats_match(stats, closed_form_stats(*shifted.args), 3e-4)


@each_backend
def test_many_equal_rows(backend):
    """Duplicates: rounding errors of a long float32 sum would all point the same way."""
    row = torch.randn(1, 6, generator=generator(1))
    case = Case(
        row.expand(100_000, 6),
        torch.randn(3, 6, generator=generator(2)),
        torch.zeros(100_000, dtype=torch.long),
        torch.ones(3),
    )
    stats = score_with(backend, case)
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)


@pytest.fixture
def thread_count():
    """Set the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


BIT_CASES = {
    "few classes": {"n": 20_011, "c": 10, "d": 65},
    "many classes": {"n": 3001, "c": 129, "d": 70},
    "large mean gradient": {"n": 301, "c": 1100, "d": 500},
    "heads": {"n": 5003, "c": 7, "d": 33, "heads": 3},
    "binary": {"kind": "binary", "n": 5003, "c": 40, "d": 33},
    "sequences": {"n": 5003, "c": 20, "d": 33, "cu_seqlens": torch.tensor([0, 7, 2000, 5003])},
}


def bits(backend: str, case: Case, **options: object) -> list[Tensor]:
    stats = score_with(backend, case, **options)
    fields = [getattr(stats, name) for name in FIELDS]
    return [*fields, *(stats.scores(f) for f in FORMULAS), stats._mean_grad_sqnorm]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", BIT_CASES)
@any_thread_count
def test_bitwise_equal_over_runs_and_thread_counts(backend, name, thread_count):
    case = random_case(**BIT_CASES[name])
    thread_count(1)
    first = bits(backend, case)
    assert_same_bits(first, bits(backend, case))
    for threads in (2, 3, 1):
        thread_count(threads)
        assert_same_bits(first, bits(backend, case))


@pytest.mark.parametrize("name", BIT_CASES)
@each_backend
def test_bitwise_equal_over_runs(backend, name):
    case = random_case(**BIT_CASES[name])
    first = bits(backend, case)
    for _ in range(2):
        assert_same_bits(first, bits(backend, case))
    copies = Case(*(t.clone() for t in case.args), case.options)  # other addresses, same numbers
    assert_same_bits(first, bits(backend, copies))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["few classes", "many classes", "heads", "sequences"])
@each_backend
def test_chunk_sizes_differ_by_rounding_only(backend, name):
    case = random_case(**BIT_CASES[name])
    whole = score_with(backend, case)
    for chunk_size in (257, 1000, 10**9):
        cut = score_with(backend, case, chunk_size=chunk_size)
        for field in FIELDS:
            assert_close(getattr(cut, field), getattr(whole, field), 3e-6, what=field)
        assert_close(cut.scores(), whole.scores(), 3e-6)


@pytest.mark.parametrize("name", ["few classes", "many classes"])
@each_backend
def test_sample_order_permutes_scores_and_nothing_else(backend, name):
    case = random_case(**BIT_CASES[name])
    order = torch.randperm(len(case.labels), generator=generator(13))
    permuted = Case(case.features[order], case.weight, case.labels[order], case.bias)
    left, right = score_with(backend, case), score_with(backend, permuted)
    for field in ("loss", "el2n", "margin", "entropy", "grad_sqnorm"):
        assert_close(getattr(right, field), getattr(left, field)[order], 1e-6, what=field)
    assert_close(right.scores(), left.scores()[order], 3e-6)


@each_backend
def test_more_than_one_statistic_never_mixes_rows(backend):
    """Changing one row changes the row statistics of no other."""
    case = random_case("ids", n=300, c=12, d=40)
    before = last_layer_stats(*case.args, backend=backend)
    features = case.features.clone()
    features[150] *= -3
    after = last_layer_stats(features, case.weight, case.labels, case.bias, backend=backend)
    others = torch.arange(300) != 150
    for field in ("loss", "el2n", "margin", "entropy", "grad_sqnorm"):
        left, right = getattr(before, field), getattr(after, field)
        assert torch.equal(left[others], right[others]) and left[150] != right[150]
