"""R^T H and the column sums of R against float64, over tile edges, slabs, masks and strides."""

from __future__ import annotations

import pytest
import torch
from far_memory import Sparse, each_written_once, walled
from moso_fast.kernels import gradient_sum as module
from moso_fast.kernels.gradient_sum import (
    TILES,
    PartialSums,
    choose_tile,
    gradient_sum,
    partial_sums,
    slab_rows,
)
from moso_fast.kernels.tiles import Tile
from residual_support import Guarded
from torch import Tensor

SMALL = Tile(16, 16, 32, 4, 2, 255, 65536, "HMMA")
# (n, M, D): around the edges of the small tile, one and several slabs.
SHAPES = [(1, 1, 1), (15, 17, 31), (16, 16, 32), (17, 15, 33), (40, 33, 65), (513, 3, 5)]
BF16 = torch.bfloat16


def operands(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    rows, classes, dim = shape
    residual = torch.randn(rows, classes, generator=generator).to(residual_dtype)
    return residual, torch.randn(rows, dim, generator=generator).to(dtype)


def assert_sums(result: tuple, residual: Tensor, features: Tensor) -> None:
    """Compare with float64: at most twice the error of float32 sums, plus a small floor."""
    left, right = residual.double(), features.double()
    for got, exact, scale, rounded in (
        (result[0], left.T @ right, left.abs().T @ right.abs(), residual.float().T @ right.float()),
        (result[1], left.sum(0), left.abs().sum(0), residual.float().sum(0)),
    ):
        assert got.dtype == torch.float64 and got.shape == exact.shape
        error, own = (got - exact).abs(), (rounded.double() - exact).abs()
        bound = 2.0 * own.max() + 2e-7 * scale
        assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_matches_float64(shape, dtype: torch.dtype, generator: torch.Generator) -> None:
    residual, features = operands(shape, generator, dtype)
    for precision in ("highest", "high"):
        result = gradient_sum(residual, features, precision=precision, tile=SMALL)
        assert_sums(result, residual, features)


@pytest.mark.parametrize(
    "choice", TILES, ids=lambda c: f"{c.tile.classes}x{c.tile.dim}{'-narrow' if c.narrow else ''}"
)
def test_every_shipped_tile(choice, generator: torch.Generator) -> None:
    tile = choice.tile
    shape = (2 * tile.rows + 1, tile.classes + 1, tile.dim + 1)
    dtype = BF16 if choice.rounded else torch.float32
    residual, features = operands(shape, generator, dtype, dtype)
    precision = "medium" if choice.rounded else "highest"
    assert_sums(
        gradient_sum(residual, features, precision=precision, tile=tile), residual, features
    )


def test_residual_is_rounded_as_an_operand_alone(generator: torch.Generator) -> None:
    residual, features = operands((40, 20, 35), generator, BF16)
    result = gradient_sum(residual, features, precision="medium", tile=SMALL)
    # The interpreter rounds towards zero, hardware to the nearest.
    cut = (residual.view(torch.int32) & -65536).view(torch.float32)
    assert_sums((result.grad, cut.double().sum(0)), cut, features)
    torch.testing.assert_close(result.bias, residual.double().sum(0), rtol=1e-5, atol=1e-5)
    assert (cut.double().sum(0) - result.bias).abs().max() > 1e-3


@pytest.mark.parametrize(
    "choice", [c for c in TILES if c.narrow], ids=lambda c: f"{c.tile.classes}x{c.tile.dim}"
)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_narrow_residuals(choice, more: int, generator: torch.Generator) -> None:
    """As they are left by the first pass: bfloat16, in padded rows, zeros behind the classes."""
    tile = choice.tile
    classes = tile.classes + 8 * more
    residual, features = operands((tile.rows + more, classes, tile.dim + 8 * more), generator, BF16)
    residual[:, -3:] = 0
    counted = torch.arange(tile.rows + more) % 5 != 2
    features[2] = torch.nan
    narrow = residual.to(BF16)
    result = gradient_sum(
        narrow, features, precision="medium", counted=counted, bias=False, tile=tile
    )
    assert result.bias is None and not result.grad[-3:].any()
    both = narrow[counted], features[counted]
    assert_sums((result.grad, both[0].double().sum(0)), *both)
    chosen = gradient_sum(narrow, features, precision="medium", counted=counted)
    assert_sums(chosen, *both)


def test_rows_that_do_not_count_may_hold_anything(generator: torch.Generator) -> None:
    residual, features = operands((600, 7, 20), generator)
    counted = torch.arange(600) % 7 != 2
    residual[2], features[2], features[9, 3] = torch.nan, torch.inf, torch.nan
    result = gradient_sum(residual, features, counted=counted, tile=SMALL)
    assert_sums(result, residual[counted], features[counted])
    assert not gradient_sum(residual, features, counted=counted & False).grad.any()


def test_no_rows_and_no_bias(generator: torch.Generator) -> None:
    empty = gradient_sum(*operands((0, 3, 5), generator))
    assert torch.equal(empty.grad, torch.zeros(3, 5, dtype=torch.float64))
    assert torch.equal(empty.bias, torch.zeros(3, dtype=torch.float64))
    residual, features = operands((20, 3, 5), generator)
    full, bare = (gradient_sum(residual, features, bias=b) for b in (True, False))
    assert bare.bias is None and torch.equal(bare.grad, full.grad)


def test_strided_expanded_and_offset_operands(generator: torch.Generator) -> None:
    wide, tall = operands((50, 40, 60), generator)
    residual, features = wide[:, 3:10], tall[::2].repeat_interleave(2, 0)[:, 1:24]
    assert_sums(gradient_sum(residual, features, tile=SMALL), residual, features)
    expanded = tall[:1].expand(50, 60)
    assert_sums(gradient_sum(residual, expanded, tile=SMALL), residual, expanded)
    single = wide[:1, :7].as_strided((1, 7), (1, 1))
    assert_sums(gradient_sum(single, tall[:1], tile=SMALL), single, tall[:1])


def test_groups_of_slabs_give_the_same_sums(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual, features = operands((2100, 3, 5), generator)
    whole = gradient_sum(residual, features, tile=SMALL)
    for slabs in (2, 1):
        monkeypatch.setattr(module, "PARTIAL_BYTES", slabs * 4 * 3 * 5)
        parts = gradient_sum(residual, features, tile=SMALL)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-14, atol=1e-14)
        assert torch.equal(parts.grad, gradient_sum(residual, features, tile=SMALL).grad)
    monkeypatch.setattr(module, "PARTIAL_BYTES", 1)
    assert_sums(gradient_sum(residual, features, tile=SMALL), residual, features)


@pytest.mark.parametrize("shape", [(40, 17, 33), (33, 1, 1), (31, 16, 32)], ids=str)
def test_writes_its_partials_and_nothing_else(shape, generator: torch.Generator) -> None:
    rows, classes, dim = shape
    residual, features = operands(shape, generator)
    slabs, length = 2, 16
    numbers = slabs * classes * dim
    grad = Guarded(1, numbers, numbers)
    bias = Guarded(1, slabs * classes, slabs * classes)
    for output in (grad, bias):
        output.view.fill_(torch.nan)
    before = residual.clone(), features.clone()
    out = PartialSums(grad.view.view(slabs, classes, dim), bias.view.view(slabs, classes))
    with each_written_once():
        partial_sums(residual, features, None, out, rows // length - 1, length, SMALL, "highest")
    assert grad.intact() and bias.intact()
    assert torch.equal(residual, before[0]) and torch.equal(features, before[1])
    start = (rows // length - 1) * length
    for slab in range(slabs):
        part = slice(start + slab * length, start + (slab + 1) * length)
        assert_sums(
            (out.grad[slab].double(), out.bias[slab].double()), residual[part], features[part]
        )


@pytest.mark.parametrize("shape", [(17, 15, 33), (1, 1, 1), (33, 17, 31)], ids=str)
def test_reads_nothing_beyond_its_operands(shape, generator: torch.Generator) -> None:
    residual, features = (walled(operand) for operand in operands(shape, generator))
    counted = walled(torch.ones(shape[0], dtype=torch.bool))
    assert_sums(gradient_sum(residual, features, counted=counted, tile=SMALL), residual, features)


@pytest.mark.parametrize("which", ["residual", "features"])
def test_offsets_are_64_bit(which: str, generator: torch.Generator) -> None:
    residual, features = operands((3, 5, 7), generator)
    far = Sparse(5 if which == "residual" else 7)
    far.fill(residual if which == "residual" else features)
    given = {"residual": residual, "features": features, which: far.matrix()}
    assert_sums(gradient_sum(**given, tile=SMALL), residual, features)


def test_slabs_depend_on_shapes_alone() -> None:
    for precision, most in (("highest", 2048), ("high", 8192), ("medium", 8192)):
        assert slab_rows(2**40, 1, 32, precision) == most
        assert slab_rows(10**4, 10**3, 32, precision) == most
        assert slab_rows(10**4, 1, 32, precision) == 512
        assert 512 <= slab_rows(1_281_167, 4, 64, precision) <= most
    assert slab_rows(0, 1, 32, "highest") == 512


def test_choice_of_tiles() -> None:
    for rounded in (True, False):
        for aligned in (True, False):
            for classes in (1, 64, 65, 10**5):
                for narrow in (False, True) if rounded else (False,):
                    tile = choose_tile(classes, 512, rounded, aligned, narrow)
                    kind = (rounded, aligned, narrow and aligned)
                    fitting = [c for c in TILES if (c.rounded, c.aligned, c.narrow) == kind]
                    assert tile in [c.tile for c in fitting if c.majors == (8, 9, 10)]
                    assert slab_rows(1, 1, tile.rows, "highest") % tile.rows == 0
                    assert slab_rows(2**40, 1, tile.rows, "medium") % tile.rows == 0
    for narrow in (False, True):
        assert choose_tile(64, 512, True, narrow=narrow).classes == 64
    assert choose_tile(65, 512, True).classes == 128


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("residual", torch.zeros(4, 3, dtype=torch.float64), "residual must be"),
        ("residual", torch.zeros(4, 3, dtype=BF16), "one of float32; got"),
        ("residual", torch.zeros(5, 3), r"residual must be \(4, 'any'\)"),
        ("residual", torch.zeros(4, 0), "at least one column"),
        ("residual", torch.zeros(4, 6)[:, ::2], "unit column stride"),
        ("residual", torch.zeros(4, 3, device="meta"), "residual must be on cpu"),
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("features", torch.zeros(4), "features must be"),
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("counted", torch.ones(4), "counted must be"),
        ("counted", torch.ones(8, dtype=torch.bool)[::2], "counted must be"),
        ("precision", "low", "precision must be one of"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given = {"residual": torch.zeros(4, 3), "features": torch.zeros(4, 6), name: value}
    with pytest.raises(ValueError, match=message) as caught:
        gradient_sum(given.pop("residual"), given.pop("features"), **given)
    assert "\n" not in str(caught.value)
