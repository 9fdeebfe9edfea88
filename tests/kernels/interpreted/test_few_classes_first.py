"""The fused first pass for few classes against float64: shapes, losses, bad input, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alignment_support import cut
from far_memory import STRIDE, Sparse, each_written_once
from few_classes_support import (
    FIELDS,
    LOSSES,
    STATISTICS,
    assert_close,
    draw_heads,
    options_of,
    reference,
    run,
)
from moso_fast.kernels import few_classes_tiles
from moso_fast.kernels.few_classes import few_classes_first
from moso_fast.kernels.few_classes_tiles import (
    FIRST_TILES,
    Choice,
    choose_first_tile,
    slab_rows,
)
from moso_fast.kernels.row_arguments import RowOutputs
from moso_fast.kernels.tiles import Tile

from moso_fast.core.status import STATUS_FEATURE, STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET

BF16 = torch.bfloat16
# (n, K, C, D): one row, one number; around the edges of tiles of 16 rows, 16 lanes, 32 columns.
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 2, 3),
    (15, 1, 15, 31),
    (16, 1, 16, 32),
    (33, 1, 10, 33),
    (17, 3, 1, 5),
    (21, 3, 5, 8),
    (20, 2, 16, 17),
    (19, 5, 3, 12),
]
SMALL = Choice("tf32x3", True, False, False, Tile(16, 16, 32, 4, 1, 255, 1, "HMMA"))
AHEAD = SMALL._replace(prefetch=True, reload=True, tile=Tile(16, 32, 64, 4, 1, 255, 1, "HMMA"))


@pytest.mark.parametrize("choice", [None, SMALL, AHEAD], ids=["chosen", "small", "ahead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, choice: Choice | None, generator: torch.Generator) -> None:
    if choice is SMALL and shape[3] > 32:
        shape = (*shape[:3], 32)
    data = draw_heads(shape, generator)
    result = run(*data, choice=choice, padding=3)
    assert_close(result, *data)
    assert result["status"] == [shape[0]] * 4 and bool(result["counted"].all())


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_16_bit_features_are_widened(dtype: torch.dtype, generator: torch.Generator) -> None:
    data = draw_heads((37, 2, 10, 40), generator, dtype)
    assert_close(run(*data, precision="highest"), *data)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(37, 1, 10, 20), (18, 3, 5, 8), (5, 1, 1, 4)], ids=str)
def test_losses_weights_smoothing_and_ignored_rows(
    shape, loss: str, generator: torch.Generator
) -> None:
    features, weight, bias, labels = draw_heads(shape, generator, loss=loss)
    options = options_of(loss, shape[0], generator)
    if loss == "cross_entropy":
        labels[1::4] = -100
    result = run(features, weight, bias, labels, padding=5, **options)
    assert_close(result, features, weight, bias, labels, **options)
    assert result["status"] == [shape[0]] * 4
    ignored = labels == -100 if loss == "cross_entropy" else torch.zeros(shape[0]).bool()
    assert torch.equal(result["counted"], ~ignored)
    bare = run(features, weight, None, labels, **options)
    assert_close(bare, features, weight, None, labels, **options)


@pytest.mark.parametrize("choice", FIRST_TILES, ids=lambda c: f"{c.products}-{c.tile.dim}")
def test_every_shipped_tile(choice: Choice, generator: torch.Generator) -> None:
    tile = choice.tile
    dtype = BF16 if choice.products == "bf16" else torch.float32
    precision = "highest" if choice.products == "tf32x3" else "medium"
    dim = tile.dim if choice.aligned else tile.dim - 3
    features, weight, bias, labels = draw_heads(
        (2 * tile.rows + 1, 1, tile.classes, dim), generator, dtype
    )
    if choice.products == "bf16":
        weight = weight.to(BF16).float()
    result = run(features, weight, bias, labels, choice=choice, precision=precision)
    if choice.products == "bf16":  # residuals are rounded as operands alone
        exact = reference(features, weight, bias, labels)
        rounded = torch.einsum("nkc,nd->kcd", cut(result["residual"]).double(), features.double())
        torch.testing.assert_close(result["grad"], rounded, rtol=1e-5, atol=1e-5)
        result["grad"] = exact["grad"]
    assert_close(result, features, weight, bias, labels, loosely=2.0)


def test_several_slabs_of_several_tiles(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_classes_tiles, "_SLABS", 3)
    data = draw_heads((133, 3, 5, 20), generator)
    for choice in (SMALL, AHEAD):
        result = run(*data, choice=choice)
        assert_close(result, *data)
        again = run(*data, choice=choice, keep=False)
        for name in (*STATISTICS, "grad", "bias", "feature_sqnorm", "counted"):
            assert torch.equal(result[name], again[name]), name


def test_slabs_follow_from_the_shapes() -> None:
    for rows in (1, 16, 17, 50_000, 1_281_167, 20_000_000):
        for precision, most in (("highest", 2048), ("high", 8192), ("medium", 8192)):
            length = slab_rows(rows, 16, precision)
            assert length % 16 == 0 and 16 <= length <= most
            assert -(-rows // length) <= 264 * max(1, -(-rows // (264 * most)))
    assert slab_rows(1_281_167, 16, "highest") == 1632


def test_choice_of_tiles() -> None:
    assert choose_first_tile(10, 1, 512, "tf32x3").tile.dim == 512
    assert choose_first_tile(17, 1, 100, "tf32x3").tile.dim == 256
    assert choose_first_tile(10, 1, 512, "tf32x3", shared_bytes=100_000) is None
    assert choose_first_tile(33, 1, 64, "bf16") is None
    assert choose_first_tile(10, 1, 1025, "tf32") is None
    assert choose_first_tile(10, 1, 1024, "tf32").tile.dim == 1024
    # Four heads of ten classes: two groups beside each other, not four.
    assert choose_first_tile(10, 4, 512, "bf16").tile.classes == 32
    assert not choose_first_tile(10, 1, 511, "bf16", aligned=False).aligned


def test_no_rows(generator: torch.Generator) -> None:
    result = run(*draw_heads((0, 2, 3, 5), generator))
    assert torch.equal(result["grad"], torch.zeros(2, 3, 5, dtype=torch.float64))
    assert torch.equal(result["bias"], torch.zeros(2, 3, dtype=torch.float64))
    assert result["loss"].shape == (2, 0)


def test_every_number_is_written_once(generator: torch.Generator) -> None:
    data = draw_heads((17, 3, 10, 8), generator)  # heads in three groups: three programs a slab
    with each_written_once():
        assert_close(run(*data, choice=SMALL), *data)


def test_heads_do_not_touch_each_other(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw_heads((37, 5, 10, 24), generator)
    whole = run(features, weight, bias, labels, choice=AHEAD)
    for head in range(5):
        one = run(features, weight[head : head + 1], bias[head : head + 1], labels, choice=AHEAD)
        for name in FIELDS:
            got = whole[name]
            if name != "feature_sqnorm":
                got = got[:, head : head + 1] if name == "residual" else got[head : head + 1]
            torch.testing.assert_close(one[name], got, rtol=2e-5, atol=1e-6)


def test_confident_model_keeps_its_digits(generator: torch.Generator) -> None:
    labels = torch.randint(10, (300,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 16).float()
    features = hot + 0.03 * torch.randn(300, 16, generator=generator)
    weight = 20.0 * torch.eye(10, 16)[None]
    result, exact = run(features, weight, None, labels), reference(features, weight, None, labels)
    assert exact["loss"].min() < 1e-8
    for name in ("loss", "residual_sqnorm", "entropy", "residual"):
        error = (result[name].double() - exact[name]).abs() / exact[name].abs()
        assert error.max() < 4e-5, name


@pytest.mark.parametrize("classes", [1, 2, 7, 16])
def test_all_logits_equal(classes: int, generator: torch.Generator) -> None:
    features, _, _, labels = draw_heads((17, 1, classes, 4), generator)
    weight, bias = torch.zeros(1, classes, 4), torch.full((1, classes), 0.5)
    result = run(features, weight, bias, labels)
    assert_close(result, features, weight, bias, labels)


@pytest.mark.parametrize("level", [1e4, -1e4, 3e38])
def test_extreme_logits(level: float) -> None:
    weight = torch.tensor([[[1.0], [-1.0], [0.0]]])
    features = torch.full((20, 1), level)
    labels = torch.arange(20) % 3
    result = run(features, weight, None, labels)
    if level == 3e38:  # |h|^2 overflows: reported, though the row is finite
        assert result["status"][STATUS_LOGITS] == 0 and result["status"][STATUS_FEATURE] == 20
        assert bool(result["feature_sqnorm"].isinf().all()) and bool(result["counted"].all())
    else:
        assert_close(result, features, weight, None, labels)
        assert result["status"] == [20] * 4


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features(value: float, exclude: bool, generator: torch.Generator) -> None:
    features, weight, bias, labels = draw_heads((40, 2, 10, 24), generator)
    labels[3] = -100
    broken = features.clone()
    broken[3, 5] = value  # ignored already: neither reported nor in the sums
    broken[21, 23] = value
    broken[22, 0] = value
    for choice in (SMALL, AHEAD):
        options = {"exclude_nonfinite": exclude, "choice": choice}
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
        assert_close(result, broken, weight, bias, labels)
        assert not result["residual"][[3, 21, 22]].any()


def test_bad_labels_and_targets(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw_heads((40, 2, 10, 8), generator)
    sound = run(features, weight, bias, labels)
    for bad in (10, -1, 2**40):
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
        features, weight, bias, labels = draw_heads((40, 2, 10, 8), generator, loss=loss)
        labels[5, 9], labels[6, 0] = value, value
        name = "cross_entropy" if loss == "soft" else loss
        assert run(features, weight, bias, labels, loss=name)["status"][STATUS_TARGET] == slot
    features, weight, bias, labels = draw_heads((40, 2, 10, 8), generator, loss="soft")
    labels[9] *= 0.9
    assert run(features, weight, bias, labels)["status"][STATUS_TARGET] == 9


def test_overflow_is_reported(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw_heads((20, 1, 3, 4), generator)
    weight[0, 1] = 3e38
    features[11] = 100.0
    weight[0, 1, 1:] = 0.0
    result = run(features, weight, bias, labels)
    assert result["status"][STATUS_LOGITS] <= 11
    assert result["loss"][0, 11].isnan() and not result["residual"][11].any()


def test_rows_beyond_32_bits(generator: torch.Generator) -> None:
    data = draw_heads((3, 3, 5, 7), generator, loss="soft")
    expected = run(*data, choice=SMALL)
    far, far_targets, far_residual = Sparse(7), Sparse(5), Sparse(15)
    far.fill(data[0])
    far_targets.fill(data[3])
    outputs = [Sparse(3) for _ in STATISTICS]
    out = RowOutputs(*(o.matrix() for o in outputs), torch.empty(3), torch.empty(3).bool())
    sums = few_classes_first(
        far.matrix(),
        *data[1:3],
        far_targets.matrix(),
        out=out,
        status=torch.full((4,), 3),
        residual=far_residual.matrix(),
        choice=SMALL,
    )
    assert far.matrix().stride(0) == STRIDE
    assert torch.equal(far_residual.stacked().view(3, 3, 5), expected["residual"])
    assert torch.equal(sums.grad, expected["grad"])
    for name, output in zip(STATISTICS, outputs, strict=True):
        assert torch.equal(output.stacked(), expected[name]), name


def test_expanded_and_padded_features(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw_heads((20, 1, 10, 12), generator)
    wide = torch.full((20, 19), torch.nan)[:, 3:15]
    wide.copy_(features)
    assert_close(run(wide, weight, bias, labels), features, weight, bias, labels)
    same = features[:1].expand(20, 12)
    assert_close(run(same, weight, bias, labels), same, weight, bias, labels)


def arguments() -> dict[str, Any]:
    return {
        "features": torch.zeros(4, 6),
        "weight": torch.zeros(2, 3, 6),
        "bias": torch.zeros(2, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "out": RowOutputs(
            *(torch.zeros(2, 4) for _ in STATISTICS), torch.zeros(4), torch.zeros(4).bool()
        ),
        "status": torch.full((4,), 4),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("weight", torch.zeros(2, 3, 5), "weight must be"),
        ("weight", torch.zeros(2, 6, 3).transpose(1, 2), "weight must be contiguous"),
        ("weight", torch.zeros(2, 33, 6), "no tile holds C = 33"),
        ("bias", torch.zeros(3, 2), "bias must be"),
        ("labels", torch.zeros(5, dtype=torch.int64), "labels must have shape"),
        ("labels", torch.zeros(4), "must be integers"),
        ("labels", torch.zeros(3, 4).T, "unit stride"),
        ("labels", torch.zeros(4, dtype=torch.int64, device="meta"), "must be on cpu"),
        ("out", arguments()["out"]._replace(margin=torch.zeros(4, 2)), "out.margin must be"),
        ("out", arguments()["out"]._replace(loss=torch.zeros(4, 2).T), "unit row stride"),
        ("out", arguments()["out"]._replace(counted=torch.zeros(4)), "out.counted must be"),
        ("out", arguments()["out"]._replace(feature_sqnorm=torch.zeros(3)), "out.feature_sqnorm"),
        ("status", torch.zeros(4), "status must be"),
        ("residual", torch.zeros(4, 5), "residual must be"),
        ("residual", torch.zeros(1, 6).expand(4, 6), "rows apart"),
        ("sample_weight", torch.zeros(3), "sample_weight must be"),
        ("precision", "fast", "precision must be"),
        ("loss", "hinge", "got 'hinge'"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given = arguments()
    given[name] = value
    if name == "weight" and tuple(value.shape) == (2, 33, 6):
        given["bias"] = None
    with pytest.raises(ValueError, match=message) as caught:
        few_classes_first(**given)
    assert "\n" not in str(caught.value)
