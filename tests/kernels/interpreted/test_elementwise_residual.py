"""Binary cross-entropy and squared-error residuals against float64 PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from residual_support import FIELDS, assert_close, launch

from moso_fast.core.status import STATUS_LOGITS, STATUS_TARGET

LOSSES = ("binary_cross_entropy", "mse")
SHAPES = [(5, 2, 1), (300, 1, 3), (67, 2, 10), (33, 1, 32), (7, 1, 33), (3, 2, 256), (5, 1, 1000)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, int, int], loss: str, generator: torch.Generator
) -> None:
    rows, _, classes = shape
    logits = 3.0 * torch.randn(shape, generator=generator)
    for targets in (
        torch.rand(rows, classes, generator=generator),
        (torch.rand(rows, classes, generator=generator) < 0.5).to(torch.int64),
    ):
        options = {
            "loss": loss,
            "sample_weight": 2.0 * torch.rand(rows, generator=generator),
            "counted": torch.arange(rows) % 3 != 1,
        }
        result = launch(logits, targets, padding=5, offset=1, **options)
        assert_close(result, logits, targets, **options)
        assert result.status == [rows] * 4
        plain = launch(logits, targets, loss=loss)
        assert_close(plain, logits, targets, loss=loss)


def test_confident_binary_model_keeps_its_digits() -> None:
    sure = torch.linspace(15.0, 30.0, 8)
    logits = torch.stack([sure, -sure], 1)[:, None]
    targets = torch.tensor([[1.0, 0.0]]).expand(8, 2).contiguous()
    result = launch(logits, targets, loss="binary_cross_entropy")
    odds = (-sure.double()).exp()
    exact = torch.stack([-odds / (1 + odds), odds / (1 + odds)], 1)
    assert ((result.residual[:, 0] - exact).abs() / exact.abs()).max() <= 1e-5
    assert ((result.loss[0] - 2 * odds.log1p()).abs() / (2 * odds)).max() <= 1e-5


@pytest.mark.parametrize("level", [1e4, 3e38])
def test_extreme_binary_logits(level: float) -> None:
    logits = torch.tensor([[[level, -level]], [[-level, level]]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = launch(logits, targets, loss="binary_cross_entropy")
    assert float(result.loss[0, 0]) == 0.0 and float(result.residual_sqnorm[0, 1]) == 2.0
    assert result.margin.tolist() == [[level, -level]] or level == 3e38
    assert torch.equal(result.entropy, torch.zeros(1, 2))
    overflow = level == 3e38
    assert bool(torch.isinf(result.loss[0, 1])) == overflow
    assert result.status[STATUS_LOGITS] == (1 if overflow else 2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [10, 300])
def test_non_finite_logit(
    loss: str, value: float, classes: int, generator: torch.Generator
) -> None:
    logits = torch.randn(9, 2, classes, generator=generator)
    targets = torch.rand(9, classes, generator=generator)
    broken = logits.clone()
    broken[4, 1, -1] = value
    result, sound = launch(broken, targets, loss=loss), launch(logits, targets, loss=loss)
    expected = [9] * 4
    expected[STATUS_LOGITS] = 4
    assert result.status == expected
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 4] = False
    assert torch.equal(result.residual[keep.T], sound.residual[keep.T])
    assert result.residual[4, 1, -1] == 0.0
    for name in FIELDS[1:]:
        got, other = getattr(result, name), getattr(sound, name)
        assert math.isnan(got[1, 4]), name
        assert torch.equal(got[keep].nan_to_num(7.0), other[keep].nan_to_num(7.0)), name


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_target(loss: str, generator: torch.Generator) -> None:
    logits = torch.randn(9, 2, 10, generator=generator)
    targets = torch.rand(9, 10, generator=generator)
    targets[6, 9], targets[8, 0] = math.nan, math.nan
    targets[5, 2] = 1.5  # fine for mse
    result = launch(logits, targets, loss=loss)
    assert result.status[STATUS_TARGET] == (6 if loss == "mse" else 5)
    counted = torch.arange(9) < 5
    assert launch(logits, targets, loss=loss, counted=counted).status == [9] * 4


@pytest.mark.parametrize("classes", [1, 10, 300])
def test_a_binary_target_of_one_half_counts_as_on(classes: int, generator: torch.Generator) -> None:
    logits = torch.randn(9, 2, classes, generator=generator)
    targets = torch.full((9, classes), 0.5)
    result = launch(logits, targets, loss="binary_cross_entropy")
    assert torch.equal(result.margin, logits.amin(2).T)
