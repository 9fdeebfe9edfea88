"""Every bad input gets its one-line error: a table of type and message."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from core_support import CPU_BACKENDS, assert_stats_match, random_case

from moso_fast.core import engine
from moso_fast.core.errors import DataError
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import explicit_stats
from moso_fast.functional import explain, last_layer_stats, moso_scores

NAN, INF = float("nan"), float("inf")
N, C, D = 6, 3, 4


@dataclass(frozen=True)
class Bad:
    """One bad call: what replaces the good arguments, and what must be said about it."""

    name: str
    error: type[Exception]
    message: str
    arguments: dict[str, Any] = field(default_factory=dict)


def good(**changes: Any) -> dict[str, Any]:
    case = random_case("ids", n=N, c=C, d=D)
    arguments = dict(zip(("features", "weight", "labels", "bias"), case.args, strict=True))
    return {**arguments, **changes}


def changed(name: str, at: tuple[int, ...], value: float, **changes: Any) -> dict[str, Any]:
    tensor = {**good(), **changes}[name].clone()
    tensor[at] = value
    return {**changes, name: tensor}


def table(*rows: tuple[str, type[Exception], str, dict[str, Any]]) -> Any:
    bad = [Bad(*row) for row in rows]
    return pytest.mark.parametrize("bad", bad, ids=[row.name for row in bad])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


LONG, META = torch.long, torch.device("meta")
PROBABILITIES = torch.full((N, C), 1 / 3)
WEIGHTS = torch.ones(N)

SHOWN_BY_SHAPES = table(
    ("features list", ValueError,
     "weight (3, 4) and features (1, 1) disagree in D: 4 against 1", {"features": [[1.0]]}),
    ("features of text", TypeError, "features must be a torch.Tensor, an array, a pandas column "
     "or a list of numbers; got str", {"features": "F.npy"}),
    ("features none", TypeError, "features must be a torch.Tensor, got NoneType",
     {"features": None}),
    ("features numpy", TypeError,
     "features must be one of float32, float16, bfloat16, float64; got int64",
     {"features": np.zeros((N, D), dtype=np.int64)}),
    ("features sparse", TypeError,
     "features must be a dense tensor, got layout torch.sparse_coo",
     {"features": zeros(N, D).to_sparse()}),
    ("features 1-d", ValueError, "features must have shape (N, D), got (4,)",
     {"features": zeros(4)}),
    ("features 3-d", ValueError, "features must have shape (N, D), got (2, 3, 4)",
     {"features": zeros(2, 3, 4)}),
    ("features without columns", ValueError,
     "features must have at least one column, got (6, 0)", {"features": zeros(N, 0)}),
    ("features int", TypeError,
     "features must be one of float32, float16, bfloat16, float64; got int64",
     {"features": zeros(N, D, dtype=LONG)}),
    ("features complex", TypeError,
     "features must be one of float32, float16, bfloat16, float64; got complex64",
     {"features": zeros(N, D, dtype=torch.complex64)}),
    ("weight numpy", ValueError,
     "weight (4, 3) and features (6, 4) disagree in D: 3 against 4", {"weight": np.zeros((D, C))}),
    ("weight 1-d", ValueError,
     "weight must have shape (C, D) or (K, C, D) with C and K at least 1, got (4,)",
     {"weight": zeros(D)}),
    ("weight 4-d", ValueError,
     "weight must have shape (C, D) or (K, C, D) with C and K at least 1, got (1, 1, 3, 4)",
     {"weight": zeros(1, 1, C, D)}),
    ("no class", ValueError,
     "weight must have shape (C, D) or (K, C, D) with C and K at least 1, got (0, 4)",
     {"weight": zeros(0, D)}),
    ("no head", ValueError,
     "weight must have shape (C, D) or (K, C, D) with C and K at least 1, got (0, 3, 4)",
     {"weight": zeros(0, C, D)}),
    ("weight transposed", ValueError,
     "weight (4, 3) and features (6, 4) disagree in D: 3 against 4", {"weight": zeros(D, C)}),
    ("weight int", TypeError, "weight must be floating point, got int64",
     {"weight": zeros(C, D, dtype=LONG)}),
    ("weight device", ValueError,
     "weight must be on the device of features (cpu), got meta",
     {"weight": torch.zeros(C, D, device=META)}),
    ("bias list", TypeError, "bias must be floating point, got int64", {"bias": [0] * C}),
    ("bias shape", ValueError,
     "bias must have shape (3,) to go with weight (3, 4), got (4,)", {"bias": zeros(D)}),
    ("bias of one head for two", ValueError,
     "bias must have shape (2, 3) to go with weight (2, 3, 4), got (3,)",
     {"weight": zeros(2, C, D)}),
    ("bias int", TypeError, "bias must be floating point, got int64",
     {"bias": zeros(C, dtype=LONG)}),
    ("bias device", ValueError, "bias must be on the device of features (cpu), got meta",
     {"bias": torch.zeros(C, device=META)}),
    ("labels list", TypeError, "labels must hold numbers; it holds text ('a' at [0]); class names "
     "become class ids by numpy.unique(names, return_inverse=True)", {"labels": ["a"] * N}),
    ("labels float ids", TypeError,
     "labels of shape (N,) must be integer class ids, got float32; probabilities have shape "
     "(N, C) = (6, 3), ids are labels.long(), and the target of a regression goes with loss='mse'",
     {"labels": zeros(N)}),
    ("labels float ids in a column", TypeError,
     "labels of shape (N, 1) must be integer class ids, got float32; probabilities have shape "
     "(N, C) = (6, 3), ids are labels.long(), and the target of a regression goes with loss='mse'",
     {"labels": zeros(N, 1)}),
    ("labels float for one output", TypeError,
     "labels of shape (N,) must be integer class ids, got float32; one output goes with loss='mse' "
     "(regression) or 'binary_cross_entropy'",
     {"labels": zeros(N), "weight": zeros(1, D), "bias": zeros(1)}),
    ("labels bool ids", TypeError,
     "labels of shape (N,) must be integer class ids, got bool; probabilities have shape "
     "(N, C) = (6, 3), ids are labels.long(), and the target of a regression goes with loss='mse'",
     {"labels": zeros(N, dtype=torch.bool)}),
    ("labels too few", ValueError,
     "labels must have shape (6,) class ids or (6, 3) probabilities to go with features (6, 4), "
     "got (5,)", {"labels": zeros(5, dtype=LONG)}),
    ("labels two columns", ValueError,
     "labels must have shape (6,) class ids or (6, 3) probabilities to go with features (6, 4), "
     "got (6, 2)", {"labels": zeros(N, 2, dtype=LONG)}),
    ("labels scalar", ValueError,
     "labels must have shape (6,) class ids or (6, 3) probabilities to go with features (6, 4), "
     "got ()", {"labels": torch.tensor(1)}),
    ("labels complex", TypeError, "labels must be real, got complex64",
     {"labels": zeros(N, C, dtype=torch.complex64), "loss": "mse"}),
    ("labels of ids for mse", ValueError,
     "labels must have shape (6, 3) targets for loss='mse' to go with features (6, 4), got (6,)",
     {"labels": zeros(N, dtype=LONG), "loss": "mse"}),
    ("labels of ids for binary", ValueError,
     "labels must have shape (6, 3) targets for loss='binary_cross_entropy' to go with features "
     "(6, 4), got (6,)", {"labels": zeros(N), "loss": "binary_cross_entropy"}),
    ("labels device", ValueError, "labels must be on the device of features (cpu), got meta",
     {"labels": torch.zeros(N, dtype=LONG, device=META)}),
    ("loss", ValueError,
     "loss must be one of cross_entropy, binary_cross_entropy, mse; got 'nll'", {"loss": "nll"}),
    ("smoothing one", ValueError, "label_smoothing must be in [0, 1), got 1.0",
     {"label_smoothing": 1.0}),
    ("smoothing negative", ValueError, "label_smoothing must be in [0, 1), got -0.1",
     {"label_smoothing": -0.1}),
    ("smoothing nan", ValueError, "label_smoothing must be in [0, 1), got nan",
     {"label_smoothing": NAN}),
    ("smoothing text", ValueError, "label_smoothing must be in [0, 1), got '0.1'",
     {"label_smoothing": "0.1"}),
    ("smoothing with mse", ValueError,
     "label_smoothing goes with loss='cross_entropy', not with 'mse'",
     {"labels": zeros(N, C), "loss": "mse", "label_smoothing": 0.1}),
    ("ignore_index float", TypeError, "ignore_index must be an int, got -100.0",
     {"ignore_index": -100.0}),
    ("ignore_index none", TypeError, "ignore_index must be an int, got None",
     {"ignore_index": None}),
    ("ignore_index bool", TypeError, "ignore_index must be an int, got True",
     {"ignore_index": True}),
    ("ignore_index of 65 bits", ValueError,
     "ignore_index must fit 64 bits, got 18446744073709551616", {"ignore_index": 2**64}),
    ("weights shape", ValueError, "sample_weight must have shape (6,), got (3,)",
     {"sample_weight": torch.ones(3)}),
    ("weights column", ValueError, "sample_weight must have shape (6,), got (6, 1)",
     {"sample_weight": torch.ones(N, 1)}),
    ("weights list", ValueError, "sample_weight must have shape (6,), got (5,)",
     {"sample_weight": [1.0] * (N - 1)}),
    ("weights bool", TypeError, "sample_weight must hold real numbers, got bool",
     {"sample_weight": torch.ones(N, dtype=torch.bool)}),
    ("weights complex", TypeError, "sample_weight must hold real numbers, got complex64",
     {"sample_weight": torch.ones(N, dtype=torch.complex64)}),
    ("weights device", ValueError,
     "sample_weight must be on the device of features (cpu), got meta",
     {"sample_weight": torch.ones(N, device=META)}),
    ("offsets list", TypeError, "cu_seqlens must be int32 or int64, got float64",
     {"cu_seqlens": [0.0, N]}),
    ("offsets empty", ValueError, "cu_seqlens must have shape (B + 1,), got (0,)",
     {"cu_seqlens": zeros(0, dtype=LONG)}),
    ("offsets 2-d", ValueError, "cu_seqlens must have shape (B + 1,), got (1, 2)",
     {"cu_seqlens": torch.tensor([[0, N]])}),
    ("offsets float", TypeError, "cu_seqlens must be int32 or int64, got float32",
     {"cu_seqlens": torch.tensor([0.0, N])}),
    ("offsets device", ValueError,
     "cu_seqlens must be on the device of features (cpu), got meta",
     {"cu_seqlens": torch.zeros(2, dtype=LONG, device=META)}),
    ("precision", ValueError,
     "precision must be None or one of highest, high, medium; got 'tf32'",
     {"precision": "tf32"}),
    ("nonfinite", ValueError, "nonfinite must be one of raise, exclude; got 'ignore'",
     {"nonfinite": "ignore"}),
    ("chunk_size zero", ValueError, "chunk_size must be a positive number of rows, got 0",
     {"chunk_size": 0}),
    ("chunk_size negative", ValueError, "chunk_size must be a positive number of rows, got -5",
     {"chunk_size": -5}),
    ("chunk_size float", ValueError, "chunk_size must be a positive number of rows, got 8.0",
     {"chunk_size": 8.0}),
    ("chunk_size text", ValueError, "chunk_size must be a positive number of rows, got '8'",
     {"chunk_size": "8"}),
    ("chunk_size bool", ValueError, "chunk_size must be a positive number of rows, got True",
     {"chunk_size": True}),
)  # fmt: skip

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


def assert_refused(bad: Bad, call: Any, **extra: Any) -> None:
    with pytest.raises(bad.error, match=f"^{re.escape(bad.message)}$") as caught:
        call(**good(**bad.arguments), **extra)
    assert type(caught.value) is bad.error


@pytest.mark.parametrize("call", [moso_scores, last_layer_stats, explain])
@SHOWN_BY_SHAPES
def test_shapes_dtypes_and_options_are_refused_before_any_work(bad, call, monkeypatch):
    def work(*_: Any) -> None:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(engine, "run", work)
    assert_refused(bad, call)


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


def test_problem_describes_itself():
    case = random_case("ids", heads=2)
    problem = build_problem(*case.args, cu_seqlens=torch.tensor([0, 5, 17], dtype=torch.int32))
    assert (problem.rows, problem.samples, problem.dim) == (17, 2, 7)
    assert (problem.heads, problem.classes, problem.soft_labels) == (2, 5, False)
    assert problem.cu_seqlens.dtype == torch.int64
    one = build_problem(case.features, case.weight[0], case.labels, case.bias[0])
    assert one.weight.shape == (1, 5, 7) and one.bias.shape == (1, 5) and not one.stacked


@pytest.mark.parametrize(
    "dtype, precision, compute",
    [
        (torch.float64, "highest", torch.float64),
        (torch.float32, "highest", torch.float32),
        (torch.bfloat16, "medium", torch.float32),
        (torch.float16, "medium", torch.float32),
    ],
)
def test_default_precision_follows_the_features(dtype, precision, compute):
    case = random_case("ids", dtype=dtype)
    problem = build_problem(*case.args)
    assert problem.precision == precision
    assert problem.compute_dtype == problem.weight.dtype == problem.bias.dtype == compute
    assert build_problem(*case.args, precision="high").precision == "high"


def test_inputs_are_not_copied_or_changed():
    case = random_case("soft")
    before = [t.clone() for t in case.args]
    problem = build_problem(*case.args)
    assert problem.features.data_ptr() == case.features.data_ptr()
    assert problem.weight.data_ptr() == case.weight.data_ptr()
    moso_scores(*case.args)
    for tensor, copy in zip(case.args, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1])
def test_the_first_ignore_index_that_no_label_can_have(ignore_index):
    message = f"^ignore_index must fit 64 bits, got {ignore_index}$"
    for call in (last_layer_stats, moso_scores, build_problem):
        with pytest.raises(ValueError, match=message):
            call(**good(ignore_index=ignore_index))


@pytest.mark.parametrize("ignore_index", [2**63 - 1, -(2**63)])
def test_the_last_ignore_index_that_a_label_can_have(ignore_index):
    arguments = good(ignore_index=ignore_index)
    arguments["labels"][2] = ignore_index
    stats = last_layer_stats(**arguments)
    assert stats.count == N - 1 and stats.loss.isnan().tolist() == [k == 2 for k in range(N)]


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
