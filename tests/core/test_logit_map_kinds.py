"""Maps between a head's output and the logits by themselves: edges, sizes of rounding, words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moso_fast.core import logit_map as module
from moso_fast.core.logit_map import KINDS, LogitMap
from moso_fast.core.losses import mapped_statistics, row_statistics

F64 = torch.float64
Z = torch.tensor([[-2.0, 0.5, 4.0], [1.0, -3.0, 0.25]], dtype=F64)


def made(kind: str, *values: float | list[float]) -> LogitMap:
    return LogitMap(kind, tuple(torch.tensor(v, dtype=F64) for v in values))


ONE_OF_EACH = {
    "scale": made("scale", 0.5),
    "affine": made("affine", [0.5, -2.0, 3.0], [1.0, 0.0, -4.0]),
    "tanh": made("tanh", 30.0, 0.25),
    "sigmoid": made("sigmoid", 0.5),
    "softmax": made("softmax", 2.0),
    "log_softmax": made("log_softmax", 1.5),
    "clamp": made("clamp", 2.0, -1.0, 1.0),
}


def test_what_each_kind_makes_of_numbers() -> None:
    by_hand = {
        "scale": lambda z: [0.5 * v for v in z],
        "affine": lambda z: [0.5 * z[0] + 1, -2 * z[1], 3 * z[2] - 4],
        "tanh": lambda z: [30 * math.tanh(0.25 * v) for v in z],
        "sigmoid": lambda z: [1 / (1 + math.exp(-0.5 * v)) for v in z],
        "softmax": lambda z: [math.exp(2 * v) / sum(math.exp(2 * w) for w in z) for v in z],
        "log_softmax": lambda z: [1.5 * v - math.log(sum(math.exp(1.5 * w) for w in z)) for v in z],
        "clamp": lambda z: [min(1.0, max(-1.0, 2 * v)) for v in z],
    }
    assert set(by_hand) == set(ONE_OF_EACH) == set(KINDS)
    for kind, logit_map in ONE_OF_EACH.items():
        expected = torch.tensor([by_hand[kind](row) for row in Z.tolist()], dtype=F64)
        torch.testing.assert_close(logit_map.apply(Z), expected, rtol=1e-12, atol=1e-15)
        for dtype in (torch.float32, torch.bfloat16):
            assert logit_map.apply(Z.to(dtype)).dtype == dtype
            assert logit_map.pull_back(Z.to(dtype), Z.to(dtype)).dtype == dtype


@pytest.mark.parametrize("factor", [1.0, 2.0, -2.0])
def test_at_its_bounds_a_clamp_has_the_derivative_that_pytorch_gives_it(factor) -> None:
    """Another since torch 2.14."""
    z = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=F64, requires_grad=True)
    residual = torch.arange(1.0, 8.0, dtype=F64)
    logit_map = made("clamp", factor, -1.0, 2.0)
    (expected,) = torch.autograd.grad(((factor * z).clamp(-1.0, 2.0) * residual).sum(), z)
    module._clamp_slope_at_bound.cache_clear()
    with torch.inference_mode():
        assert torch.equal(logit_map.pull_back(z.detach(), residual), expected)


def rounding_by_hand(kind: str, row: list[float]) -> list[float]:
    """|m(z)| and what it is made of."""
    size = ONE_OF_EACH[kind].apply(torch.tensor([row], dtype=F64)).abs()[0].tolist()
    if kind == "affine":
        terms = ((0.5, 1.0), (-2.0, 0.0), (3.0, -4.0))
        return [abs(a * v) + abs(b) + s for (a, b), v, s in zip(terms, row, size, strict=True)]
    if kind in ("sigmoid", "softmax"):
        most = max(abs({"sigmoid": 0.5, "softmax": 2.0}[kind] * v) for v in row)
        return [s * (1 + 2 * most) for s in size]
    if kind == "log_softmax":
        return [s + max(abs(1.5 * v) for v in row) for s in size]
    return size


@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_errors_scale_with(kind) -> None:
    found = ONE_OF_EACH[kind].rounding(Z)
    if kind == "clamp":  # the largest of all results is 1: beyond it a product adds nothing
        expected = (2 * Z).abs().clamp_max(1.0) + (2 * Z).clamp(-1, 1).abs()
    else:
        expected = torch.tensor([rounding_by_hand(kind, row) for row in Z.tolist()], dtype=F64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_clamp_that_reaches_nothing_rounds_as_the_product() -> None:
    wide = made("clamp", 2.0, -100.0, 100.0)
    torch.testing.assert_close(wide.rounding(Z), 4 * Z.abs())


def test_words() -> None:
    assert {kind: logit_map.describe() for kind, logit_map in ONE_OF_EACH.items()} == {
        "scale": "a factor of 0.5",
        "affine": "a factor and an offset for every class (such as BatchNorm in eval mode)",
        "tanh": "30 * tanh(0.25 * z), a soft cap",
        "sigmoid": "sigmoid(0.5 * z)",
        "softmax": "softmax(2 * z)",
        "log_softmax": "log_softmax(1.5 * z)",
        "clamp": "clamp(2 * z, -1, 1)",
    }
    assert made("sigmoid", 1.0).describe() == "sigmoid(z)"
    assert made("clamp", 1.0, -0.5, 1 / 3).describe() == "clamp(z, -0.5, 0.333333)"
    assert made("scale", 1234567.0).describe() == "a factor of 1.23457e+06"


def test_cross_entropy_does_not_see_a_log_softmax_of_factor_one() -> None:
    same = {kind for kind, m in ONE_OF_EACH.items() if m.keeps_cross_entropy()}
    assert same == set()
    assert made("log_softmax", 1.0).keeps_cross_entropy()
    assert not made("scale", 1.0).keeps_cross_entropy()
    assert not made("softmax", 1.0).keeps_cross_entropy()


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_logits_but_for_the_residual(kind) -> None:
    outputs = Z[:, None, :]
    labels, options = torch.tensor([2, 0]), {"label_smoothing": 0.1, "loss": "cross_entropy"}
    weights: Tensor = torch.tensor([0.5, 3.0], dtype=F64)
    logit_map = ONE_OF_EACH[kind]
    plain = row_statistics(logit_map.apply(outputs), labels, sample_weight=weights, **options)
    found = mapped_statistics(logit_map, outputs, labels, sample_weight=weights, **options)
    for name in ("loss", "margin", "entropy"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    residual = logit_map.pull_back(outputs, plain.residual)
    assert torch.equal(found.residual, residual)
    assert torch.equal(found.residual_sqnorm, residual.square().sum(-1))
    unmapped = mapped_statistics(None, outputs, labels, sample_weight=weights, **options)
    again = row_statistics(outputs, labels, sample_weight=weights, **options)
    assert all(torch.equal(a, b) for a, b in zip(unmapped, again, strict=True))
