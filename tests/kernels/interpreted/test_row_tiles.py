"""The rows kernel of one wide head against float64: shapes, losses, tiles, bad input, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alignment_support import BF16, cut
from far_memory import STRIDE, Sparse, each_written_once, walled
from few_classes_support import (
    FIELDS,
    assert_close,
    guarded_arguments,
    guarded_outputs,
    reference,
)
from moso_fast.kernels import row_tiles as module
from moso_fast.kernels.operands import products_of
from moso_fast.kernels.row_arguments import RowOutputs
from moso_fast.kernels.row_tiles import (
    TILES,
    Choice,
    choose_tile,
    row_tiles,
    stored_columns,
)
from moso_fast.kernels.tiles import Tile
from test_few_classes_first import LOSSES, options_of
from test_few_classes_first import draw as draw_heads
from torch import Tensor

from moso_fast.core.status import (
    STATUS_FEATURE,
    STATUS_LABEL,
    STATUS_LOGITS,
    STATUS_SLOTS,
    STATUS_TARGET,
)

# The gradient sum is another kernel's.
OURS = tuple(name for name in FIELDS if name != "grad")
SMALL = Tile(16, 16, 16, 4, 1, 255, 1, "HMMA")
# (n, C, D): one row, one number; around the edges of tiles of 16 or 32 rows, of all lanes, of 16,
# 32 and 64 columns.
SHAPES = [
    (1, 1, 1),
    (5, 2, 3),
    (15, 16, 31),
    (16, 15, 16),
    (33, 17, 32),
    (31, 32, 33),
    (32, 33, 64),
    (65, 64, 65),
    (33, 100, 40),
    (17, 128, 12),
]


def draw(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    loss: str = "cross_entropy",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight and bias of one head, labels; weights that bfloat16 holds exactly."""
    rows, classes, dim = shape
    features, weight, bias, labels = draw_heads((rows, 1, classes, dim), generator, dtype, loss)
    return features, cut(weight), bias, labels


def run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    status: Tensor | None = None,
    **options: Any,
) -> dict[str, Any]:
    """First pass in guarded buffers: the fields, ``lost``, ``counted`` and ``status`` (a list).

    ``stored`` are the residuals as they lie, ``residual`` those of the classes.
    """
    rows, classes = features.shape[0], weight.shape[1]
    out = guarded_outputs(rows, 1)
    if status is None:
        status = torch.full((STATUS_SLOTS,), rows, dtype=torch.int64)
    inputs = [features, weight, bias, labels, options.get("sample_weight")]
    before = [None if value is None else value.clone() for value in inputs]
    with guarded_arguments(module, "row_tiles_kernel", (11, 12, 13)):
        made = row_tiles(features, weight, bias, labels, out=out.rows, status=status, **options)
    for given, copy in zip(inputs, before, strict=True):
        assert given is None or torch.equal(given.nan_to_num(3.0), copy.nan_to_num(3.0))
    assert all(guard.intact() for guard in out.guards), "wrote outside an output"
    products = products_of(features.dtype, options.get("precision", "highest"))
    assert made.residual.shape == (rows, stored_columns(classes, products))
    assert not made.residual[:, classes:].any()  # zeros, and no NaN, behind the classes
    fields = {name: value.clone() for name, value in out.rows._asdict().items()}
    return fields | {
        "stored": made.residual,
        "residual": made.residual[:, None, :classes].float(),
        "lost": made.lost,
        "bias": made.bias[None],
        "status": status.tolist(),
    }


def check(result: dict[str, Any], *args: Any, loosely: float = 1.0, **options: Any) -> None:
    """Compare with float64; residuals that are stored rounded by what the rounding may take."""
    stored = result["stored"]
    if stored.dtype == torch.float32:
        assert result["lost"] is None
        assert_close(result, *args, loosely=loosely, fields=OURS, **options)
        return
    others = tuple(name for name in OURS if name != "residual")
    assert_close(result, *args, loosely=loosely, fields=others, **options)
    exact = reference(*args, **options)["residual"][:, 0]
    narrow = stored[:, : exact.shape[1]].double()
    # The interpreter cuts digits off: less than 2^-7 of a number.
    assert bool(((narrow - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all())
    lost = exact.square().sum(1) - narrow.square().sum(1)
    error = (result["lost"].double() - lost).abs()
    assert bool((error <= 1e-5 * loosely * exact.square().sum(1) + 1e-12).all())


@pytest.mark.parametrize("tile", [None, SMALL], ids=["chosen", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, tile: Tile | None, generator: torch.Generator) -> None:
    if tile is not None and shape[1] > tile.classes:
        shape = (shape[0], tile.classes, shape[2])
    data = draw(shape, generator)
    result = run(*data, tile=tile)
    check(result, *data)
    assert result["status"] == [shape[0]] * 4 and bool(result["counted"].all())


@pytest.mark.parametrize("shape", [*SHAPES, (17, 129, 24), (18, 255, 16), (3, 256, 72)], ids=str)
def test_rounded_products_leave_rounded_residuals(shape, generator: torch.Generator) -> None:
    data = draw(shape, generator, BF16)
    result = run(*data, precision="medium")
    assert result["stored"].dtype == BF16 and result["stored"].shape[1] % 8 == 0
    check(result, *data)
    assert result["status"] == [shape[0]] * 4


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_16_bit_features_are_widened(dtype: torch.dtype, generator: torch.Generator) -> None:
    data = draw((37, 20, 40), generator, dtype)
    for precision in ("highest", "high") if dtype == BF16 else ("highest", "high", "medium"):
        result = run(*data, precision=precision)
        assert result["stored"].dtype == torch.float32
        check(result, *data)


def test_weights_are_rounded_to_bfloat16_at_medium(generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((37, 20, 40), generator, BF16)
    weight += 1e-3 * torch.rand(weight.shape, generator=generator)
    result = run(features, weight, bias, labels, precision="medium")
    assert_close(result, features, weight.to(BF16).float(), bias, labels, fields=("loss",))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(37, 20, 24), (18, 33, 9), (5, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_losses_weights_smoothing_and_ignored_rows(
    dtype: torch.dtype, shape, loss: str, generator: torch.Generator
) -> None:
    features, weight, bias, labels = draw(shape, generator, dtype, loss)
    options = options_of(loss, shape[0], generator)
    ignored = torch.zeros(shape[0], dtype=torch.bool)
    if loss == "cross_entropy":
        ignored[1::4] = True
        labels[ignored] = -100
        features[1] = torch.nan  # nobody asks what stands there
    precision = {"precision": "medium"} if dtype == BF16 else {}
    for given in (bias, None):
        result = run(features, weight, given, labels, **options, **precision)
        check(result, features, weight, given, labels, **options)
        assert result["status"] == [shape[0]] * 4
        assert torch.equal(result["counted"], ~ignored)
        assert not result["residual"][ignored].any()
        if result["lost"] is not None:
            assert not result["lost"][ignored].any()


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize(
    "choice",
    TILES,
    ids=lambda c: f"{c.products}-{c.tile.rows}x{c.tile.classes}{'' if c.aligned else '-odd'}",
)
def test_every_shipped_tile(choice: Choice, more: int, generator: torch.Generator) -> None:
    tile = choice.tile
    dtype = BF16 if choice.products == "bf16" else torch.float32
    precision = "highest" if choice.products == "tf32x3" else "medium"
    dim = tile.dim + 8 if choice.aligned else tile.dim - 3
    shape = (tile.rows + more, tile.classes - (more < 0), dim)
    features, weight, bias, labels = draw(shape, generator, dtype)
    result = run(features, weight, bias, labels, tile=tile, precision=precision)
    check(result, features, weight, bias, labels, loosely=2.0)


def test_lost_of_known_residuals(generator: torch.Generator) -> None:
    """Logits are 0: nine residuals of a tenth, one of a tenth less 1."""
    features, weight, bias, labels = draw((40, 10, 16), generator, BF16)
    result = run(0 * features, weight, 0 * bias, labels, precision="medium")
    r = torch.full((10,), 0.1)
    r[0] -= 1.0
    exact = (r.double().square() - cut(r).double().square()).sum()
    torch.testing.assert_close(result["lost"].double(), exact.expand(40), rtol=1e-4, atol=0)


def test_rows_do_not_depend_on_their_neighbours(generator: torch.Generator) -> None:
    data = draw((40, 20, 33), generator)
    whole = run(*data, tile=Tile(16, 32, 16, 4, 1, 255, 1, "HMMA"))
    part = slice(5, 6)
    given = (data[0][part], *data[1:3], data[3][part])
    one = run(*given, tile=Tile(16, 32, 16, 4, 1, 255, 1, "HMMA"))
    for name in ("loss", "margin", "entropy", "residual_sqnorm"):
        torch.testing.assert_close(one[name][0], whole[name][0, part], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(one["stored"], whole["stored"][part], rtol=2e-5, atol=1e-6)


def test_no_rows(generator: torch.Generator) -> None:
    for dtype, precision in ((torch.float32, "highest"), (BF16, "medium")):
        result = run(*draw((0, 20, 8), generator, dtype), precision=precision)
        assert torch.equal(result["bias"], torch.zeros(1, 20, dtype=torch.float64))
        assert result["loss"].shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_every_number_is_written_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    features, weight, bias, labels = draw((35, 12, 24), generator, dtype)
    with each_written_once():
        run(features, weight, bias, labels, tile=SMALL, precision="medium")


@pytest.mark.parametrize("classes", [10, 100])
def test_confident_model_keeps_its_digits(classes: int, generator: torch.Generator) -> None:
    labels = torch.randint(classes, (200,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, classes).float()
    features = hot + 0.03 * torch.randn(200, classes, generator=generator)
    weight = (20.0 + math.log(classes / 10)) * torch.eye(classes)[None]
    result = run(features, weight, None, labels)
    z = features.double() @ weight[0].double().T
    gap = z - z.gather(1, labels[:, None])
    odds = torch.where(hot.bool(), 0.0, gap.exp()).sum(1)
    assert odds.min() < 1e-8
    error = (result["loss"][0].double() - odds.log1p()).abs() / odds.log1p()
    assert error.max() < 4e-5


@pytest.mark.parametrize("classes", [1, 2, 17, 100])
def test_all_logits_equal(classes: int, generator: torch.Generator) -> None:
    features, _, _, labels = draw((17, classes, 4), generator)
    weight, bias = torch.zeros(1, classes, 4), torch.full((1, classes), 0.5)
    check(run(features, weight, bias, labels), features, weight, bias, labels)


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


def test_choice_of_tiles() -> None:
    for choice in TILES:
        for major in choice.majors:
            found = choose_tile(choice.tile.classes, choice.products, choice.aligned, major=major)
            assert found is not None and found.classes == choice.tile.classes
            assert choose_tile(choice.tile.classes, choice.products, choice.aligned, 1) is None
    for products in ("bf16", "tf32", "tf32x3"):
        for aligned in (True, False):
            for major in (8, 9, 10):
                held = [
                    c.tile
                    for c in TILES
                    if (c.products, c.aligned) == (products, aligned) and major in c.majors
                ]
                # The first that holds the classes; beyond the widest there is none.
                for classes in (1, 16, 17, 64, 65, 128, 129, 256):
                    wanted = next((tile for tile in held if classes <= tile.classes), None)
                    assert choose_tile(classes, products, aligned, major=major) == wanted
                assert choose_tile(257, products, aligned, major=major) is None
                assert max(tile.classes for tile in held) >= 32
    assert stored_columns(10, "bf16") == 16 and stored_columns(16, "bf16") == 16
    assert stored_columns(10, "tf32") == 12 and stored_columns(1, "tf32x3") == 4


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


@pytest.mark.parametrize("classes", [1, 17, 100])
def test_a_binary_target_of_one_half_counts_as_on(classes: int, generator: torch.Generator) -> None:
    features, weight, bias, _ = draw((9, classes, 4), generator)
    targets = torch.full((9, classes), 0.5)
    result = run(features, weight, bias, targets, loss="binary_cross_entropy")
    lowest = (features.double() @ weight[0].double().T + bias[0]).amin(1)
    torch.testing.assert_close(result["margin"][0].double(), lowest, rtol=1e-5, atol=1e-6)


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
