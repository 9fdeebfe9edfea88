"""The search for a map between a head's output and the logits, at the edges of what it believes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moso_fast.core.logit_map import LogitMap
from moso_fast.scoring.head.map_search import agrees, find_map, tidy

INF = math.inf
EPS = {kind: torch.finfo(kind).eps for kind in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize(
    ("value", "eps", "wanted"),
    [
        (0.3 * (1 + 1.9e-7), EPS[torch.float32], 0.3),
        (0.3 * (1 + 2.1e-7), EPS[torch.float32], 0.3 * (1 + 2.1e-7)),
        (100 * (1 - 1.9e-7), EPS[torch.float32], 100.0),
        (100 * (1 - 2.1e-7), EPS[torch.float32], 100 * (1 - 2.1e-7)),
        (-0.123456 * (1 + 1e-7), EPS[torch.float32], -0.123456),
        (0.1234567, EPS[torch.float32], 0.1234567),
        (0.3 * (1 + 2.1e-7), EPS[torch.float16], 0.3 * (1 + 2.1e-7)),  # as if float32 had made it
        # In bfloat16 the shortest number within 0.00098 of it is meant.
        (0.9994, EPS[torch.bfloat16], 1.0),
        (0.12306, EPS[torch.bfloat16], 0.123),
        (0.12344, EPS[torch.bfloat16], 0.1234),
        (0.5 * (1 + 9.7e-4), EPS[torch.bfloat16], 0.5),
        (0.5 * (1 + 9.8e-4), EPS[torch.bfloat16], 0.5005),
        (200 * (1 + 9.7e-4), EPS[torch.bfloat16], 200.0),
        (0.0, EPS[torch.float32], 0.0),
    ],
)
def test_short_numbers_are_meant(value: float, eps: float, wanted: float) -> None:
    assert tidy(value, eps) == wanted


def numbers(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


@pytest.mark.parametrize(
    ("eps", "units"),
    [
        (EPS[torch.float32], 16),
        (EPS[torch.float16], 16),
        (1e-3, 16),
        (1.001e-3, 4),
        (EPS[torch.bfloat16], 4),
        (1e-15, 16),
    ],
)
def test_how_far_a_number_may_be_from_its_map(eps: float, units: int) -> None:
    """A number of size 6 may be off by so many units of 6 eps, and none by more."""
    double = LogitMap("scale", numbers(2.0))
    z = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    for sign in (1, -1):
        off = torch.zeros_like(z)
        off[0, 2] = sign * 6 * eps * units
        assert agrees(double, z, 2 * z + 0.99 * off, eps)
        assert not agrees(double, z, 2 * z + 1.01 * off, eps)


def test_numbers_below_what_float32_can_hold_are_zero() -> None:
    half = LogitMap("scale", numbers(0.5))
    z = torch.full((1, 2), 1.9e-38, dtype=torch.float64)  # of which half is below 1.2e-38
    assert agrees(half, z, torch.zeros_like(z), EPS[torch.float32])
    assert not agrees(half, 2 * z, torch.zeros_like(z), EPS[torch.float32])
    assert not agrees(half, z, torch.zeros_like(z), 2e-16)  # float64 holds them


def test_rows_that_are_not_finite_say_nothing() -> None:
    double = LogitMap("scale", numbers(2.0))
    z = torch.tensor([[1.0, 2.0], [INF, 1.0], [3.0, 4.0]], dtype=torch.float64)
    seen = 2 * z
    seen[1, 1] = 99  # beside an infinite input
    assert agrees(double, z, seen, 1e-7)
    seen[2, 0] = math.nan
    seen[2, 1] = 99  # beside a NaN of the logits
    assert agrees(double, z, seen, 1e-7)
    seen[0, 1] = 99
    assert not agrees(double, z, seen, 1e-7)
    assert agrees(double, z[1:2], seen[1:2], 1e-7)  # nothing is left to contradict


def probe(rows: int = 40, classes: int = 6) -> Tensor:
    """Random numbers of three sizes, row by row, as a head's output is replaced by."""
    g = torch.Generator().manual_seed(4)
    sizes = torch.tensor([1.0, 8.0, 64.0])[torch.arange(rows) % 3]
    return torch.randn(rows, classes, generator=g).double() * sizes[:, None]


CASES = {
    "a factor of two classes": (probe(48, 2), "scale", (-0.25,)),
    "a negative factor of one class": (probe(96, 1), "scale", (-3.0,)),
    "a soft cap of 30": (probe(), "tanh", (30.0, 1 / 30)),
    "a soft cap of 50": (probe(), "tanh", (50.0, 0.02)),
    "a negative soft cap": (probe(), "tanh", (5.0, -0.2)),
    "a steep soft cap": (probe(), "tanh", (0.3, 2.0)),
    "a soft cap that hardly bends": (probe(), "tanh", (200.0, 0.005)),
    "a soft cap that is nearly a step": (probe(), "tanh", (2.0, 10.0)),
    "a soft cap of one row": (probe(1, 96), "tanh", (2.0, 0.5)),
    "a sigmoid that ends at 0 and 1": (probe(), "sigmoid", (4.0,)),
    "a falling sigmoid": (probe(), "sigmoid", (-0.5,)),
    "a sigmoid of one class": (probe(96, 1), "sigmoid", (1.0,)),
    "a softmax of two classes": (probe(48, 2), "softmax", (1.5,)),
    "a softmax that ends at 0 and 1": (probe(), "softmax", (3.0,)),
    "a log_softmax of two classes": (probe(48, 2), "log_softmax", (1.0,)),
    "a log_softmax that ends at 0": (probe(), "log_softmax", (3.0,)),
    "a clamp from below": (probe(), "clamp", (1.0, 0.0, INF)),
    "a clamp from above": (probe(), "clamp", (0.5, -INF, 4.0)),
    "a clamp on both sides": (probe(), "clamp", (2.0, -3.0, 5.0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_maps_with_their_numbers(name: str, dtype: torch.dtype) -> None:
    z, kind, values = CASES[name]
    z = z.to(dtype).double()
    seen = LogitMap(kind, numbers(*values)).apply(z).to(dtype).double()
    found = find_map(z, seen, torch.finfo(dtype).eps)
    assert found is not None and found.kind == kind
    assert all(v.dtype == torch.float64 for v in found.values)
    within = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert [float(v) for v in found.values] == pytest.approx(values, rel=within)


def test_a_limit_is_a_number_that_comes_more_than_once() -> None:
    """A largest number that comes once may be any; twice, it is no accident."""
    z = torch.linspace(-3, 3, 61).double()[:, None]
    found = find_map(z, z.clamp(-2, 2.9), 1e-7)  # 2.9 and 3.0 at the limit
    assert found is not None and [float(v) for v in found.values] == [1.0, -2.0, 2.9]
    assert find_map(z, z.clamp(-2, 2.95), 1e-7) is None


def test_a_factor_and_an_offset_take_three_rows() -> None:
    """Two rows are fitted by any numbers at all."""
    z, g = probe(), torch.Generator().manual_seed(5)
    factor = torch.rand(6, generator=g).double() + 0.5
    offset = torch.randn(6, generator=g).double()
    assert find_map(z[:2], z[:2] * factor + offset, 1e-15) is None
    for rows, classes in ((3, 6), (40, 2), (40, 1)):
        wanted = factor[:classes], offset[:classes]
        one = z[:rows, :classes]
        found = find_map(one, one * wanted[0] + wanted[1], 1e-15)
        assert found is not None and found.kind == "affine"
        for got, want in zip(found.values, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_offsets_alone_are_no_map_of_the_output() -> None:
    z = probe()
    offset = torch.linspace(1, 2, 6).double().expand(40, 6)
    assert find_map(z, offset, 1e-15) is None
    assert find_map(z, offset + 1e-9 * z, 1e-15) is None  # no millionth of them
    found = find_map(z, offset + 1e-3 * z, 1e-15)
    assert found is not None and found.kind == "affine"


@pytest.mark.parametrize("count", [3, 4])
def test_a_slope_takes_four_numbers(count: int) -> None:
    """All others of a sigmoid are 0 or 1, or nearly so, from which no slope is read."""
    z = torch.full((96, 1), 300.0).double()
    z[::2] = -300
    z[:count, 0] = torch.tensor([0.5, -1.0, 2.0, -0.25][:count]).double()
    found = find_map(z, (0.7 * z).sigmoid(), 1e-7)
    assert (found is not None) == (count == 4)


@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
@pytest.mark.parametrize("count", [3, 4])
def test_a_slope_of_a_row_takes_four_numbers_beside_the_largest(kind: str, count: int) -> None:
    z = torch.tensor([[300.0, -300.0]]).double().repeat(48, 1)
    z[:count, 1] = 300 - torch.tensor([0.5, 1.0, 2.0, 0.25][:count]).double()
    seen = LogitMap(kind, numbers(1.0)).apply(z)
    if kind == "log_softmax":
        seen[count:, 1] = -600.0  # what it is, to the last bit
    found = find_map(z, seen, 1e-7)
    assert found is None if count == 3 else found is not None and found.kind == kind


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_logits_that_are_not_finite_or_all_zero_have_no_map(bad: float) -> None:
    z = probe()
    seen = 2 * z
    seen[7, 3] = bad
    assert find_map(z, seen, 1e-7) is None
    assert find_map(z, torch.zeros_like(z), 1e-7) is None
