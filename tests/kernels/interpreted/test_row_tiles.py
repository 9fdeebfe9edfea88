"""The rows kernel of one wide head against float64: shapes, losses, dtypes, tiles."""

from __future__ import annotations

import math

import pytest
import torch
from alignment_support import BF16, cut
from few_classes_support import LOSSES, assert_close, options_of
from moso_fast.kernels.row_tiles import TILES, Choice, choose_tile, stored_columns
from moso_fast.kernels.tiles import Tile
from row_tiles_support import SMALL, check, draw, run

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


@pytest.mark.parametrize("classes", [1, 17, 100])
def test_a_binary_target_of_one_half_counts_as_on(classes: int, generator: torch.Generator) -> None:
    features, weight, bias, _ = draw((9, classes, 4), generator)
    targets = torch.full((9, classes), 0.5)
    result = run(features, weight, bias, targets, loss="binary_cross_entropy")
    lowest = (features.double() @ weight[0].double().T + bias[0]).amin(1)
    torch.testing.assert_close(result["margin"][0].double(), lowest, rtol=1e-5, atol=1e-6)


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
