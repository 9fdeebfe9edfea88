"""Flat inputs: cut row by row, and found by what a model looks up."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moso_fast.full.flat import (
    ASK,
    Flat,
    LookUp,
    find_flat,
    looked_up,
    looked_up_alone,
    may_be_flat,
    same_twice,
)

WORDS = torch.tensor([5, 6, 7, 8, 9, 3])
LENGTHS = torch.tensor([2, 0, 3, 1])
STARTS = torch.tensor([0, 2, 2, 5])
ENDS = torch.tensor([0, 2, 2, 5, 6])
WEIGHTS = torch.arange(6) / 10


def test_asking_for_offsets() -> None:
    said = (
        "give the bags' offsets beside their values, one bag a sample, in the order of the labels"
    )
    assert said == ASK


@pytest.mark.parametrize(
    ("kind", "bounds"), [("offsets", STARTS), ("offsets", ENDS), ("lengths", LENGTHS)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_flat_inputs(kind: str, bounds: Tensor, dtype: torch.dtype) -> None:
    inputs = [WEIGHTS, "text", bounds.to(dtype), WORDS]
    flat = Flat((3, 0), 2, kind)
    edges = flat.edges(inputs, 4)
    assert edges.tolist() == [0, 2, 2, 5, 6] and edges.dtype == torch.int64
    found = flat.take(inputs, torch.tensor([2, 0, 1]), 4)
    assert found.keys() == {0, 2, 3}
    assert found[3].tolist() == [7, 8, 9, 5, 6]
    assert torch.equal(found[0], WEIGHTS[[2, 3, 4, 0, 1]])
    expected = {4: [3, 2, 0] if kind == "lengths" else [0, 3, 5], 5: [0, 3, 5, 5]}
    assert found[2].tolist() == expected[len(bounds)] and found[2].dtype == dtype


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("offsets", [0, 2, 5]),
        ("offsets", [0, 2, 2, 5, 6, 6]),
        ("offsets", [1, 2, 2, 5]),
        ("offsets", [0, 2, 2, 5, 7]),
        ("offsets", [0, 5, 2, 5]),
        ("lengths", [2, 0, 3, 2]),
        ("lengths", [2, -1, 3, 1]),
        ("lengths", [2, 3, 1]),
    ],
)
def test_bounds_that_do_not_fit(kind: str, bounds: list[int]) -> None:
    with pytest.raises(ValueError) as caught:
        Flat((0,), 1, kind).edges([WORDS, torch.tensor(bounds)], 4)
    assert str(caught.value) == (
        f"data: {kind} of {len(bounds)} entries do not divide 6 values among 4 labels; {ASK}"
    )


def test_values_behind_the_last_row_belong_to_none() -> None:
    """As nn.EmbeddingBag has it with include_last_offset."""
    flat, inputs = Flat((0,), 1, "offsets"), [WORDS, torch.tensor([0, 2, 2, 5, 5])]
    assert flat.edges(inputs, 4).tolist() == [0, 2, 2, 5, 5]
    assert flat.take(inputs, torch.tensor([3, 2]), 4)[0].tolist() == [7, 8, 9]


def test_inputs_that_can_be_flat() -> None:
    """Two lists at the least, one of them of whole numbers."""
    number, matrix = torch.tensor(3), torch.zeros(2, 2)
    assert may_be_flat([WORDS, STARTS]) and may_be_flat([WEIGHTS, "text", STARTS, matrix])
    for inputs in ([WORDS], [WORDS, number], [WORDS, matrix], [WEIGHTS, WEIGHTS], [WORDS, [1]], []):
        assert not may_be_flat(inputs)


TABLE = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def test_what_is_looked_up() -> None:
    weights = torch.ones(6)

    def forward() -> None:
        assert not torch.is_grad_enabled()
        F.embedding_bag(WORDS, TABLE, STARTS)
        F.embedding_bag(WORDS[None], TABLE)
        F.embedding(WORDS, TABLE)
        F.embedding_bag(
            WORDS, TABLE, ENDS, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    first, second = looked_up(forward)
    assert first[0] is WORDS and first[1] is STARTS and first[2] is None and first[3] is False
    assert second[1] is ENDS and second[2] is weights and second[3] is True

    def fails() -> None:
        forward()
        raise ValueError("behind the look-ups")

    assert len(looked_up_alone(fails)) == 2
    with pytest.raises(ValueError, match="behind the look-ups"):
        looked_up(fails)


def call(values: Tensor, offsets: Tensor, each: Tensor | None = None, ends: bool = False) -> LookUp:
    return values, offsets, each, ends


FOUND: dict[str, tuple[list[LookUp], list[Any], tuple[Flat, ...]]] = {
    "offsets": ([call(WORDS, STARTS)], [WORDS, STARTS], (Flat((0,), 1, "offsets"),)),
    "last offset": (
        [call(WORDS, ENDS, None, True)],
        [ENDS, "text", WORDS],
        (Flat((2,), 0, "offsets"),),
    ),
    "lengths": ([call(WORDS, STARTS)], [LENGTHS, WORDS], (Flat((1,), 0, "lengths"),)),
    "offsets before lengths": (
        [call(WORDS, STARTS)],
        [LENGTHS, WORDS, STARTS],
        (Flat((1,), 2, "offsets"),),
    ),
    "other memory": (
        [call(WORDS.clone(), STARTS.clone())],
        [WORDS, STARTS.int()],
        (Flat((0,), 1, "offsets"),),
    ),
    "weights": (
        [call(WORDS, STARTS, WEIGHTS)],
        [WEIGHTS, WORDS, STARTS],
        (Flat((1, 0), 2, "offsets"),),
    ),
    "weights of the model": (
        [call(WORDS, STARTS, WEIGHTS + 1)],
        [WEIGHTS, WORDS, STARTS],
        (Flat((1,), 2, "offsets"),),
    ),
    "twice": (
        [call(WORDS, STARTS, WEIGHTS), call(WORDS, STARTS), call(WORDS, STARTS, WEIGHTS)],
        [WORDS, STARTS, WEIGHTS],
        (Flat((0, 2), 1, "offsets"),),
    ),
    "two": (
        [call(WORDS, STARTS), call(WORDS + 1, STARTS)],
        [WORDS, STARTS, WORDS + 1],
        (Flat((0,), 1, "offsets"), Flat((2,), 1, "offsets")),
    ),
    "made by the model": ([call(WORDS + 2, STARTS)], [WORDS, STARTS], ()),
    "one a row": ([call(WORDS[:4], torch.arange(4))], [WORDS[:4], STARTS], ()),
    "one a row, told": (
        [call(WORDS[:4], torch.arange(4))],
        [WORDS[:4], torch.arange(4)],
        (Flat((0,), 1, "offsets"),),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_flat_inputs_are_found(name: str) -> None:
    calls, inputs, expected = FOUND[name]
    assert find_flat(calls, inputs, 4) == expected


def test_the_same_memory_comes_before_the_same_values() -> None:
    """Of several with the same values none can be meant, unless it is the very tensor."""
    twin, other = WORDS.clone(), STARTS.clone()
    assert find_flat([call(twin, other)], [WORDS, STARTS, twin, other], 4) == (
        Flat((2,), 3, "offsets"),
    )
    assert find_flat([call(WORDS.clone(), STARTS)], [WORDS, twin, STARTS], 4) == ()
    turned = torch.arange(4)[:, None].expand(4, 4)
    assert turned.data_ptr() == turned.t().data_ptr()
    fractions = torch.tensor([0.3, 2.3, 2.3, 5.3])
    with pytest.raises(ValueError, match="neither offsets nor lengths"):
        find_flat([call(WORDS, STARTS)], [WORDS, fractions], 4)


def test_look_ups_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError) as caught:
        find_flat([call(WORDS, STARTS[:3])], [WORDS, STARTS], 4)
    said = f"model: an embedding bag makes 3 bags of an input for 4 labels; {ASK}"
    assert str(caught.value) == said
    with pytest.raises(ValueError, match=re.escape("makes 4 bags of an input for 5 labels")):
        find_flat([call(WORDS, ENDS, None, True)], [WORDS, ENDS], 5)
    with pytest.raises(ValueError) as caught:
        find_flat([call(WORDS, torch.tensor([0, 1, 2, 3]))], [WORDS, STARTS], 4)
    assert str(caught.value) == (
        "model: an embedding bag takes an input in pieces that neither offsets nor lengths among "
        f"the inputs tell; {ASK}"
    )


TWO, BOTH = torch.tensor([4, 5]), torch.tensor([4, 5, 4, 5])
ZERO, PAIR = torch.tensor([0]), torch.tensor([0, 2])
EACH, FOUR = torch.ones(2), torch.ones(4)


@pytest.mark.parametrize(
    ("alone", "pair", "expected"),
    [
        ([], [], True),
        ([call(TWO, ZERO)], [call(BOTH, PAIR)], True),
        (
            [call(TWO, torch.tensor([0, 2]), None, True)],
            [call(BOTH, torch.tensor([0, 2, 4]))],
            True,
        ),
        ([call(TWO, ZERO)], [], False),
        ([call(TWO, ZERO)], [call(TWO, ZERO)], False),
        ([call(TWO, ZERO)], [call(BOTH, torch.tensor([0, 1]))], False),
        ([call(TWO, ZERO)], [call(torch.tensor([4, 5, 5, 4]), PAIR)], False),
        ([call(TWO, ZERO)], [call(BOTH, ZERO)], False),
        ([call(TWO, ZERO, EACH)], [call(BOTH, PAIR, FOUR)], True),
        ([call(TWO, ZERO, EACH)], [call(BOTH, PAIR, EACH)], False),
        ([call(TWO, ZERO, EACH)], [call(BOTH, PAIR)], True),
        ([call(WORDS, ZERO)], [call(WORDS, ZERO)], True),
        ([call(WORDS, ZERO), call(TWO, ZERO)], [call(WORDS, ZERO), call(TWO, ZERO)], False),
        ([call(WORDS, ZERO), call(TWO, ZERO)], [call(WORDS, ZERO), call(BOTH, PAIR)], True),
    ],
)
def test_bags_of_a_row_that_goes_through_twice(
    alone: list[LookUp], pair: list[LookUp], expected: bool
) -> None:
    """Those of the model alone, of WORDS here, may stay as they are."""
    if alone and alone[0][3]:
        pair = [(*pair[0][:3], True)]
    assert same_twice(alone, pair, [TWO, ZERO]) is expected
