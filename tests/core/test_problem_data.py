"""Bad values in the data: their one-line errors, and rows that do not count."""

from __future__ import annotations

import re

import pytest
import torch
from core_support import CPU_BACKENDS, assert_stats_match, random_case
from problem_cases import (
    INF,
    NAN,
    PROBABILITIES,
    C,
    D,
    N,
    assert_refused,
    changed,
    good,
    table,
    zeros,
)

from moso_fast.core.errors import DataError
from moso_fast.core.reference import explicit_stats
from moso_fast.functional import last_layer_stats, moso_scores

WEIGHTS = torch.ones(N)

SHOWN_BY_DATA = table(
    ("label too large", DataError,
     "labels[4] is 3, outside [0, 3) and not ignore_index (-100)", changed("labels", (4,), 3)),
    ("label negative", DataError,
     "labels[0] is -1, outside [0, 3) and not ignore_index (-100)", changed("labels", (0,), -1)),
    ("label of 2**62", DataError,
     "labels[5] is 4611686018427387904, outside [0, 3) and not ignore_index (-100)",
     changed("labels", (5,), 2**62)),
    ("label -100 under another ignore_index", DataError,
     "labels[2] is -100, outside [0, 3) and not ignore_index (-1)",
     {**changed("labels", (2,), -100), "ignore_index": -1}),
    ("first of two bad labels", DataError,
     "labels[1] is 9, outside [0, 3) and not ignore_index (-100)",
     changed("labels", (1,), 9, **changed("labels", (5,), 7))),
    ("nan feature", DataError,
     "features[4, 2] is nan; row 4 is the first with a non-finite value (nonfinite='exclude' "
     "scores the others)", changed("features", (4, 2), NAN)),
    ("infinite feature", DataError,
     "features[0, 3] is inf; row 0 is the first with a non-finite value (nonfinite='exclude' "
     "scores the others)", changed("features", (0, 3), INF)),
    ("negative infinite feature", DataError,
     "features[5, 0] is -inf; row 5 is the first with a non-finite value (nonfinite='exclude' "
     "scores the others)", changed("features", (5, 0), -INF)),
    ("first of two bad features", DataError,
     "features[2, 1] is nan; row 2 is the first with a non-finite value (nonfinite='exclude' "
     "scores the others)",
     changed("features", (2, 1), NAN, **changed("features", (3, 0), INF))),
    ("nan weight", ValueError, "weight[1, 3] is nan; heads and weights must be finite",
     changed("weight", (1, 3), NAN)),
    ("infinite weight", ValueError, "weight[0, 0] is inf; heads and weights must be finite",
     changed("weight", (0, 0), INF)),
    ("infinite weight of the second head", ValueError,
     "weight[1, 2, 0] is -inf; heads and weights must be finite",
     {**changed("weight", (1, 2, 0), -INF, weight=zeros(2, C, D)), "bias": None}),
    ("nan bias", ValueError, "bias[2] is nan; heads and weights must be finite",
     changed("bias", (2,), NAN)),
    ("nan sample_weight", DataError,
     "sample_weight[3] is nan; heads and weights must be finite",
     changed("sample_weight", (3,), NAN, sample_weight=WEIGHTS)),
    ("infinite sample_weight", DataError,
     "sample_weight[0] is inf; heads and weights must be finite",
     changed("sample_weight", (0,), INF, sample_weight=WEIGHTS)),
    ("probability negative", DataError,
     "labels[3] holds -0.25 at class 1; targets must lie in [0, 1]",
     changed("labels", (3, 1), -0.25, labels=PROBABILITIES)),
    ("probability nan", DataError,
     "labels[2] holds nan at class 0; targets must lie in [0, 1]",
     changed("labels", (2, 0), NAN, labels=PROBABILITIES)),
    ("probabilities do not sum to one", DataError,
     "labels[1] sums to 0.75; label probabilities must sum to 1 (+- 0.01)",
     {"labels": torch.tensor([0.25, 0.5, 0.25]).repeat(N, 1).index_put(
         (torch.tensor(1), torch.tensor(0)), torch.tensor(0.0))}),
    ("binary target of two", DataError,
     "labels[5] holds 2.0 at class 2; targets must lie in [0, 1]",
     changed("labels", (5, 2), 2, labels=zeros(N, C), loss="binary_cross_entropy")),
    ("mse target infinite", DataError, "labels[4] holds a non-finite target",
     changed("labels", (4, 0), INF, labels=zeros(N, C), loss="mse")),
    ("overflowing logits", DataError,
     "logits, loss or gradient of row 2 overflow float32 although features and weights are "
     "finite; scale them down or pass float64 features",
     changed("features", (2, 0), 1e30, weight=torch.full((C, D), 1e30))),
    ("squared norm overflows", DataError,
     "logits, loss or gradient of row 0 overflow float32 although features and weights are "
     "finite; scale them down or pass float64 features",
     {**changed("features", (0, 0), 1e25), "weight": torch.zeros(C, D)}),
    ("offsets start late", ValueError, "cu_seqlens must start at 0, got 1",
     {"cu_seqlens": torch.tensor([1, N])}),
    ("offsets negative", ValueError, "cu_seqlens must start at 0, got -2",
     {"cu_seqlens": torch.tensor([-2, N])}),
    ("offsets end early", ValueError, "cu_seqlens must end at the number of rows, 6; got 5",
     {"cu_seqlens": torch.tensor([0, 5])}),
    ("offsets end late", ValueError, "cu_seqlens must end at the number of rows, 6; got 7",
     {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)}),
    ("offsets unsorted", ValueError,
     "cu_seqlens must not decrease, but entry 2 is 2 after 4",
     {"cu_seqlens": torch.tensor([0, 4, 2, N])}),
    ("offsets beyond and back", ValueError,
     "cu_seqlens must not decrease, but entry 2 is 6 after 900",
     {"cu_seqlens": torch.tensor([0, 900, N])}),
)  # fmt: skip


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@SHOWN_BY_DATA
def test_bad_data_is_refused(bad, backend, chunk_size):
    assert_refused(bad, moso_scores, backend=backend, chunk_size=chunk_size)
    assert_refused(bad, last_layer_stats, backend=backend, chunk_size=chunk_size)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_logit_of_minus_infinity_is_right_or_refused(backend):
    """Only the logit of another class overflows: the true probability there is 0."""
    features = torch.diag(torch.tensor([1.0, 10.0, 1.0, 1.0]))
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, -3e38, 0.0, 0.0]])
    labels = torch.zeros(4, dtype=torch.long)
    try:
        stats = last_layer_stats(features, weight, labels, backend=backend)
    except ValueError as error:
        assert re.match("logits, loss or gradient of row 1 overflow float32 although", str(error))
    else:
        assert_stats_match(stats, explicit_stats(features, weight, labels), 1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_offending_row_counts_from_the_start_of_the_data(backend):
    """Not from the start of a chunk, and the first one wins over many chunks."""
    case = random_case("ids", n=5000)
    for at in ([4999], [2600, 4000, 4999]):
        features, labels = case.features.clone(), case.labels.clone()
        features[at, 3], labels[at] = NAN, 77
        call = {"backend": backend, "chunk_size": 512}
        with pytest.raises(ValueError, match=rf"^features\[{at[0]}, 3\] is nan"):
            moso_scores(features, case.weight, case.labels, **call)
        with pytest.raises(ValueError, match=rf"^labels\[{at[0]}\] is 77"):
            moso_scores(case.features, case.weight, labels, **call)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_features_of_ignored_rows_do_not_matter(backend):
    case = random_case("ids", n=12)
    labels = case.labels.clone()
    labels[[0, 7]] = -100
    clean = moso_scores(case.features, case.weight, labels, case.bias, backend=backend)
    features = case.features.clone()
    features[0], features[7, 2] = NAN, -INF
    dirty = moso_scores(features, case.weight, labels, case.bias, backend=backend)
    assert torch.equal(dirty.isnan(), labels == -100)
    torch.testing.assert_close(dirty, clean, equal_nan=True)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("kind", ["ids", "soft", "binary", "mse"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nonfinite_exclude_scores_the_others(backend, kind, chunk_size):
    case = random_case(kind, n=12)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 5, 6]] = False
    features = case.features.clone()
    features[0, 0], features[5], features[6, 6] = NAN, INF, -INF
    options = {**case.options, "backend": backend, "chunk_size": chunk_size}
    stats = last_layer_stats(
        features, case.weight, case.labels, case.bias, nonfinite="exclude", **options
    )
    rest = last_layer_stats(
        case.features[keep], case.weight, case.labels[keep], case.bias, **options
    )
    assert stats.count == 9
    for name in ("alignment", "grad_sqnorm", "loss", "el2n"):
        value = getattr(stats, name)
        assert torch.equal(value.isnan(), ~keep)
        torch.testing.assert_close(value[keep], getattr(rest, name), rtol=2e-5, atol=1e-6)


ID_DTYPES = [
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_every_integer_dtype_of_labels(backend, dtype):
    case = random_case("ids", n=40)
    expected = moso_scores(*case.args, backend=backend)
    labels = case.labels.to(dtype)
    got = moso_scores(case.features, case.weight, labels, case.bias, backend=backend)
    assert torch.equal(got, expected)
    if dtype == torch.uint8:
        labels[5] = 250
        with pytest.raises(ValueError, match=r"^labels\[5\] is 250, outside \[0, 5\)"):
            moso_scores(case.features, case.weight, labels, case.bias, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "dtype, ignore_index, label", [(torch.uint8, -100, 156), (torch.int8, 300, 44)]
)
def test_ignore_index_does_not_wrap_round_in_a_narrow_dtype(backend, dtype, ignore_index, label):
    """-100 is 156 in uint8 and 300 is 44 in int8: such rows are classes, not ignored."""
    case = random_case("ids", n=20, c=200)
    labels = case.labels.clamp_max(100).to(dtype)
    labels[7] = label
    args = case.features, case.weight, labels, case.bias
    stats = last_layer_stats(*args, ignore_index=ignore_index, backend=backend)
    assert stats.count == 20 and torch.isfinite(stats.alignment).all()
    assert explicit_stats(*args, ignore_index=ignore_index).count == 20


@pytest.mark.parametrize(
    "row, said",
    [
        ([1.0, 0.5, 0.0], "sums to 1.5; label probabilities must sum to 1 (+- 0.01)"),
        ([0.0, 0.0, 0.5], "sums to 0.5; label probabilities must sum to 1 (+- 0.01)"),
        ([1.0, 1.0, 1.0], "sums to 3; label probabilities must sum to 1 (+- 0.01)"),
        ([0.0, 0.0, 0.0], "sums to 0; label probabilities must sum to 1 (+- 0.01)"),
        ([1.0, -0.5, 0.5], "holds -0.5 at class 1; targets must lie in [0, 1]"),
        ([0.5, 1.5, -1.0], "holds 1.5 at class 1; targets must lie in [0, 1]"),
    ],
)
def test_a_bad_row_of_probabilities_is_described_by_what_is_wrong(row, said):
    """0 and 1 are probabilities: of a row that has them, the sum is wrong."""
    labels = PROBABILITIES.clone()
    labels[4] = torch.tensor(row)
    with pytest.raises(DataError, match=f"^{re.escape(f'labels[4] {said}')}$"):
        last_layer_stats(**good(labels=labels))


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_binary_targets_of_zero_and_one_are_none_of_the_bad(value):
    labels = torch.tensor([[0.0, 1.0, value]]).repeat(N, 1)
    with pytest.raises(DataError, match=rf"^labels\[0\] holds {value} at class 2; targets must"):
        last_layer_stats(**good(labels=labels, loss="binary_cross_entropy"))
