"""The second pass for few classes against float64: kept and recomputed residuals, masks, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alignment_support import assert_dots, cut, dots
from far_memory import STRIDE, Sparse
from few_classes_support import LOSSES, assert_close, before_a_forbidden_page, reference, run_second
from few_classes_support import run as first_pass
from moso_fast.kernels.few_classes import Recompute, few_classes_second
from moso_fast.kernels.few_classes_tiles import SECOND_TILES, Choice, choose_second_tile
from moso_fast.kernels.tiles import Tile
from torch import Tensor

BF16 = torch.bfloat16
SHAPES = [
    (1, 1, 1, 1),
    (15, 1, 16, 31),
    (16, 3, 5, 32),
    (33, 1, 10, 33),
    (70, 5, 3, 65),
    (20, 2, 13, 8),
]
SMALL = Choice("tf32x3", True, False, False, Tile(16, 16, 32, 4, 1, 255, 1, "HMMA"))


def draw(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    loss: str = "cross_entropy",
) -> dict[str, Any]:
    """Arguments of a second pass with residuals of a real first pass, every fourth row out."""
    rows, heads, classes, dim = shape
    features = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(heads, classes, dim, generator=generator) * min(1.0, 2.5 / dim**0.5)
    weight = cut(weight)  # what bfloat16 products see of it
    bias = torch.randn(heads, classes, generator=generator)
    if loss == "cross_entropy":
        labels = torch.randint(0, classes, (rows,), generator=generator)
    elif loss == "soft":
        labels = torch.softmax(torch.randn(rows, classes, generator=generator), 1)
    else:
        labels = torch.rand(rows, classes, generator=generator)
    options: dict[str, Any] = {
        "loss": "cross_entropy" if loss == "soft" else loss,
        "label_smoothing": 0.1 if loss in ("cross_entropy", "soft") else 0.0,
        "sample_weight": 0.5 + torch.rand(rows, generator=generator),
    }
    residual = reference(features, weight, bias, labels, **options)["residual"].float()
    counted = torch.arange(rows) % 4 != 1
    return {
        "features": features,
        "residual": residual.reshape(rows, -1),
        "mean_grad": torch.randn(heads, classes, dim, generator=generator),
        "mean_bias_grad": torch.randn(heads, classes, generator=generator),
        "counted": counted,
        "feature_sqnorm": features.float().square().sum(1),
        "made": Recompute(weight, bias, labels, **options),
    }


def check(got: Tensor, given: dict[str, Any]) -> None:
    counted = given["counted"]
    assert not got[:, ~counted].any()
    features, residual = given["features"].float(), given["residual"]
    keep = counted.nonzero()[:, 0]
    if len(keep) == 0:
        return
    grad = given["mean_grad"].flatten(0, 1)
    bias = None if given["mean_bias_grad"] is None else given["mean_bias_grad"].flatten()
    operands = (features[keep], residual[keep], grad, bias)
    exact = dots(*operands, got.shape[0])
    assert_dots(got[:, keep], exact, *operands)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("choice", [None, SMALL], ids=["chosen", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape, choice: Choice | None, again: bool, generator: torch.Generator
) -> None:
    given = draw(shape, generator)
    check(run_second(given, again=again, choice=choice), given)
    bare = {**given, "mean_bias_grad": None}
    check(run_second(bare, again=again, choice=choice), bare)


@pytest.mark.parametrize("loss", LOSSES)
def test_recomputes_every_loss(loss: str, generator: torch.Generator) -> None:
    given = draw((40, 3, 5, 20), generator, loss=loss)
    check(run_second(given, again=True), given)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_16_bit_features_are_widened(
    dtype: torch.dtype, again: bool, generator: torch.Generator
) -> None:
    given = draw((40, 2, 10, 40), generator, dtype)
    check(run_second(given, again=again), given)


@pytest.mark.parametrize("choice", SECOND_TILES, ids=lambda c: f"{c.products}-{c.tile.classes}")
def test_every_shipped_tile(choice: Choice, generator: torch.Generator) -> None:
    tile, rounded = choice.tile, choice.products == "bf16"
    dim = tile.dim + (0 if choice.aligned else 5)
    shape = (tile.rows + 1, 1, tile.classes, dim)
    given = draw(shape, generator, BF16 if rounded else torch.float32)
    if rounded:
        given["mean_grad"] = cut(given["mean_grad"])
    precision = "highest" if choice.products == "tf32x3" else "medium"
    for again in (False, True):
        check(run_second(given, again=again, choice=choice, precision=precision), given)


@pytest.mark.parametrize("heads", [1, 3])
def test_self_term_that_rounding_took_comes_back(heads: int, generator: torch.Generator) -> None:
    given = draw((40, heads, 5, 24), generator, BF16)
    given["mean_grad"] = cut(given["mean_grad"])
    plain = run_second(given, precision="medium")
    check(plain, given)
    counted, r = given["counted"], given["residual"].view(40, heads, 5).double()
    lost = ((r - cut(given["residual"]).view(r.shape).double()) * r).sum(-1).T
    lost = torch.where(counted, lost * given["feature_sqnorm"] / 7, 0)
    assert lost.abs().max() > 1e-4
    full = run_second(given, precision="medium", count=torch.tensor(7))
    torch.testing.assert_close(full - plain, lost.float(), rtol=1e-3, atol=2e-6)
    # Not at a precision that rounds nothing; and no division by a count of zero.
    exact = run_second(given, precision="highest", count=torch.tensor(7))
    assert torch.equal(exact, run_second(given, precision="highest"))
    assert bool(run_second(given, precision="medium", count=torch.tensor(0)).isfinite().all())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_rows_that_do_not_count_may_hold_anything(again: bool, generator: torch.Generator) -> None:
    given = draw((40, 2, 5, 20), generator)
    given["residual"][5] = torch.nan
    given["features"][9, 3], given["features"][13] = torch.inf, torch.nan
    given["feature_sqnorm"][[1, 9]] = torch.nan
    given["made"].labels[17] = 2**40
    check(run_second(given, again=again), given)
    none = {**given, "counted": given["counted"] & False}
    assert not run_second(none, again=again).any()


def test_no_rows(generator: torch.Generator) -> None:
    given = draw((1, 2, 3, 5), generator)
    for name in ("features", "residual", "counted", "feature_sqnorm"):
        given[name] = given[name][:0]
    assert run_second(given).shape == (2, 0)


def test_rows_beyond_32_bits(generator: torch.Generator) -> None:
    given = draw((3, 3, 5, 7), generator, loss="soft")
    expected = run_second(given, choice=SMALL)
    far, far_targets, far_residual, far_out = Sparse(7), Sparse(5), Sparse(15), Sparse(3)
    far.fill(given["features"])
    far_targets.fill(given["made"].labels)
    far_residual.fill(given["residual"])
    given["features"] = far.matrix()
    assert far.matrix().stride(0) == STRIDE
    made = given.pop("made")._replace(labels=far_targets.matrix())
    for source in (far_residual.matrix(), made):
        far_out.fill(torch.full((3, 3), torch.nan))
        given["residual"] = source
        few_classes_second(**given, out=far_out.matrix(), choice=SMALL)
        torch.testing.assert_close(far_out.stacked(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "soft"])
def test_nothing_is_read_beyond_the_inputs(loss: str, generator: torch.Generator) -> None:
    # Both passes; a mask that is missing ends the process.
    given = draw((17, 1, 3, 8), generator, loss=loss)
    made = given.pop("made")
    tight = {name: before_a_forbidden_page(value) for name, value in given.items()}
    inputs = [before_a_forbidden_page(value) for value in made[:3]]
    again = Recompute(*inputs, *made[3:6], before_a_forbidden_page(made.sample_weight))
    for choice in (None, SMALL):
        check(run_second({**tight, "made": again}, choice=choice), {**given, "made": made})
        check(
            run_second({**tight, "made": again}, again=True, choice=choice), {**given, "made": made}
        )
    options = {"label_smoothing": 0.1, "sample_weight": again.sample_weight}
    first = first_pass(tight["features"], *inputs, **options)
    assert_close(first, given["features"], *made[:3], **options)


def test_residuals_of_rows_that_do_not_count_are_not_read(generator: torch.Generator) -> None:
    given = draw((18, 1, 3, 8), generator)
    given.pop("made")
    assert not given["counted"][17]
    expected, out = torch.empty(1, 18), torch.empty(1, 18)
    few_classes_second(**given, out=expected)
    readable = before_a_forbidden_page(given["residual"][:17])
    given["residual"] = readable.as_strided((18, 3), (3, 1))  # the last row is forbidden
    few_classes_second(**given, out=out)
    assert torch.equal(out, expected)


def test_choice_of_tiles() -> None:
    assert choose_second_tile(10, 1, "bf16").tile.classes == 16
    assert choose_second_tile(10, 4, "bf16").tile.classes == 32
    assert choose_second_tile(17, 1, "tf32x3").tile.classes == 32
    assert choose_second_tile(33, 1, "tf32") is None
    assert choose_second_tile(10, 1, "bf16", shared_bytes=100_000).tile.rows == 64
    assert choose_second_tile(10, 1, "bf16", aligned=False).tile.rows == 64


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(6, 4).T, "unit column stride"),
        ("residual", torch.zeros(4, 5), "residual must be"),
        ("residual", Recompute(torch.zeros(2, 2, 6), None, torch.zeros(4)), "residual.weight must"),
        ("residual", Recompute(torch.zeros(2, 3, 6), None, torch.zeros(4)), "must be integers"),
        ("mean_grad", torch.zeros(2, 3, 5), "mean_grad must be"),
        ("mean_bias_grad", torch.zeros(2, 4), "mean_bias_grad must be"),
        ("counted", torch.zeros(4), "counted must be"),
        ("feature_sqnorm", torch.zeros(5), "feature_sqnorm must be"),
        ("out", torch.zeros(2, 5), "out must be"),
        ("count", torch.zeros(()), "count must be"),
        ("precision", "fast", "precision must be"),
        ("mean_grad", torch.zeros(1, 33, 6), "no tile holds C = 33"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given: dict[str, Any] = {
        "features": torch.zeros(4, 6),
        "residual": torch.zeros(4, 6),
        "mean_grad": torch.zeros(2, 3, 6),
        "mean_bias_grad": None,
        "counted": torch.ones(4).bool(),
        "feature_sqnorm": torch.zeros(4),
        "out": torch.zeros(2, 4),
    }
    given[name] = value
    if "no tile" in message:
        given["residual"], given["out"] = torch.zeros(4, 33), torch.zeros(1, 4)
    with pytest.raises(ValueError, match=message) as caught:
        few_classes_second(**given)
    assert "\n" not in str(caught.value)
