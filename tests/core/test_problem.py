"""Arguments of a problem: what is made of them, and the one-line errors of shapes and options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_support import random_case
from problem_cases import NAN, C, D, N, assert_refused, good, table, zeros

from moso_fast.core import engine
from moso_fast.core.losses import LOSSES
from moso_fast.core.problem import build_problem
from moso_fast.functional import explain, last_layer_stats, moso_scores

LONG, META = torch.long, torch.device("meta")

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
     f"loss must be one of {', '.join(LOSSES)}; got 'nll'", {"loss": "nll"}),
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


@pytest.mark.parametrize("call", [moso_scores, last_layer_stats, explain])
@SHOWN_BY_SHAPES
def test_shapes_dtypes_and_options_are_refused_before_any_work(bad, call, monkeypatch):
    def work(*_: Any) -> None:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(engine, "run", work)
    assert_refused(bad, call)


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
