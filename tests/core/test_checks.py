"""What shapes, dtypes and devices show to be wrong, as whoever makes a problem by hand sees it.

`moso_scores` makes tensors of arrays and lists before that (test_problem.py); here nothing does.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from problem_cases import C, D, N, good, zeros
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.core import checks
from moso_fast.core.problem import build_problem

NAMES = ("features", "weight", "labels", "bias", "sample_weight", "cu_seqlens")


def refused(error: type[Exception], message: str, **arguments: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        build_problem(**good(**arguments))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_asked_for_by_its_name(name: str) -> None:
    wanted = f"{name} must be a torch.Tensor, got "
    refused(TypeError, f"{wanted}list", **{name: [1.0]})
    refused(TypeError, f"{wanted}re.Pattern", **{name: re.compile("")})
    array = np.zeros(N)
    way = "; torch.from_numpy makes one without a copy"
    refused(TypeError, f"{wanted}numpy.ndarray{way}", **{name: array})
    sparse = torch.eye(2).to_sparse()
    layout = f"{name} must be a dense tensor, got layout torch.sparse_coo"
    refused(TypeError, layout, **{name: sparse})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_heads_are_of_the_dtypes_of_features(name: str) -> None:
    for dtype in checks.FEATURE_DTYPES:
        build_problem(**good(**{name: good()[name].to(dtype)}))
    for dtype, word in ((torch.int32, "int32"), (torch.complex64, "complex64")):
        message = f"{name} must be floating point, got {word}"
        refused(TypeError, message, **{name: good()[name].to(dtype)})


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_which_targets_go_with_which_loss(loss: str) -> None:
    """Whole numbers are targets of sigmoids and squares, but no probabilities."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert build_problem(**good(labels=zeros(N, C, dtype=dtype), loss=loss)).soft_labels
    whole = zeros(N, C, dtype=torch.int32)
    devices = (torch.device("cpu"), torch.device("cpu"))
    if loss == "cross_entropy":  # one-hot ones are made floating before that
        with pytest.raises(TypeError, match=r"^labels of shape \(N, C\) must be floating point, "
                           "got int32$"):  # fmt: skip
            checks.check_labels(good()["features"], whole, loss, C, devices)
    else:
        checks.check_labels(good()["features"], whole, loss, C, devices)
    what = f"({N},) class ids or ({N}, {C}) probabilities"
    if loss != "cross_entropy":
        what = f"({N}, {C}) targets for loss={loss!r}"
    message = f"labels must have shape {what} to go with features ({N}, {D}), got ({N}, {C}, 1)"
    refused(ValueError, message, labels=zeros(N, C, 1), loss=loss)


def test_numbers_of_any_kind_may_weigh_rows_but_no_switches() -> None:
    for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8):
        problem = build_problem(**good(sample_weight=torch.ones(N, dtype=dtype)))
        assert problem.sample_weight is not None and problem.sample_weight.dtype == torch.float32
    assert build_problem(**good(sample_weight=None)).sample_weight is None
    for dtype, word in ((torch.bool, "bool"), (torch.complex64, "complex64")):
        message = f"sample_weight must hold real numbers, got {word}"
        refused(TypeError, message, sample_weight=torch.ones(N, dtype=dtype))


def test_offsets_are_of_32_or_64_bits() -> None:
    for dtype in (torch.int32, torch.int64):
        problem = build_problem(**good(cu_seqlens=torch.tensor([0, N], dtype=dtype)))
        assert problem.cu_seqlens is not None and problem.cu_seqlens.dtype == torch.int64
    for dtype, word in ((torch.int16, "int16"), (torch.uint8, "uint8"), (torch.bool, "bool")):
        message = f"cu_seqlens must be int32 or int64, got {word}"
        refused(TypeError, message, cu_seqlens=torch.tensor([0, 1]).to(dtype))


# Devices must be named, not be there: fake tensors have one without memory.


SHAPES = {
    "features": (N, D), "weight": (C, D), "labels": (N,), "bias": (C,), "sample_weight": (N,),
    "cu_seqlens": (2,),
}  # fmt: skip


def on(features: str, heads: str, **others: str) -> dict[str, Any]:
    """Arguments of which each lies where it is told, or with the heads."""
    where = {"features": features, **others}
    dtypes = dict.fromkeys(("labels", "cu_seqlens"), torch.int64)
    return {
        name: torch.zeros(shape, dtype=dtypes.get(name), device=where.get(name, heads))
        for name, shape in SHAPES.items()
    }


def refused_on(features: str, heads: str, **others: str) -> str:
    with FakeTensorMode(), pytest.raises(ValueError) as caught:
        build_problem(**on(features, heads, **others))
    return str(caught.value)


@pytest.mark.parametrize("name", ["labels", "sample_weight", "cu_seqlens"])
def test_where_what_goes_with_rows_may_lie(name: str) -> None:
    said = refused_on("cpu", "cuda", **{name: "meta"})
    where = f"{name} must be on the device of features"
    assert said == f"{where} (cpu) or of weight (cuda:0), got meta"
    for device, called in (("cpu", "cpu"), ("cuda", "cuda:0")):
        assert refused_on(device, device, **{name: "meta"}) == f"{where} ({called}), got meta"


def test_where_heads_may_lie() -> None:
    """Features go from main memory to a GPU, and nowhere else."""
    with FakeTensorMode():
        for features, heads in (("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
            assert build_problem(**on(features, heads)).device.type == heads
    where = "weight must be on the device of features"
    assert refused_on("cuda", "cpu") == f"{where} (cuda:0), got cpu"
    assert refused_on("cpu", "meta") == f"{where} (cpu), got meta"
    assert refused_on("meta", "cuda") == f"{where} (meta), got cuda:0"
    for features, of in (("cpu", "weight"), ("cuda", "features")):
        said = refused_on(features, "cuda", bias="meta")
        assert said == f"bias must be on the device of {of} (cuda:0), got meta"
