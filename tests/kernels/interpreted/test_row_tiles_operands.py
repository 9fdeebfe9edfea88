"""The rows kernel of one wide head: operands of any layout, bad ones, and what may be touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alignment_support import BF16
from far_memory import STRIDE, Sparse, each_written_once, walled
from few_classes_support import assert_close, guarded_outputs
from moso_fast.kernels.row_arguments import RowOutputs
from moso_fast.kernels.row_tiles import row_tiles
from moso_fast.kernels.tiles import Tile
from row_tiles_support import OURS, SMALL, check, draw, run

from moso_fast.core.status import (
    STATUS_FEATURE,
    STATUS_LABEL,
    STATUS_LOGITS,
    STATUS_SLOTS,
    STATUS_TARGET,
)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_norm_that_overflows_is_not_a_bad_feature(dtype: torch.dtype, exclude: bool) -> None:
    """3e38 is finite, its square is not: the row counts, and its overflow is reported."""
    features = torch.ones(20, 8, dtype=dtype)
    features[4], features[9, 3] = 3e38, torch.nan
    weight = torch.tensor([1e-38, -1e-38, 0.0])[None, :, None].repeat(1, 1, 8)
    labels = torch.zeros(20, dtype=torch.int64)
    result = run(features, weight, None, labels, precision="medium", exclude_nonfinite=exclude)
    assert result["status"][STATUS_LOGITS] == 4
    assert result["status"][STATUS_FEATURE] == (20 if exclude else 9)
    assert bool(result["feature_sqnorm"][4].isinf()) and result["feature_sqnorm"][9] == 0
    assert bool(result["counted"][4]) and bool(result["counted"][9]) is not exclude
    assert bool(result["loss"][0, 4].isfinite())


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_non_finite_features(
    dtype: torch.dtype, value: float, exclude: bool, generator: torch.Generator
) -> None:
    features, weight, bias, labels = draw((40, 20, 24), generator, dtype)
    labels[3] = -100
    broken = features.clone()
    broken[3, 5] = value  # ignored already: neither reported nor in the sums
    broken[21, 23] = value
    broken[22, 0] = value
    for tile in (None, Tile(16, 32, 16, 4, 1, 255, 1, "HMMA")):
        options = {"exclude_nonfinite": exclude, "tile": tile, "precision": "medium"}
        result = run(broken, weight, bias, labels, **options)
        expected = [40] * 4
        if not exclude:
            expected[STATUS_FEATURE] = 21
        assert result["status"] == expected
        counted = torch.ones(40, dtype=torch.bool)
        counted[3] = False
        if exclude:
            counted[[21, 22]] = False
        assert torch.equal(result["counted"], counted)
        others = tuple(name for name in OURS if name != "residual")
        assert_close(result, broken, weight, bias, labels, fields=others)
        assert not result["residual"][[3, 21, 22]].any()
        if result["lost"] is not None:
            assert not result["lost"][[3, 21, 22]].any()


def test_bad_labels_and_targets(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((40, 20, 8), generator)
    sound = run(features, weight, bias, labels)
    for bad in (20, -1, 2**40):
        broken = labels.clone()
        broken[7], broken[30] = bad, bad
        result = run(features, weight, bias, broken, first_row=1000, status=torch.full((4,), 2000))
        expected = [2000] * 4
        expected[STATUS_LABEL] = 1007
        assert result["status"] == expected
        assert not result["residual"][[7, 30]].any()
        rest = torch.ones(40, dtype=torch.bool)
        rest[[7, 30]] = False
        assert torch.equal(result["residual"][rest], sound["residual"][rest])
    for loss, value, slot in (
        ("soft", 1.5, 5), ("soft", math.nan, 5), ("binary_cross_entropy", -0.1, 5),
        ("mse", math.inf, 5), ("mse", 7.0, 40),
    ):  # fmt: skip
        features, weight, bias, labels = draw((40, 20, 8), generator, loss=loss)
        labels[5, 19], labels[6, 0] = value, value
        name = "cross_entropy" if loss == "soft" else loss
        assert run(features, weight, bias, labels, loss=name)["status"][STATUS_TARGET] == slot
    features, weight, bias, labels = draw((40, 20, 8), generator, loss="soft")
    labels[9] *= 0.9
    assert run(features, weight, bias, labels)["status"][STATUS_TARGET] == 9


def test_overflowing_logits_are_reported(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((20, 3, 4), generator)
    weight[0, 1], weight[0, 1, 1:] = 3e38, 0.0
    features[11] = 100.0
    result = run(features, weight, bias, labels)
    assert result["status"][STATUS_LOGITS] <= 11
    assert result["loss"][0, 11].isnan() and not result["residual"][11].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [2, 17, 100])
def test_difference_of_logits_overflows(classes: int, soft: bool) -> None:
    """A gap of infinity is probability 0: nothing in the entropy or the loss, and no NaN."""
    weight = torch.full((1, classes, 1), -3e38)
    weight[0, 0] = 3e38
    labels = torch.eye(classes)[:1] if soft else torch.tensor([0])
    result = run(torch.ones(1, 1), weight, None, labels)
    assert result["status"] == [1] * STATUS_SLOTS
    assert float(result["loss"]) == 0.0 and float(result["entropy"]) == 0.0
    assert not result["residual"].any() and math.isinf(float(result["margin"]))


def test_labels_and_targets_of_other_dtypes(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((20, 10, 8), generator)
    expected = run(features, weight, bias, labels)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(
            run(features, weight, bias, labels.to(dtype))["stored"], expected["stored"]
        )
    labels = draw((20, 10, 8), generator, loss="soft")[3]
    for dtype in (BF16, torch.float16, torch.float64):
        wide = torch.full((20, 17), torch.nan, dtype=dtype)[:, 3:13]
        wide.copy_(labels)
        check(run(features, weight, bias, wide), features, weight, bias, wide)


def test_strided_and_expanded_features(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((20, 10, 12), generator)
    for first, length in ((3, 19), (4, 24)):  # rows at any address; rows at multiples of 16 bytes
        wide = torch.full((20, length), torch.nan)[:, first : first + 12]
        wide.copy_(features)
        check(run(wide, weight, bias, labels), features, weight, bias, labels)
    same = features[:1].expand(20, 12)
    check(run(same, weight, bias, labels), same, weight, bias, labels)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_every_number_is_written_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((35, 12, 24), generator, dtype)
    with each_written_once():
        run(features, weight, bias, labels, tile=SMALL, precision="medium")


@pytest.mark.parametrize("loss", ["cross_entropy", "soft"])
def test_reads_nothing_beyond_its_operands(loss: str, generator: torch.Generator) -> None:
    for shape in ((17, 15, 33), (1, 1, 1), (33, 17, 31)):
        features, weight, bias, labels = draw(shape, generator, loss=loss)
        weights = walled(torch.ones(shape[0]))
        given = [walled(t) for t in (features, weight, bias, labels)]
        result = run(*given, sample_weight=weights)
        check(result, features, weight, bias, labels)


def test_rows_beyond_32_bits(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((3, 5, 7), generator, loss="soft")
    expected = run(features, weight, bias, labels, tile=SMALL)
    far, far_targets = Sparse(7), Sparse(5)
    far.fill(features)
    far_targets.fill(labels)
    assert far.matrix().stride(0) == STRIDE
    result = run_unguarded(far.matrix(), weight, bias, far_targets.matrix())
    assert torch.equal(result.residual, expected["stored"])


def run_unguarded(*given: Any) -> Any:
    """Launch on inputs too far apart to be copied."""
    out = guarded_outputs(3, 1)
    return row_tiles(*given, out=out.rows, status=torch.full((4,), 3), tile=SMALL)


def arguments() -> dict[str, Any]:
    return {
        "features": torch.zeros(4, 6),
        "weight": torch.zeros(1, 3, 6),
        "bias": torch.zeros(1, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "out": RowOutputs(
            *(torch.zeros(1, 4) for _ in range(4)), torch.zeros(4), torch.zeros(4).bool()
        ),
        "status": torch.full((4,), 4),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("weight", torch.zeros(1, 3, 5), "weight must be"),
        ("weight", torch.zeros(2, 3, 6), "weight must be of one head"),
        ("weight", torch.zeros(1, 6, 3).transpose(1, 2), "weight must be contiguous"),
        ("weight", torch.zeros(1, 300, 6), "no tile holds C = 300"),
        ("bias", torch.zeros(3, 2), "bias must be"),
        ("labels", torch.zeros(5, dtype=torch.int64), "labels must have shape"),
        ("labels", torch.zeros(4), "must be integers"),
        ("labels", torch.zeros(3, 4).T, "unit stride"),
        ("labels", torch.zeros(4, dtype=torch.int64, device="meta"), "must be on cpu"),
        ("out", arguments()["out"]._replace(margin=torch.zeros(4, 1)), "out.margin must be"),
        ("out", arguments()["out"]._replace(loss=torch.zeros(4, 2).T[:1]), "unit row stride"),
        ("out", arguments()["out"]._replace(counted=torch.zeros(4)), "out.counted must be"),
        ("out", arguments()["out"]._replace(feature_sqnorm=torch.zeros(3)), "out.feature_sqnorm"),
        ("status", torch.zeros(4), "status must be"),
        ("sample_weight", torch.zeros(3), "sample_weight must be"),
        ("precision", "fast", "precision must be"),
        ("loss", "hinge", "got 'hinge'"),
        ("tile", Tile(16, 2, 16, 4, 1, 255, 1, "HMMA"), "no tile holds C = 3"),
    ],
)
def test_refused_arguments(name: str, value: Any, message: str) -> None:
    given = arguments()
    given[name] = value
    if name == "weight" and value.shape[:2] != (1, 3):
        given["bias"] = None
    with pytest.raises(ValueError, match=message) as caught:
        row_tiles(**given)
    assert "\n" not in str(caught.value)
