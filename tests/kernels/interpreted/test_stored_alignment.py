"""Alignments from stored residuals against float64, in both orders of the product."""

from __future__ import annotations

import pytest
import torch
from alignment_support import BF16, SMALL, assert_dots, cut, dots, draw, guarded_out, launch_stored
from far_memory import STRIDE, Sparse, walled
from moso_fast.kernels import stored_alignment as module
from moso_fast.kernels.stored_alignment import (
    PROJECT_TILES,
    PULL_TILES,
    SelfTerm,
    choose_tile,
    class_splits,
    stored_alignment,
)
from torch import Tensor

ORDERS = ["project", "pull"]
# (n, K, C, D): around the edges of the small tile.
SHAPES = [(1, 1, 1, 1), (15, 1, 17, 15), (16, 2, 16, 16), (17, 3, 5, 33), (33, 1, 40, 31)]


def operands(
    shape: tuple[int, int, int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads, classes, dim = shape
    return (
        draw((rows, dim), generator, dtype),
        draw((rows, heads * classes), generator),
        draw((heads * classes, dim), generator),
        draw((heads * classes,), generator),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[3], torch.float16), (SHAPES[3], BF16)],
    ids=str,
)
def test_matches_float64(shape, dtype: torch.dtype, order: str, generator) -> None:
    features, residual, grad, bias = operands(shape, generator, dtype)
    for mean_bias_grad in (None, bias):
        got = launch_stored(features, residual, grad, shape[1], mean_bias_grad=mean_bias_grad,
                     order=order, tile=SMALL)  # fmt: skip
        given = (features, residual, grad, mean_bias_grad)
        assert_dots(got, dots(*given, shape[1]), *given)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", range(6))
def test_every_shipped_tile(order: str, position: int, generator: torch.Generator) -> None:
    choices = PROJECT_TILES if order == "project" else PULL_TILES
    choice = choices[min(position, len(choices) - 1)]
    tile, dtype = choice.tile, BF16 if choice.rounded else torch.float32
    shape = (tile.rows + 1, 1, tile.classes + 1, tile.dim + 1)
    features, residual, grad, bias = operands(shape, generator, dtype)
    residual, grad = cut(residual) if choice.rounded else residual, grad.to(dtype)
    got = launch_stored(features, residual, grad, mean_bias_grad=bias, order=order, tile=tile)
    given = (features, residual, grad, bias)
    assert_dots(got, dots(*given, 1), *given)


@pytest.mark.parametrize("order", ORDERS)
def test_stored_in_bfloat16(order: str, generator: torch.Generator) -> None:
    features, residual, grad, bias = operands((20, 2, 18, 19), generator, BF16)
    residual, grad = residual.to(BF16), grad.to(BF16)
    got = launch_stored(features, residual, grad, 2, mean_bias_grad=bias, order=order, tile=SMALL)
    assert_dots(got, dots(features, residual, grad, bias, 2), features, residual, grad, bias)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("heads", [1, 3])
def test_self_term_is_what_rounding_took(order: str, heads: int, generator) -> None:
    rows, classes, dim = 35, 18, 21
    features, residual, grad, bias = operands((rows, heads, classes, dim), generator, BF16)
    grad = grad.to(BF16)
    sqnorm = features.double().square().sum(1)
    counted = torch.arange(rows) % 5 != 1
    residual[1] = sqnorm[1] = torch.nan  # of a row that does not count
    term = SelfTerm(sqnorm.float(), counted.sum())
    got = launch_stored(features, residual, grad, heads, mean_bias_grad=bias, counted=counted,
                 self_term=term, order=order, tile=SMALL)  # fmt: skip
    rounded = cut(residual)
    operand = residual if order == "project" else rounded
    other = residual if order == "project" else residual + rounded
    lost = ((residual - rounded).double() * other.double()).view(rows, heads, -1).sum(-1).T
    exact = dots(features, operand, grad, None, heads) + lost * sqnorm / counted.sum()
    exact += (residual.double() * bias.double()).view(rows, heads, -1).sum(-1).T
    exact = torch.where(counted, exact, 0.0)
    assert (lost * sqnorm / 28)[:, counted].abs().max() > 1e-2  # far above the bound below
    assert_dots(got, exact, features, residual, grad, bias)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("columns", [18, 24])
def test_residuals_that_were_stored_rounded(
    order: str, splits: int, columns: int, generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They tell no more what rounding took: |r|^2 comes back by the number that was kept of it."""
    monkeypatch.setattr(module, "class_splits", lambda *_: splits)
    rows, classes, dim = 35, 18, 37
    features, wide, grad, bias = operands((rows, 1, classes, dim), generator, BF16)
    grad, stored = grad.to(BF16), torch.full((rows, columns), torch.nan, dtype=BF16)
    stored[:, :classes] = cut(wide).to(BF16)
    residual = stored[:, :classes]  # padded rows: what lies behind the classes is not read
    sqnorm = features.double().square().sum(1)
    lost = wide.double().square().sum(1) - residual.double().square().sum(1)
    counted = torch.arange(rows) % 5 != 1
    stored[1], sqnorm[1], lost[1] = torch.nan, torch.nan, torch.nan  # of a row that does not count
    term = SelfTerm(sqnorm.float(), counted.sum(), lost.float())
    got = guarded_out(1, rows)
    stored_alignment(features, residual, grad, got.view, mean_bias_grad=bias, counted=counted,
                     self_term=term, order=order, tile=SMALL)  # fmt: skip
    assert got.intact()
    restored = (lost * sqnorm / counted.sum())[None]
    exact = torch.where(counted, dots(features, residual, grad, bias, 1) + restored, 0.0)
    assert restored[:, counted].abs().max() > 1e-2  # far above the bound below
    used = torch.where(counted[:, None], residual.float(), 0)
    assert_dots(got.view, exact, features, used, grad, bias)
    # Once a row, however many programs share it.
    zero = torch.zeros_like(grad)
    stored_alignment(features, residual, zero, got.view, counted=counted, self_term=term,
                     order=order, tile=SMALL)  # fmt: skip
    given_back = torch.where(counted, restored, 0.0)
    torch.testing.assert_close(got.view.double(), given_back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_lost_is_read_within_its_rows(order: str, generator) -> None:
    features, residual, grad, bias = operands((17, 1, 18, 20), generator, BF16)
    given = [walled(t) for t in (features, residual.to(BF16), grad.to(BF16))]
    term = SelfTerm(walled(torch.ones(17)), walled(torch.tensor(17)), walled(torch.zeros(17)))
    got = launch_stored(
        *given, mean_bias_grad=walled(bias), self_term=term, order=order, tile=SMALL
    )
    exact = dots(*given, bias, 1)
    assert_dots(got, exact, *given, bias)


@pytest.mark.parametrize("order", ORDERS)
def test_self_term_counts_once_where_a_row_is_split(order: str, generator) -> None:
    features, residual, _, _ = operands((4, 1, 40, 40), generator, BF16)
    grad = torch.zeros(40, 40, dtype=BF16)
    sqnorm = features.float().square().sum(1)
    for count in (4, 0):  # no row that counts: divided by 1
        term = SelfTerm(sqnorm, torch.tensor(count))
        got = launch_stored(features, residual, grad, self_term=term, order=order, tile=SMALL)
        other = residual + cut(residual) if order == "pull" else residual
        lost = ((residual - cut(residual)).double() * other.double()).sum(1)
        torch.testing.assert_close(got[0].double(), lost * sqnorm / max(count, 1))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_do_not_count_may_hold_anything(order: str, generator) -> None:
    features, residual, grad, bias = operands((40, 2, 20, 20), generator)
    counted = torch.arange(40) % 7 != 2
    features[2], residual[2], features[9, 3], features[16, 0] = torch.nan, torch.inf, torch.inf, 0
    got = launch_stored(features, residual, grad, 2, mean_bias_grad=bias, counted=counted,
                 order=order, tile=SMALL)  # fmt: skip
    exact = torch.where(counted, dots(features, residual, grad, bias, 2), 0.0)
    given = (features[counted], residual[counted], grad, bias)
    assert_dots(got[:, counted], exact[:, counted], *given)
    assert not got[:, ~counted].any()


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5])
def test_split_classes(splits: int, generator, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five class tiles among up to five programs: uneven shares, and one that gets nothing.
    monkeypatch.setattr(module, "class_splits", lambda *_: splits)
    features, residual, grad, bias = operands((20, 2, 65, 18), generator)
    got = launch_stored(
        features, residual, grad, 2, mean_bias_grad=bias, order="project", tile=SMALL
    )
    given = (features, residual, grad, bias)
    assert_dots(got, dots(*given, 2), *given)


@pytest.mark.parametrize("order", ORDERS)
def test_no_rows_strides_and_expanded_rows(order: str, generator: torch.Generator) -> None:
    features, residual, grad, bias = operands((50, 2, 9, 40), generator)
    empty = torch.empty(2, 0)
    stored_alignment(features[:0], residual[:0], grad, empty, order=order)
    views = (features[::2, 3:20], residual[::2], grad[:, 3:20])
    got = launch_stored(*views, 2, mean_bias_grad=bias, order=order, tile=SMALL)
    assert_dots(got, dots(*views, bias, 2), *views, bias)
    expanded = features[:1].expand(50, 40)
    got = launch_stored(expanded, residual, grad, 2, order=order, tile=SMALL)
    assert_dots(got, dots(expanded, residual, grad, None, 2), expanded, residual, grad)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_nothing_beyond_its_operands(shape, order: str, generator) -> None:
    rows, heads = shape[:2]
    features, residual, grad, bias = operands(shape, generator, BF16)
    given = [walled(t) for t in (features, residual, grad.to(BF16), bias)]
    counted = walled(torch.ones(rows, dtype=torch.bool))
    term = SelfTerm(walled(torch.zeros(rows)), walled(torch.tensor(rows)))
    got = launch_stored(*given[:3], heads, mean_bias_grad=given[3], counted=counted, self_term=term,
                 order=order, tile=SMALL)  # fmt: skip
    operand = cut(residual) if order == "pull" else residual
    exact = dots(features, operand, given[2], None, heads)
    exact += (residual.double() * bias.double()).view(rows, heads, -1).sum(-1).T
    assert_dots(got, exact, features, residual, given[2], bias)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("which", ["features", "residual", "mean_grad", "out"])
def test_offsets_are_64_bit(which: str, order: str, generator: torch.Generator) -> None:
    features, residual, grad, _ = operands((3, 3, 1, 7), generator)
    near = {"features": features, "residual": residual, "mean_grad": grad, "out": torch.empty(3, 3)}
    far = Sparse(near[which].shape[1])
    far.fill(near[which])
    given = {**near, which: far.matrix()}
    assert given[which].stride(0) == STRIDE
    stored_alignment(**given, order=order, tile=SMALL)
    got = far.stacked() if which == "out" else given["out"]
    assert_dots(got, dots(features, residual, grad, None, 3), features, residual, grad)


def test_rows_do_not_depend_on_their_neighbours(generator: torch.Generator) -> None:
    features, residual, grad, _ = operands((40, 1, 20, 33), generator)
    for order in ORDERS:
        whole = launch_stored(features, residual, grad, order=order, tile=SMALL)
        part = launch_stored(features[5:6], residual[5:6], grad, order=order, tile=SMALL)
        torch.testing.assert_close(part[0], whole[0, 5:6], rtol=1e-6, atol=1e-6)


def test_choice_of_order_tile_and_splits(generator: torch.Generator) -> None:
    for project, choices in ((True, PROJECT_TILES), (False, PULL_TILES)):
        for choice in choices:
            kind = (choice.rounded, choice.aligned, choice.majors[0])
            largest = [c.tile for c in choices if (c.rounded, c.aligned) == kind[:2]][-1]
            assert choose_tile(choice.tile.classes, project, *kind).classes == choice.tile.classes
            assert choose_tile(10**6, project, *kind[:2], 10) == largest
    tile = choose_tile(1000, True, True)
    assert tile.classes == 128
    assert class_splits(10**6, 1, 100, 1024, tile) == 1
    assert class_splits(10**6, 1, 1000, 4096, tile) == 3  # 132 tiles of 512 KiB against 24 MiB
    assert class_splits(8192, 1, 128_256, 8192, tile) == 8  # to fill a GPU
    assert class_splits(128, 1, 1000, 1024, tile) == 8  # no more than class tiles
    assert class_splits(128, 700, 1000, 1024, tile) == 1  # heads fill it too


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("residual", torch.zeros(4, 5), r"residual must be \(4, 6\)"),
        ("residual", torch.zeros(4, 12)[:, ::2], "unit column stride"),
        ("mean_grad", torch.zeros(6, 5), r"mean_grad must be \('any', 6\)"),
        ("mean_grad", torch.zeros(6, 6, dtype=BF16), "mean_grad must be .* one of float32; got"),
        ("mean_grad", torch.zeros(5, 6), "mean_grad must be .* K = 2"),
        ("mean_grad", torch.zeros(6, 6, device="meta"), "mean_grad must be on cpu"),
        ("out", torch.zeros(2, 5), r"out must be \(K, 4\)"),
        ("out", torch.zeros(2, 4, dtype=torch.float64), "out must be"),
        ("out", torch.zeros(4, 2).T, "out must have unit row stride"),
        ("out", torch.zeros(1, 4).expand(2, 4), "heads apart"),
        ("out", torch.zeros(2, 4, device="meta"), "out must be on cpu"),
        ("mean_bias_grad", torch.zeros(3), "mean_bias_grad must be"),
        ("counted", torch.ones(4), "counted must be"),
        ("self_term", SelfTerm(torch.ones(4), torch.tensor(4)), "self_term goes with bfloat16"),
        ("precision", "low", "precision must be one of"),
        ("order", "push", "order must be"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given = {
        "features": torch.zeros(4, 6),
        "residual": torch.zeros(4, 6),
        "mean_grad": torch.zeros(6, 6),
        "out": torch.full((2, 4), 7.0),
    }
    out = given["out"]
    with pytest.raises(ValueError, match=message) as caught:
        stored_alignment(**(given | {name: value}))
    assert "\n" not in str(caught.value)
    assert bool((out == 7.0).all())


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (SelfTerm(torch.ones(3), torch.tensor(4)), "feature_sqnorm must be"),
        (SelfTerm(torch.ones(4), torch.tensor(4.0)), "count must be"),
        (SelfTerm(torch.ones(4), torch.tensor([4])), "count must be"),
        (SelfTerm(torch.ones(4), torch.tensor(4), torch.ones(3)), "self_term.lost must be"),
        (SelfTerm(torch.ones(4), torch.tensor(4), torch.ones(4)), "lost is of one head; got 3"),
    ],
)
def test_refused_self_terms(term: SelfTerm, message: str) -> None:
    heads = 3 if "one head" in message else 1
    with pytest.raises(ValueError, match=message):
        stored_alignment(
            torch.zeros(4, 6, dtype=BF16),
            torch.zeros(4, 3),
            torch.zeros(3, 6, dtype=BF16),
            torch.zeros(heads, 4),
            self_term=term,
        )
