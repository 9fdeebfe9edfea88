"""Operands, products and status that backends on PyTorch's matrix products share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import generator, random_case

from moso_fast.backends import common
from moso_fast.backends import torch as torch_backend
from moso_fast.core.problem import build_problem
from moso_fast.core.status import (
    STATUS_FEATURE,
    STATUS_LABEL,
    STATUS_LOGITS,
    STATUS_SLOTS,
    STATUS_TARGET,
)

NAN, INF = float("nan"), float("inf")
F64 = torch.float64


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers: products and sums are exact in every dtype."""
    return torch.randint(-3, 4, shape, generator=generator(sum(shape))).to(dtype)


def problem_of(kind: str = "ids", **options: Any) -> Any:
    case = random_case(kind, **options)
    return build_problem(*case.args, **case.options)


def test_labels_are_made_safe_to_look_up() -> None:
    problem = problem_of("ids", n=8, c=5)
    problem.labels[:] = torch.tensor([0, 4, 5, -1, -100, 3, 99, 2])
    labels, counted, bad = common.safe_labels(problem, slice(1, 8))
    assert labels.tolist() == [4, 0, 0, 0, 3, 0, 2] and labels.dtype == torch.int64
    assert counted.tolist() == [True, True, True, False, True, True, True]
    assert bad.tolist() == [False, True, True, False, False, True, False]
    soft = problem_of("soft", n=8, dtype=F64)
    targets, counted, bad = common.safe_labels(soft, slice(2, 5))
    assert torch.equal(targets, soft.labels[2:5].double()) and targets.dtype == F64
    assert counted.tolist() == [True] * 3 and bad.tolist() == [False] * 3


@pytest.mark.parametrize("look_first", [True, False])
def test_rows_that_are_not_finite_become_zeros(look_first) -> None:
    rows = slice(0, 5)
    half = problem_of("ids", n=5, d=3, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        features, finite, sqnorm = common.safe_features(half, rows, dtype, look_first=look_first)
        assert features.dtype == dtype and torch.equal(features.float(), half.features.float())
        assert finite.all() and sqnorm.dtype == torch.float32
        torch.testing.assert_close(sqnorm, half.features.float().square().sum(1))
    problem = problem_of("ids", n=5, d=3)
    problem.features[1] = torch.tensor([NAN, 1.0, 2.0])
    problem.features[3] = torch.tensor([2e38, -2e38, 1.0])  # finite, though its norm is not
    features, finite, sqnorm = common.safe_features(
        problem, rows, torch.float32, look_first=look_first
    )
    assert finite.tolist() == [True, False, True, True, True]
    assert features[1].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(features[3], problem.features[3])
    assert float(sqnorm[1]) == 0.0 and float(sqnorm[3]) == INF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_products_are_never_rounded_to_16_bits(dtype) -> None:
    """400 terms of 9: their sum is no number of bfloat16, nor is 3601 one of float16."""
    wide = F64 if dtype == F64 else torch.float32
    for shapes in (((2, 401), (401, 3)), ((2, 3, 401), (2, 401, 4))):
        left, right = (torch.full(shape, 3.0, dtype=dtype) for shape in shapes)
        left[..., 0] = right[..., 0, :] = 1.0
        found = common.product(left, right)
        assert found.dtype == wide and bool((found == 3601.0).all())


def test_a_gpu_multiplies_16_bit_operands_as_they_are(monkeypatch) -> None:
    asked: list[Any] = []
    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, lambda *given, name=name, **more: asked.append(
            (name, given, more)))  # fmt: skip
    operands = {
        dim: SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, dim=lambda dim=dim: dim)
        for dim in (2, 3)
    }
    for left in operands.values():
        common.product(left, "right")  # type: ignore[arg-type]
    wide = {"out_dtype": torch.float32}
    assert asked == [("mm", (operands[2], "right"), wide), ("bmm", (operands[3], "right"), wide)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_with_and_without_a_bias(dtype) -> None:
    features, weight = numbers(4, 6, dtype=dtype), numbers(10, 6, dtype=dtype)
    expected = features.double() @ weight.double().T
    assert torch.equal(common.logits_of(features, weight, None).double(), expected)
    bias = numbers(2, 5)
    found = common.logits_of(features, weight, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), expected + bias.double().flatten())


class Products:
    """Stands in for ``product`` and notes how many slabs of how many rows each launch takes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[int, ...]] = []
        product = common.product

        def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            self.launches.append((*right.shape[:-2], right.shape[-2]))
            return product(left, right)

        patch.setattr(common, "product", noted)


def test_gradient_sums_go_by_slabs_and_batches_of_them(monkeypatch) -> None:
    """Slabs of 8 rows; a partial sum of 5 x 3 takes 60 bytes of the batch."""
    seen = Products(monkeypatch)
    a_partial = 4 * 5 * 3
    for rows, batch, launches in (
        (8, 0, [(8,)]),
        (9, 0, [(8,), (1,)]),
        (30, 0, [(8,), (8,), (8,), (6,)]),
        (30, 2 * a_partial - 1, [(8,), (8,), (8,), (6,)]),
        (30, 2 * a_partial, [(2, 8), (8,), (6,)]),
        (40, 2 * a_partial, [(2, 8), (2, 8), (8,)]),
        (30, 10 * a_partial, [(3, 8), (6,)]),
        (16, 10 * a_partial, [(2, 8)]),
    ):
        residual, features = numbers(rows, 5), numbers(rows, 3)
        seen.launches.clear()
        found = common.gradient_sum(residual, features, 8, batch_bytes=batch)
        assert seen.launches == launches, (rows, batch)
        assert torch.equal(found.double(), residual.double().T @ features.double())
        assert found.dtype == (torch.float32 if rows == 8 else F64)
    whole = common.gradient_sum(numbers(30, 5), numbers(30, 3), 8)
    assert torch.equal(whole, numbers(30, 5).double().T @ numbers(30, 3).double())


@pytest.mark.parametrize("classes, dim", [(4, 6), (6, 6), (7, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_alignments_by_either_product(monkeypatch, classes, dim, bias) -> None:
    """By H G^T up to as many classes as columns, else by R G; never both."""
    for dtype in (torch.float32, torch.bfloat16):
        seen = Products(monkeypatch)
        residual, features = numbers(9, 2, classes), numbers(9, dim, dtype=dtype)
        grad, shift = numbers(2, classes, dim), numbers(2, classes) if bias else None
        found = common.alignments(features, residual.clone(), grad, shift)
        expected = torch.einsum("nkc,kcd,nd->kn", residual.double(), grad.double(),
                                features.double())  # fmt: skip
        if shift is not None:
            expected += torch.einsum("nkc,kc->kn", residual.double(), shift.double())
        assert found.dtype == torch.float32 and torch.equal(found.double(), expected)
        assert seen.launches == [(dim,) if classes <= dim else (2, classes)]
        monkeypatch.undo()


def test_the_first_bad_row_of_a_kind_is_kept() -> None:
    status = torch.tensor([50, 6, 50, 50])
    bad = torch.tensor([False, True, False, True])
    common.note(status, 0, bad, slice(10, 14))
    assert status.tolist() == [11, 6, 50, 50]
    common.note(status, 0, bad, slice(2, 6))
    common.note(status, 1, bad, slice(10, 14))
    common.note(status, 2, torch.zeros(4, dtype=torch.bool), slice(0, 4))
    common.note(status, 3, torch.zeros(0, dtype=torch.bool), slice(0, 0))
    assert status.tolist() == [3, 6, 50, 50]


def test_the_first_bad_rows_of_all_kinds_are_kept_at_once() -> None:
    status = torch.tensor([50, 6, 50, 50])
    none = torch.zeros(3, dtype=torch.bool)
    bad = {
        STATUS_LABEL: torch.tensor([False, True, True]),
        STATUS_FEATURE: torch.tensor([True, False, False]),
        STATUS_LOGITS: none,
    }
    torch_backend._note(status, bad, slice(7, 10))
    assert status.tolist() == [8, 6, 50, 50]
    torch_backend._note(status, {**bad, STATUS_TARGET: torch.tensor([False, False, True])},
                        slice(0, 3))  # fmt: skip
    assert status.tolist() == [1, 0, 50, 2]
    torch_backend._note(status, {0: none[:0], 1: none[:0]}, slice(0, 0))
    assert status.tolist() == [1, 0, 50, 2] and len(status) == STATUS_SLOTS


def test_rows_that_are_no_targets() -> None:
    third = 1 / 3
    rows = {
        "sums to one": [third] * 3, "nearly": [0.0, 0.0, 1.009], "too much": [0.0, 0.0, 1.011],
        "too little": [0.0, 0.489, 0.5], "negative": [-0.5, 0.5, 1.0], "ones": [1.0] * 3,
        "nan": [NAN, 0.5, 0.5], "large": [2.0, 0.0, 0.0], "infinite": [INF, 0.0, 0.0],
    }  # fmt: skip
    targets = torch.tensor(list(rows.values()))
    wrong = {
        "cross_entropy": {*rows} - {"sums to one"},
        "binary_cross_entropy": {"nearly", "too much", "negative", "nan", "large", "infinite"},
        "mse": {"nan", "infinite"},
    }
    # 1.009 is above the largest probability, though within what a sum may be off by.
    for loss, expected in wrong.items():
        job: Any = SimpleNamespace(loss=loss)
        mask = common.bad_targets(job, targets).tolist()
        assert {name for name, bad in zip(rows, mask, strict=True) if bad} == expected, loss
    job = SimpleNamespace(loss="cross_entropy")
    sums = torch.tensor([0.9895, 0.9905, 1.0095, 1.0105])
    near = torch.stack([sums / 2, sums / 2], 1)
    assert common.bad_targets(job, near).tolist() == [True, False, False, True]
