"""The options of a scoring call: which there are, what each may be, and the operator's list."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from moso_fast.core import operator
from moso_fast.core.options import OPTION_NAMES, Options


def test_what_holds_where_nothing_is_said() -> None:
    assert dataclasses.asdict(Options()) == {
        "loss": "cross_entropy",
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "precision": None,
        "nonfinite": "raise",
        "per": "sample",
    }
    assert list(OPTION_NAMES) == [field.name for field in dataclasses.fields(Options)]


def test_options_are_picked_out_of_the_arguments_of_a_call() -> None:
    call = {"features": 1, "loss": "mse", "backend": "torch", "ignore_index": 7, "per": "token"}
    found = Options.among(call)
    assert (found.loss, found.ignore_index, found.per) == ("mse", 7, "token")
    assert found == Options(loss="mse", ignore_index=7, per="token")
    assert Options.among({}) == Options()


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("loss", ["cross_entropy", "binary_cross_entropy", "mse"]),
        ("nonfinite", ["raise", "exclude"]),
        ("per", ["sample", "token"]),
    ],
)
def test_words_that_are_known(name, allowed) -> None:
    for word in allowed:
        assert getattr(Options(**{name: word}), name) == word
    for bad in ("other", "", None, allowed[0].upper()):
        message = f"{name} must be one of {', '.join(allowed)}; got {bad!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Options(**{name: bad})


def test_numbers_that_are_known() -> None:
    for smoothing in (0, 0.0, 0.5, 0.999999):
        assert Options(label_smoothing=smoothing).label_smoothing == smoothing
    for bad in (-1e-9, 1, 1.5, None, "0"):
        message = f"label_smoothing must be in [0, 1), got {bad!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Options(label_smoothing=bad)  # type: ignore[arg-type]
    for loss in ("binary_cross_entropy", "mse"):
        assert Options(loss=loss, label_smoothing=0.0).loss == loss
        message = f"label_smoothing goes with loss='cross_entropy', not with {loss!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Options(loss=loss, label_smoothing=0.1)
    for precision in (None, "highest", "high", "medium"):
        assert Options(precision=precision).precision == precision
    for bad in (False, 1.0, "7", None):
        message = f"ignore_index must be an int, got {bad!r}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            Options(ignore_index=bad)  # type: ignore[arg-type]


def test_the_operator_takes_tensors_and_options_and_gives_eight_tensors() -> None:
    assert operator._schema() == (
        "(Tensor features, Tensor weight, Tensor labels, Tensor? bias, Tensor? sample_weight, "
        "Tensor? cu_seqlens, str loss, float label_smoothing, int ignore_index, str? precision, "
        "str nonfinite, str per, str backend, int? chunk_size, str? formula) -> (Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operator_foretells_shapes_and_dtypes(dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    features = torch.zeros(17, 7, dtype=dtype, device="meta")
    weight, labels = torch.zeros(3, 5, 7, device="meta"), torch.zeros(17, device="meta")
    for offsets, samples in ((None, 17), (torch.zeros(4, device="meta"), 3)):
        *fields, norms, count = operator._last_layer_stats_fake(
            features, weight, labels, None, None, offsets, "cross_entropy", 0.0
        )
        assert [(tuple(f.shape), f.dtype, f.device.type) for f in fields] == (
            [((3, samples), wide, "meta")] * 6
        )
        assert (tuple(norms.shape), norms.dtype) == ((3,), torch.float64)
        assert (tuple(count.shape), count.dtype) == ((), torch.int64)
