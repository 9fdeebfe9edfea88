"""Where the logits lie in what a model returned, and which of the head's rows they are."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moso_fast.scoring.head import row_match
from moso_fast.scoring.head.outputs import (
    Logits,
    arrangements,
    describe_outputs,
    output_tensors,
    same_memory,
)
from moso_fast.scoring.head.row_match import Match, distinct_share, match_rows, row_keys, same_bits

A, B, IDS = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (A, {"": A}),
        ({"logits": A, "more": B}, {"logits": A}),
        (SimpleNamespace(logits=A, more=B), {"logits": A}),
        ({"logits": (A, B)}, {"['logits'][0]": A, "['logits'][1]": B}),
        (OrderedDict(x=A, y=[B, IDS]), {"['x']": A, "['y'][0]": B}),
        ((A, None, "text", [B]), {"[0]": A, "[3][0]": B}),
        (SimpleNamespace(x=(A,), y={1: B}), {".x[0]": A, ".y[1]": B}),
        ([[[A]]], {"[0][0][0]": A}),
        ([[[[A]]], B], {"[1]": B}),  # too deep
        ((IDS, torch.tensor(1.0), torch.ones(0, 3), A), {"[3]": A}),
        (None, {}),
    ],
)
def test_where_tensors_are_in_an_output(outputs: Any, found: dict[str, Tensor]) -> None:
    seen = output_tensors(outputs)
    assert list(seen) == list(found)
    assert all(seen[path] is tensor for path, tensor in found.items())


@pytest.mark.parametrize(
    ("shape", "of_the_head", "wanted"),
    [
        ((2, 3), (2, 3), {"last": (2, 3)}),
        ((2, 5, 3), (2, 5, 3), {"last": (2, 5, 3)}),
        ((2, 3, 5), (2, 5, 3), {"second": (2, 5, 3)}),
        ((2, 3, 3), (2, 3, 3), {"last": (2, 3, 3), "second": (2, 3, 3)}),
        ((2, 3, 4, 5), (2, 4, 5, 3), {"second": (2, 4, 5, 3)}),
        ((3,), (1, 3), {}),
        ((2, 4), (2, 3), {}),
        ((3, 2), (2, 3), {}),
        ((2, 1), (2, 1), {"last": (2, 1)}),
        ((2,), (2, 1), {"none": (2, 1)}),
        ((2, 5), (2, 5, 1), {"none": (2, 5, 1)}),
        ((4,), (2, 1), {}),
    ],
)
def test_ways_to_read_a_tensor_with_the_classes_last(
    shape: tuple[int, ...], of_the_head: tuple[int, ...], wanted: dict[str, tuple[int, ...]]
) -> None:
    tensor = torch.randn(shape)
    found = arrangements(tensor, torch.Size(of_the_head))
    assert {name: tuple(t.shape) for name, t in found.items()} == wanted
    readings = {"last": tensor, "second": tensor.transpose(1, -1) if len(shape) == 3 else None}
    if len(shape) == 4:
        readings["second"] = tensor.permute(0, 2, 3, 1)
    if "none" in found:
        readings["none"] = tensor.unsqueeze(-1)
    assert all(torch.equal(t, readings[name]) for name, t in found.items())


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        (A, "a tensor (2, 3)"),
        ((A, torch.ones(4)), "tuple with (2, 3), (4,)"),
        ({"x": A}, "dict with (2, 3)"),
        ([A] * 4, "list with (2, 3), (2, 3), (2, 3), (2, 3)"),
        ([A] * 5, "list with (2, 3), (2, 3), (2, 3), (2, 3), ..."),
        ("text", "str with no floating-point tensor"),
    ],
)
def test_what_is_said_of_an_output(outputs: Any, text: str) -> None:
    assert describe_outputs(outputs) == text


def test_logits_of_another_output_of_the_same_model() -> None:
    where = Logits("[1]", "second")
    shape = torch.Size((2, 5, 3))
    logits = where.of((A, torch.ones(2, 3, 5)), shape)
    assert logits is not None and logits.shape == shape
    assert where.of((A,), shape) is None
    assert where.of((A, torch.ones(2, 5, 3)), shape) is None


def test_logits_that_are_the_very_numbers_of_the_head() -> None:
    z = torch.randn(2, 5, 3)
    assert same_memory((torch.randn(2, 5, 3), z), z) is z
    flat = same_memory(z.view(10, 3), z)
    assert flat is not None and flat.shape == (10, 3)
    second = same_memory(z.movedim(-1, 1), z)
    assert second is not None and second.stride() == z.stride()
    shifted = z.view(-1)[1:13].view(2, 2, 3)
    for other in (z.clone(), z[:1], z.double(), z.transpose(0, 1), z.flip(0), shifted, None):
        assert same_memory(other, z) is None
    one = torch.randn(4, 1)
    assert same_memory(one.squeeze(1), one) is not None


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
)
def test_keys_tell_rows_apart_by_every_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(1, 25).view(6, 4).to(dtype)
    rows[4] = rows[1]
    rows[5] = rows[1].flip(0)  # the same numbers in another order
    keys = row_keys(rows)
    assert keys.dtype == torch.int64 and keys.shape == (6,)
    assert keys[4] == keys[1]
    assert len(set(keys.tolist())) == 5
    assert torch.equal(row_keys(rows.T.contiguous().T), keys)
    assert torch.equal(row_keys(rows[2:3]), keys[2:3])
    for block in (1, 4, 11, 12):  # numbers at a time: fewer than a row, one row, two, three
        monkeypatch.setattr(row_match, "_BLOCK_ELEMENTS", block)
        assert torch.equal(row_keys(rows), keys)


def test_rows_without_columns_are_all_alike() -> None:
    assert row_keys(torch.zeros(3, 0)).tolist() == [0, 0, 0]


def test_equal_bits() -> None:
    nan = float("nan")
    rows = torch.tensor([[0.0, 1.0], [nan, 2.0]])
    assert same_bits(rows, rows.clone())
    assert same_bits(rows, torch.tensor([[-0.0, 1.0], [nan, 2.0]]))
    assert not same_bits(rows, rows.flip(0))
    assert not same_bits(rows, torch.tensor([[0.0, 1.0], [nan, 2.0000002]]))
    assert not same_bits(rows, rows[:1])
    assert not same_bits(rows, rows.view(1, 4))


def rows_of(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None].repeat(1, 2)


@pytest.mark.parametrize(
    ("wanted", "rows", "inputs", "found"),
    [
        ((3, 1, 1, 2), (1, 2, 3), None, [2, 0, 0, 1]),
        ((4,), (1, 2, 3), None, Match.NONE),
        ((0,), (1, 2, 3), None, Match.NONE),
        ((1, 4), (1, 2, 3), None, Match.NONE),
        ((), (1, 2, 3), None, []),
        ((2,), (1, 2, 1), None, [1]),  # others are equal, which nobody asked for
        ((1,), (1, 2, 1), None, Match.AMBIGUOUS),
        ((1,), (1, 2, 1), (5, 6, 7), Match.AMBIGUOUS),
        ((1, 2), (1, 2, 1), (5, 6, 5), [0, 1]),
        ((2, 1), (1, 2, 1, 2), (5, 6, 5, 7), Match.AMBIGUOUS),
        ((1,), (1, 2, 1, 2), (5, 6, 5, 7), [0]),
        ((1, 9), (1, 2, 1, 2), (5, 6, 5, 7), Match.NONE),
        ((3,), (1, 3, 3, 3), (4, 4, 4, 8), Match.AMBIGUOUS),
        ((3,), (1, 3, 3, 3), (8, 4, 4, 4), [1]),
    ],
)
def test_which_rows_are_wanted(
    wanted: tuple[float, ...],
    rows: tuple[float, ...],
    inputs: tuple[float, ...] | None,
    found: Any,
) -> None:
    given = None if inputs is None else rows_of(*map(float, inputs))
    seen = match_rows(rows_of(*map(float, wanted)), rows_of(*map(float, rows)), given)
    assert (seen.tolist() if isinstance(seen, Tensor) else seen) == found


def test_rows_of_the_same_sample() -> None:
    """Equal rows of two samples are told apart by the sample that each belongs to."""
    rows, inputs = rows_of(1.0, 2.0, 1.0, 3.0), rows_of(5.0, 6.0, 7.0, 8.0)
    own = torch.tensor([0, 0, 1, 1])
    seen = match_rows(rows_of(1.0, 1.0, 3.0), rows, inputs, (torch.tensor([1, 0, 1]), own))
    assert isinstance(seen, Tensor) and seen.tolist() == [2, 0, 3]
    other = match_rows(rows_of(3.0), rows, inputs, (torch.tensor([0]), own))
    assert other is Match.NONE  # there is one, of the other sample


@pytest.mark.parametrize(
    ("rows", "inputs", "share"),
    [
        ((1, 2, 3, 4), (1, 1, 1, 1), 1.0),
        ((1, 1, 2, 3), (5, 5, 6, 7), 1.0),  # equal rows with equal inputs
        ((1, 1, 2, 3), (5, 6, 6, 7), 0.5),
        ((1, 1, 1, 3), (5, 5, 6, 7), 0.25),
        ((1, 1, 1, 1), (5, 6, 7, 8), 0.0),
        ((1, 1, 2, 2), (5, 6, 7, 7), 0.5),
    ],
)
def test_the_share_of_rows_that_are_one_of_a_kind(
    rows: tuple[float, ...], inputs: tuple[float, ...], share: float
) -> None:
    assert distinct_share(rows_of(*map(float, rows)), rows_of(*map(float, inputs))) == share
