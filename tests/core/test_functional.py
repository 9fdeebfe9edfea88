"""moso_scores and last_layer_stats: every input they accept, and what they give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    BACKENDS_AND_DTYPES,
    CPU_BACKENDS,
    FIELDS,
    KINDS,
    Case,
    assert_close,
    assert_stats_match,
    generator,
    random_case,
    refusal,
    score_with,
)

import moso_fast
from moso_fast.core import operator
from moso_fast.core.formulas import FORMULAS
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import LastLayerStats, last_layer_stats, moso_scores

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_equals_explicit_per_sample_gradients(backend, dtype, kind, heads, bias):
    case = random_case(kind, n=30, heads=heads, bias=bias, dtype=dtype)
    stats = score_with(backend, case)
    reference = explicit_stats(*case.args, **case.options)
    assert_stats_match(stats, reference, TOLERANCE[dtype])
    for formula in FORMULAS:
        n, g2 = 30, reference.mean_grad_sqnorm[:, None]
        a, q = reference.alignment, reference.grad_sqnorm
        expected = {
            "moso": (n * a - q) / (n - 1),
            "one_step": ((n + 1) * a - n * g2 - q) / (n - 1) ** 2,
            "official": a - q / n,
            "official_exact": ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / (n - 1) ** 2,
            "alignment": a,
            "cosine": a / (q * g2).sqrt(),
        }[formula]
        scores = moso_scores(*case.args, formula=formula, backend=backend, **case.options)
        assert scores.dtype == dtype and scores.shape == stats.alignment.shape
        assert_close(scores.reshape(expected.shape), expected, TOLERANCE[dtype], what=formula)


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 100, 129])
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 64, 100, 513])
@each_backend
def test_shapes_off_every_tile(backend, classes, dim):
    case = random_case("ids", n=37, c=classes, d=dim)
    stats = score_with(backend, case)
    reference = closed_form_stats(*case.args)
    assert_stats_match(stats, reference, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("heads", [None, 2])
@each_backend
def test_row_counts_off_every_tile(backend, heads, rows):
    case = random_case("ids", n=rows, c=10, d=20, heads=heads)
    stats = score_with(backend, case)
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)
    if rows == 1:
        assert_close(stats.alignment, stats.grad_sqnorm, 1e-6)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formula", FORMULAS)
@each_backend
def test_empty_input_gives_empty_output(backend, formula, kind, heads):
    case = random_case(kind, n=0, heads=heads)
    if (reason := refusal(backend, case)) is not None:
        pytest.skip(reason)
    scores = moso_scores(*case.args, formula=formula, backend=backend, **case.options)
    assert scores.shape == ((0,) if heads is None else (2, 0)) and scores.dtype == torch.float32
    stats = last_layer_stats(*case.args, backend=backend, **case.options)
    assert stats.count == 0
    norm = stats.mean_grad_sqnorm
    assert norm == 0.0 if heads is None else norm.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sequences", [False, True])
@each_backend
def test_heads_together_equal_heads_one_by_one(backend, sequences):
    options = {"cu_seqlens": torch.tensor([0, 9, 10, 40])} if sequences else {}
    case = random_case("ids", n=40, heads=4, **options)
    together = score_with(backend, case)
    assert together.mean_grad_sqnorm.shape == (4,)
    for head in range(4):
        single = Case(case.features, case.weight[head], case.labels, case.bias[head], case.options)
        alone = score_with(backend, single)
        assert isinstance(alone.mean_grad_sqnorm, float)
        for name in FIELDS:
            assert_close(getattr(together, name)[head], getattr(alone, name), 2e-6, 1e-8, name)
        assert float(together.mean_grad_sqnorm[head]) == pytest.approx(
            alone.mean_grad_sqnorm, rel=1e-5
        )


def test_one_head_with_a_leading_axis_keeps_it():
    case = random_case("ids", heads=1)
    stats = last_layer_stats(*case.args)
    assert stats.alignment.shape == (1, 17) and stats.scores().shape == (1, 17)


def views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the same numbers with every kind of strides."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
    wide[..., 3::2] = tensor
    offset = torch.empty(tensor.numel() + 5)[5:].view(tensor.shape).copy_(tensor)
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    padded[..., 1 : 1 + tensor.shape[-1]] = tensor
    last = tensor.dim() - 1
    return {
        "strided": wide[..., 3::2],
        "offset": offset,
        "padded": padded[..., 1 : 1 + tensor.shape[-1]],
        "transposed": tensor.transpose(0, last).contiguous().transpose(0, last),
        "reversed twice": tensor.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("name", ["strided", "offset", "padded", "transposed", "reversed twice"])
@each_backend
def test_views_give_what_contiguous_tensors_give(backend, name, heads):
    case = random_case("soft", n=40, c=12, d=20, heads=heads)
    weight = torch.rand(40, generator=generator(4))
    plain = last_layer_stats(*case.args, sample_weight=weight, backend=backend)
    viewed = (views(t)[name] for t in case.args)
    stats = last_layer_stats(*viewed, sample_weight=views(weight)[name], backend=backend)
    for field in FIELDS:
        assert_close(getattr(stats, field), getattr(plain, field), 2e-6, 1e-9, field)


@each_backend
def test_strided_and_broadcast_integer_labels(backend):
    case = random_case("ids", n=40)
    expected = moso_scores(*case.args, backend=backend)
    wide = torch.full((40, 3), 999)
    wide[:, 1] = case.labels
    got = moso_scores(case.features, case.weight, wide[:, 1], case.bias, backend=backend)
    assert_close(got, expected, 2e-6)
    same = torch.tensor(2).expand(40)
    got = moso_scores(case.features, case.weight, same, case.bias, backend=backend)
    expected = moso_scores(case.features, case.weight, same.clone(), case.bias, backend=backend)
    assert torch.equal(got, expected)


@each_backend
def test_expanded_features_are_rows_all_alike(backend):
    """Stride 0: a million rows without a million rows of memory."""
    row = torch.randn(1, 6, generator=generator(1))
    weight = torch.randn(3, 6, generator=generator(2))
    labels = torch.zeros(100_000, dtype=torch.long)
    stats = last_layer_stats(row.expand(100_000, 6), weight, labels, backend=backend)
    one = explicit_stats(row, weight, labels[:1])
    assert stats.count == 100_000
    for value in (stats.alignment, stats.grad_sqnorm):
        assert_close(value, one.grad_sqnorm[0].expand(100_000), 1e-5)


@pytest.mark.parametrize("precision", [None, "highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@each_backend
def test_features_of_16_bits(backend, dtype, precision):
    """The reference takes the rounded features: only the arithmetic may differ."""
    case = random_case("ids", n=200, c=10, d=32, dtype=dtype)
    stats = score_with(backend, case, precision=precision)
    assert stats.alignment.dtype == torch.float32
    effective = precision or ("highest" if dtype == torch.float32 else "medium")
    tolerance = {"highest": 1e-5, "high": 5e-3, "medium": 1e-2}[effective]
    reference = closed_form_stats(*case.args)
    assert_stats_match(stats, reference, tolerance)
    expected = (200 * reference.alignment[0] - reference.grad_sqnorm[0]) / 199
    assert_close(stats.scores(), expected, tolerance)


@pytest.mark.parametrize(
    "features, weight", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64),
                         (torch.float64, torch.float32), (torch.float16, torch.float32)]
)  # fmt: skip
@each_backend
def test_heads_of_another_dtype_are_converted(backend, features, weight):
    case = random_case("ids", n=40)
    case = Case(case.features.to(features), case.weight.to(weight), case.labels,
                case.bias.to(weight), case.options)  # fmt: skip
    stats = score_with(backend, case, precision="highest")
    expected = torch.float64 if features == torch.float64 else torch.float32
    assert stats.alignment.dtype == expected
    assert_stats_match(stats, closed_form_stats(*case.args), TOLERANCE[expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
@each_backend
def test_sample_weights_of_any_dtype(backend, dtype):
    weight = torch.arange(17).remainder(4).to(dtype)
    case = random_case("ids", sample_weight=weight)
    stats = score_with(backend, case)
    assert stats.count == 17  # a weight of 0 still counts
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)
    assert (stats.grad_sqnorm[weight == 0] == 0).all()


def test_stats_are_one_frozen_object():
    case = random_case("ids")
    stats = last_layer_stats(*case.args)
    assert isinstance(stats, LastLayerStats) and isinstance(stats.count, int)
    with pytest.raises(AttributeError):
        stats.loss = None
    with pytest.raises(ValueError, match="formula must be one of"):
        stats.scores("x")
    with pytest.raises(ValueError, match="scale must be finite"):
        stats.scores(scale=math.inf)
    for formula in FORMULAS:
        expected = moso_scores(*case.args, formula=formula, scale=0.3)
        assert torch.equal(stats.scores(formula, 0.3), expected)


@pytest.mark.parametrize("heads", [None, 1, 2])
def test_scores_that_a_backend_brings_are_taken(heads, monkeypatch):
    """Some compute them with the rest: nothing is computed again then."""
    asked = []
    real = operator.score

    def bringing(problem, backend, chunk_size, formula, scale):
        asked.append((backend, chunk_size, formula, scale))
        results, _, name = real(problem, backend, chunk_size, None, 1.0)
        return results, None if formula is None else brought, name

    case, brought = random_case("ids", heads=heads), torch.randn(heads or 1, 17)
    monkeypatch.setattr(operator, "score", bringing)
    scores = moso_scores(*case.args, formula="one_step", scale=0.3, backend="torch", chunk_size=5)
    assert torch.equal(scores, brought[0] if heads is None else brought)
    last_layer_stats(*case.args, backend="torch", chunk_size=5)
    assert asked == [("torch", 5, "one_step", 0.3), ("torch", 5, None, 1.0)]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_single_sample_that_counts(formula):
    """An error where it is compared with the others, else a score."""
    case = random_case("ids", n=3, ignore_index=-1)
    case.labels[1:] = -1
    stats = score_with("torch", case)
    if formula in ("official", "alignment", "cosine"):
        assert stats.scores(formula).isnan().tolist() == [False, True, True]
        return
    message = f"^formula='{formula}' compares a sample with the others, but only 1 sample counts"
    with pytest.raises(ValueError, match=message):
        stats.scores(formula)
    with pytest.raises(ValueError, match=message):
        moso_scores(*case.args, formula=formula, **case.options)


def test_equals_the_formula_in_the_docstring():
    case = random_case("ids", bias=False, dtype=torch.float64)
    h, w, y, n = case.features, case.weight, case.labels, 17
    r = (h @ w.T).softmax(1) - F.one_hot(y, 5)
    mean = r.T @ h / n
    a = ((r @ mean) * h).sum(1)
    q = (r**2).sum(1) * (h**2).sum(1)
    expected = 0.1 * (n * a - q) / (n - 1)
    torch.testing.assert_close(moso_scores(h, w, y, scale=0.1), expected, rtol=1e-12, atol=1e-15)


def test_public_names():
    for name in ("moso_scores", "last_layer_stats", "LastLayerStats", "explain", "backends"):
        assert getattr(moso_fast, name) is not None and name in moso_fast.__all__
