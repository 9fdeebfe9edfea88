"""The whole scoring path through the Triton backend, against the definition."""

from __future__ import annotations

import pytest
import torch
from core_support import (
    CPU_BACKENDS,
    FIELDS,
    KINDS,
    Case,
    assert_close,
    assert_stats_match,
    confident_case,
    generator,
    random_case,
    rank_correlation,
    relative_error,
    score_with,
)
from moso_fast.kernels.row_arguments import LOSSES

from moso_fast import backends
from moso_fast.backends import common
from moso_fast.backends.triton import products as triton_products
from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.choice import REGIME_VARIABLE, REGIMES
from moso_fast.backends.triton.regime import Regime
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.backends.triton.regimes import recompute as triton_recompute
from moso_fast.core import memory
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import explain, last_layer_stats, moso_scores

TRITON = "triton"


# Regimes that run cross-entropy with class ids alone; one head alone; no samples of several rows.
IDS_ONLY = {"recompute"}
ONE_HEAD = {"row_tiles"}
NO_SEQUENCES = {"row_tiles"}


def heads_for(regime: str, heads: int | None) -> int | None:
    """Return so many heads, or the one that the regime takes."""
    return None if regime in ONE_HEAD else heads


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch) -> str:
    """Run the test in every regime, whatever the table would choose."""
    monkeypatch.setenv(REGIME_VARIABLE, request.param)
    return request.param


def each_regime(*kinds: str):
    """Parametrize (kind, regime) by what each regime runs, of losses that the kernels know."""
    known = [k for k in kinds if KINDS[k][0] in LOSSES]
    pairs = [(k, r) for r in REGIMES for k in known if k.startswith("ids") or r not in IDS_ONLY]
    return pytest.mark.parametrize("kind, regime", pairs, indirect=["regime"])


def reference(case: Case):
    """Definition by explicit gradients; the options of a run that it does not know are dropped."""
    return explicit_stats(*case.args, **case.options)


def test_interpreter_makes_it_available_on_a_cpu() -> None:
    assert TRITON in CPU_BACKENDS
    assert "interpreter" in backends()[TRITON].reason
    text = explain(*random_case("ids").args, backend=TRITON)
    assert "backend   triton" in text and "triton: regime " in text
    assert "backend   triton" not in explain(*random_case("ids").args)


@each_regime(*KINDS)
def test_every_loss(kind: str, regime: str) -> None:
    case = random_case(kind, n=37, heads=heads_for(regime, 3))
    assert_stats_match(score_with(TRITON, case), reference(case), 1e-5)


def test_one_head_without_bias(regime: str) -> None:
    case = random_case("ids", n=37, bias=False)
    assert_stats_match(score_with(TRITON, case), reference(case), 1e-5)


@each_regime("ids", "soft", "mse")
def test_weights_chunks_and_recomputed_residuals(kind: str, regime: str) -> None:
    weights = torch.rand(37, generator=generator(3)) + 0.1
    case = random_case(kind, n=37, heads=heads_for(regime, 2), sample_weight=weights)
    for chunk_size in (None, 16):
        stats = score_with(TRITON, case, chunk_size=chunk_size)
        assert_stats_match(stats, reference(case), 1e-5, floor=1e-6)


def test_chunks_of_one_row(regime: str) -> None:
    case = random_case("ids_smoothed", n=7, heads=heads_for(regime, 2))
    assert_stats_match(score_with(TRITON, case, chunk_size=1), reference(case), 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 6])
@each_regime("ids", "soft")
def test_sequences(kind: str, chunk_size: int | None, regime: str) -> None:
    heads = heads_for(regime, 2)
    case = random_case(kind, heads=heads, cu_seqlens=torch.tensor([0, 4, 4, 17]))
    if regime in NO_SEQUENCES:
        with pytest.raises(ValueError, match="samples of several rows need every residual"):
            last_layer_stats(*case.args, **case.options, backend=TRITON)
        return
    if kind == "ids":
        case.labels[2] = -100
    assert_stats_match(score_with(TRITON, case, chunk_size=chunk_size), reference(case), 1e-5)


@pytest.mark.parametrize("regime", sorted(ONE_HEAD), indirect=True)
def test_several_heads_are_refused_with_the_reason(regime: str) -> None:
    case = random_case("ids", heads=2)
    message = f"regime '{regime}' cannot run this problem: it takes one head"
    with pytest.raises(ValueError, match=message):
        last_layer_stats(*case.args, backend=TRITON)


def test_classes_beyond_every_tile_are_refused_with_the_reason(monkeypatch) -> None:
    monkeypatch.setenv(REGIME_VARIABLE, "row_tiles")
    case = random_case("ids", c=257)
    with pytest.raises(ValueError, match="no tile holds C = 257 with these operands"):
        last_layer_stats(*case.args, backend=TRITON)


@pytest.mark.parametrize("classes, dim", [(1, 3), (2, 1), (7, 33), (33, 8), (129, 65), (600, 16)])
def test_shapes(classes: int, dim: int) -> None:
    case = random_case("ids", n=19, c=classes, d=dim)
    assert_stats_match(score_with(TRITON, case), closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes, dim, heads", [(5, 7, 2), (15, 6, None)])
@pytest.mark.parametrize("precision, tolerance", [("highest", 1e-5), ("medium", 1e-2)])
def test_16_bit_features(precision, tolerance, classes, dim, heads, dtype, regime) -> None:
    heads = heads_for(regime, heads)
    case = random_case("ids", n=60, c=classes, d=dim, heads=heads, dtype=dtype)
    stats = score_with(TRITON, case, precision=precision)
    assert_stats_match(stats, reference(case), tolerance)
    error = relative_error(stats.loss.reshape(-1), reference(case).loss.reshape(-1))
    if precision == "medium" and dtype == torch.bfloat16:
        assert error > 1e-5  # the weights really were rounded
    else:
        assert error < 1e-5  # on a CPU only bfloat16 operands are rounded


@pytest.mark.parametrize("classes, dim", [(10, 64), (30, 16)])
def test_self_term_is_as_exact_as_the_norm(classes, dim, regime, monkeypatch) -> None:
    """Two samples a class: N a and q nearly cancel, and rounded residuals would show."""
    case = random_case("ids", n=2 * classes, c=classes, d=dim, dtype=torch.bfloat16)
    labels = torch.arange(classes).repeat(2)
    weight = case.weight.bfloat16().float()
    case = Case(case.features, weight, labels, case.bias, case.options)
    exact = closed_form_stats(*case.args)
    n = exact.count
    truth = (n * exact.alignment[0] - exact.grad_sqnorm[0]) / (n - 1)
    with_term = relative_error(score_with(TRITON, case).scores(), truth)
    monkeypatch.setattr(triton_blas, "lost_self_term", lambda *args: 0.0)
    nothing = property(lambda self: torch.zeros(self.problem.rows))  # whatever is written to it
    monkeypatch.setattr(Regime, "lost", nothing)
    for module in (triton_products, triton_recompute, triton_few_classes):
        monkeypatch.setattr(module, "self_term", lambda *args: None)
    without = relative_error(score_with(TRITON, case).scores(), truth)
    assert with_term < 2e-2  # the interpreter cuts digits off where a GPU rounds
    assert with_term < 0.75 * without


def test_confident_model(regime) -> None:
    case = confident_case(n=300)
    exact = closed_form_stats(*case.args)
    stats = score_with(TRITON, case)
    assert_stats_match(stats, exact, 1e-5)
    assert rank_correlation(stats.loss, exact.loss[0]) > 0.9999
    assert rank_correlation(stats.grad_sqnorm, exact.grad_sqnorm[0]) > 0.9999


def test_many_equal_rows(regime, monkeypatch) -> None:
    """Slabs, batched and left over: a sum in one go would lose two digits."""
    # The interpreter takes its time; where slabs are of fixed length there is more than one.
    rows = {"blas": 20_001, "few_classes": 1_001, "row_tiles": 1_501}.get(regime, 5_001)
    monkeypatch.setattr(triton_regime, "CHUNK_BYTES", {"cpu": 2**30})
    row = torch.randn(1, 6, generator=generator(1))
    case = Case(
        row.expand(rows, 6),
        torch.randn(3, 6, generator=generator(2)),
        torch.zeros(rows, dtype=torch.long),
        torch.ones(3),
    )
    assert_stats_match(score_with(TRITON, case), closed_form_stats(*case.args), 1e-5)


# Slabs of 8 rows with sums of 60 bytes. Nothing to share; less than two sums; two; everything.
@pytest.mark.parametrize("batch_bytes", [0, 119, 120, 2**20])
# No whole slab, one, one and a rest; a group of two, one and a rest, and a slab left over; two
# groups; two groups, a slab and a rest.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 24, 32, 45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_sum(dtype: torch.dtype, rows: int, batch_bytes: int) -> None:
    g = generator(rows)
    residual, features = (torch.randn(rows, m, generator=g).to(dtype) for m in (5, 3))
    strided = torch.randn(rows, 6, generator=g).to(dtype)[:, ::2]
    for given in (features, strided):
        total = common.gradient_sum(residual, given, 8, batch_bytes=batch_bytes)
        assert_close(total, residual.double().T @ given.double(), 1e-6)
        one_by_one = common.gradient_sum(residual, given, 8)
        assert total.dtype == one_by_one.dtype == (torch.float32 if rows <= 8 else torch.float64)
        assert_close(total, one_by_one, 1e-7)


# Of three whole slabs and a shorter one: all in one, two and one, each on its own.
@pytest.mark.parametrize(
    ("batch_bytes", "slabs"),
    [(2**20, [3]), (180, [3]), (179, [2, 1]), (120, [2, 1]), (119, [1, 1, 1]), (0, [1, 1, 1])],
)
def test_slabs_go_in_groups_whose_sums_fit(batch_bytes: int, slabs: list[int], monkeypatch) -> None:
    given, found = common.product, []

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found.append((left.shape[0] if left.dim() == 3 else 1, left.shape[-1]))
        return given(left, right)

    monkeypatch.setattr(common, "product", noted)
    common.gradient_sum(torch.ones(30, 5), torch.ones(30, 3), 8, batch_bytes=batch_bytes)
    assert found == [*((count, 8) for count in slabs), (1, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_may_hold_anything(dtype: torch.dtype, regime: str) -> None:
    case = random_case("ids", n=30, dtype=dtype)
    clean = score_with(TRITON, case, precision="highest", chunk_size=8)
    labels, features = case.labels.clone(), case.features.clone()
    labels[[3, 29]] = -100
    features[3], features[29, 2] = float("nan"), float("inf")
    for chunk_size in (None, 8):
        stats = last_layer_stats(
            features,
            case.weight,
            labels,
            case.bias,
            backend=TRITON,
            precision="highest",
            chunk_size=chunk_size,
        )
        kept = labels != -100
        exact = closed_form_stats(features[kept], case.weight, labels[kept], case.bias)
        for name in FIELDS:
            value = getattr(stats, name)
            assert value[~kept].isnan().all(), name
            assert_close(value[kept], getattr(exact, name)[0], 1e-5, what=name)
    assert clean.count == 30 and stats.count == 28


def test_excluded_rows(regime) -> None:
    case = random_case("ids", n=30)
    features = case.features.clone()
    features[4, 1], features[20] = float("nan"), float("-inf")
    case = Case(features, case.weight, case.labels, case.bias, {"nonfinite": "exclude"})
    for options in ({}, {"chunk_size": 7}):
        exact = closed_form_stats(*case.args, **case.options)
        assert exact.count == 28
        assert_stats_match(
            last_layer_stats(*case.args, backend=TRITON, nonfinite="exclude", **options),
            exact,
            1e-5,
        )


def test_labels_of_every_integer_dtype_and_targets_of_any(regime) -> None:
    case = random_case("ids")
    expected = moso_scores(*case.args, backend=TRITON)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        got = moso_scores(
            case.features, case.weight, case.labels.to(dtype), case.bias, backend=TRITON
        )
        assert torch.equal(got, expected)
    if regime in IDS_ONLY:
        return
    case = random_case("binary")
    expected = moso_scores(*case.args, loss="binary_cross_entropy", backend=TRITON)
    for labels in (case.labels.bool(), case.labels.long(), case.labels.double()):
        for layout in (labels, labels.T.contiguous().T):
            got = moso_scores(
                case.features,
                case.weight,
                layout,
                case.bias,
                loss="binary_cross_entropy",
                backend=TRITON,
            )
            assert torch.equal(got, expected)


def test_strided_features_and_labels(regime) -> None:
    case = random_case("ids", n=30)
    expected = moso_scores(*case.args, backend=TRITON)
    wide = torch.full((30, 17), float("nan"))
    wide[:, 1:15:2] = case.features
    labels = case.labels.repeat_interleave(2)[::2]
    weights = torch.ones(60)[::2]
    for features in (wide[:, 1:15:2], case.features.T.contiguous().T):
        got = moso_scores(
            features, case.weight, labels, case.bias, sample_weight=weights, backend=TRITON
        )
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_bad_input_is_named(chunk_size: int | None, regime: str) -> None:
    options = {"backend": TRITON, "chunk_size": chunk_size}
    case = random_case("ids")
    labels = case.labels.clone()
    labels[6] = 5
    with pytest.raises(ValueError, match=r"^labels\[6\] is 5, outside \[0, 5\)"):
        moso_scores(case.features, case.weight, labels, case.bias, **options)
    features = case.features.clone()
    features[7, 2], features[9] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"^features\[7, 2\] is inf; row 7 is the first"):
        moso_scores(features, case.weight, case.labels, case.bias, **options)
    soft = random_case("soft")
    targets = soft.labels.clone()
    targets[5, 1] = -0.5
    message = "class ids alone" if regime in IDS_ONLY else r"^labels\[5\] holds -0.5 at class 1"
    with pytest.raises(ValueError, match=message):
        moso_scores(soft.features, soft.weight, targets, soft.bias, **options)
    huge = case.features.clone()
    huge[3] = 1e38
    with pytest.raises(ValueError, match=r"of row 3 overflow float32"):
        moso_scores(huge, case.weight, case.labels, case.bias, **options)
    # Logits and loss are small; only |g|^2 = |r|^2 |h|^2 is beyond float32.
    large = torch.full((4, 1), 1e-3)
    large[2] = 3e19
    with pytest.raises(ValueError, match=r"of row 2 overflow float32"):
        moso_scores(large, torch.zeros(2, 1), torch.zeros(4).long(), **options)


def test_runs_are_bitwise_equal(regime) -> None:
    case = random_case("ids", n=200, heads=heads_for(regime, 2))
    first, second = score_with(TRITON, case), score_with(TRITON, case)
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_residuals_are_kept_only_within_the_budget(regime, monkeypatch) -> None:
    calls = []
    original = REGIMES[regime].second

    def spy(self, rows, out, residual, alignment):
        calls.append(residual is not None)
        original(self, rows, out, residual, alignment)

    monkeypatch.setattr(REGIMES[regime], "second", spy)
    case = random_case("ids", n=40)
    kept = score_with(TRITON, case)
    monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    again = score_with(TRITON, case)
    assert calls == [REGIMES[regime].stores_residuals, False]
    for name in FIELDS:
        assert_close(getattr(again, name), getattr(kept, name), 1e-6)


def test_float64_is_refused() -> None:
    case = random_case("ids", dtype=torch.float64)
    with pytest.raises(ValueError, match="float64 accumulators, which only torch has"):
        moso_scores(*case.args, backend=TRITON)
