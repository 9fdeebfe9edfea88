"""What the rules of full/norms share: factors, layouts, places in packed sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import rnn

from moso_fast.full.norms import factors, packed
from moso_fast.full.norms.factors import Factors, ghost_is_cheaper, squared_norms, summed
from moso_fast.full.norms.layout import (
    Layout,
    candidates,
    clear,
    consistent,
    fits,
    samples_first,
)

SAMPLES, HEIGHT, WIDTH = 5, 4, 3
CPU = torch.device("cpu")


def dense_use(positions: int, blocks: int = 1) -> Factors:
    rows = torch.randn(SAMPLES, blocks, positions, HEIGHT, dtype=torch.float64)
    return Factors(rows, torch.randn(SAMPLES, blocks, positions, WIDTH, dtype=torch.float64))


def indexed_use(positions: int) -> Factors:
    rows = torch.randint(HEIGHT, (SAMPLES, positions))
    return Factors(rows, torch.randn(SAMPLES, 1, positions, WIDTH, dtype=torch.float64))


def built(use: Factors) -> Tensor:
    """Gradients (n, G, R, C), position by position."""
    rows = F.one_hot(use.rows, HEIGHT)[:, None].double() if use.indexed else use.rows
    return torch.einsum("ngtr,ngtc->ngrc", rows, use.cols)


def uses_of(name: str) -> list[Factors]:
    return {
        "one position": lambda: [dense_use(1)],
        "one position in blocks": lambda: [dense_use(1, 2)],
        "positions": lambda: [dense_use(6)],
        "positions in blocks": lambda: [dense_use(6, 2)],
        "one number": lambda: [indexed_use(1)],
        "numbers": lambda: [indexed_use(6)],
        "dense twice": lambda: [dense_use(2), dense_use(3)],
        "numbers twice": lambda: [indexed_use(2), indexed_use(3)],
        "both": lambda: [indexed_use(2), dense_use(3)],
        "both twice": lambda: [indexed_use(2), dense_use(3), indexed_use(4), dense_use(1)],
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        *("one position", "one position in blocks", "positions", "positions in blocks"),
        *("one number", "numbers", "dense twice", "numbers twice", "both", "both twice"),
    ],
)
def test_squared_norms_in_every_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = uses_of(name)
    whole = torch.stack([built(use) for use in uses]).sum(0)
    expected = whole.flatten(1).square().sum(1)
    for ghost, size in itertools.product((True, False), (1, 700, 1 << 20)):
        monkeypatch.setattr(factors, "_OPERATIONS_PER_ENTRY", 1e9 if ghost else -1e9)
        monkeypatch.setattr(factors, "_CPU_BYTES", size)
        norms, total = squared_norms(uses, HEIGHT)
        assert norms.dtype == torch.float64
        torch.testing.assert_close(norms, expected)
        if name.startswith("one position") or ghost:
            assert total is None
        else:
            torch.testing.assert_close(total, whole.sum(0))
    for use in uses:
        torch.testing.assert_close(summed(use, HEIGHT), built(use).sum(0))


def test_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients or Gram matrices (products, one-hot products and what comes of them) that fit."""
    seen: list[int] = []
    for name in ("_ghost", "_gradients"):
        own = getattr(factors, name)

        def watched(uses: Any, *more: Any, own: Any = own) -> Tensor:
            first = uses[0] if isinstance(uses, list) else uses
            seen.append(len(first.cols))
            return own(uses, *more)

        monkeypatch.setattr(factors, name, watched)
    use = dense_use(6, 2)
    for ghost, one in ((1e9, 3 * 2 * 6 * 6 * 8), (-1e9, 2 * HEIGHT * WIDTH * 8)):
        monkeypatch.setattr(factors, "_OPERATIONS_PER_ENTRY", ghost)
        for limit, sizes in (
            (2 * one, [2, 2, 1]),
            (2 * one - 1, [1] * 5),
            (5 * one, [5]),
            (1, [1] * 5),
        ):
            monkeypatch.setattr(factors, "_CPU_BYTES", limit)
            seen.clear()
            squared_norms([use], HEIGHT)
            assert seen == sizes
    assert factors._GPU_BYTES == 64 * (1 << 22)


def test_cheaper_form() -> None:
    """T^2 (R + C) operations, or R C entries of T + 150 each."""
    assert ghost_is_cheaper(30, 4, 2, 15)  # 900 * 6 = 30 * 180
    assert not ghost_is_cheaper(31, 4, 2, 15)
    assert not ghost_is_cheaper(30, 4, 3, 11)
    assert not ghost_is_cheaper(30, 5, 2, 15)
    assert not ghost_is_cheaper(30, 4, 2, 14)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_are_told_by_their_dtype(dtype: torch.dtype) -> None:
    use = Factors(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 1, 3, 4))
    assert use.indexed and use.positions == 3
    part = use.part(slice(1, 2))
    assert part.rows.shape == (1, 3) and part.cols.shape == (1, 1, 3, 4)


ROWS, WIDE = 6, 2


def arranged(layout: Layout, other: int) -> Tensor:
    """A tensor (..., WIDE) whose entry for sample i, position t, is 100 i + t."""
    values = (100 * torch.arange(ROWS)[:, None] + torch.arange(other)).float()[..., None]
    values = values.expand(ROWS, other, WIDE)
    if layout.kind == "alone":
        return values.movedim(0, layout.dim)
    flat = values if layout.kind == "outer" else values.transpose(0, 1)
    flat = flat.reshape(-1, WIDE)
    return flat[None] if layout.dim else flat


@pytest.mark.parametrize(
    "layout", [Layout(kind, dim) for kind in ("alone", "outer", "inner") for dim in (0, 1)]
)
def test_samples_come_first(layout: Layout) -> None:
    """Of two views a sample, the rows of the second come behind those of the first."""
    tensor = arranged(layout, 4)
    rows = 100 * torch.arange(ROWS)[:, None] + torch.arange(4)
    for views in (1, 2):
        found = samples_first(layout, tensor, tensor.dim() - 1, ROWS, ROWS // views)
        assert found.shape == (ROWS // views, 4 * views, WIDE)
        assert torch.equal(found[..., 0].long(), rows.reshape(ROWS // views, -1))


def test_samples_of_a_batch_of_one_need_no_layout() -> None:
    tensor = torch.arange(24.0).view(2, 3, 4)
    for layout in (None, Layout("inner", 1)):
        assert torch.equal(samples_first(layout, tensor, 2, 1, 1), tensor.view(1, 6, 4))


def test_possible_layouts() -> None:
    alone, outer, inner = (lambda dim, k=k: Layout(k, dim) for k in ("alone", "outer", "inner"))
    assert candidates((3, 7), 3) == [alone(0)]
    assert candidates((7, 3), 3) == [alone(1)]
    assert candidates((3, 3), 3) == [alone(0), alone(1)]
    assert candidates((6, 3), 3) == [alone(1), outer(0), inner(0)]
    assert candidates((9,), 3) == [outer(0), inner(0)]
    assert candidates((7, 8), 3) == [] and candidates((2,), 4) == []
    for kind, shape, expected in (
        *(("alone", (4,), False), ("alone", (3,), True), ("alone", (6,), False)),
        *(("outer", (6,), True), ("inner", (3,), True), ("outer", (0,), False)),
        *(("outer", (7,), False), ("inner", (2,), False)),
    ):
        assert fits(Layout(kind, 0), shape, 3) is expected
        assert fits(Layout(kind, 1), (5, *shape), 3) is expected
        assert not fits(Layout(kind, 1), shape, 3)
    assert clear([outer(0)]) and clear([alone(0), outer(1), inner(1)])
    assert not clear([]) and not clear([outer(0), inner(0)]) and not clear([alone(0), alone(1)])


def test_gradient_of_one_row_tells_its_layout() -> None:
    """Zeros everywhere tell nothing; anything outside of the row says no."""
    gradient = torch.zeros(6, 4)
    for kind in ("outer", "inner"):
        assert consistent(Layout(kind, 0), gradient, 1, 3, 0)
    gradient[2, 3] = 1e-30  # of the second sample if they lie apart, else of the third
    told = {
        (k, r): consistent(Layout(k, 0), gradient, 1, 3, r)
        for k in ("outer", "inner")
        for r in range(3)
    }
    assert [key for key, fine in told.items() if fine] == [("outer", 1), ("inner", 2)]


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_places_in_a_packed_sequence(order: list[int] | None) -> None:
    lengths = torch.tensor([5, 3, 3, 1])
    steps = torch.randn(5, 4, 2)
    given = None if order is None else torch.tensor(order)
    if given is not None:
        lengths = lengths[given.argsort()]
    wanted = torch.arange(5)[:, None] < lengths
    filled = torch.where(wanted[..., None], steps, 0.0)
    sequence = rnn.pack_padded_sequence(steps, lengths, enforce_sorted=False)
    places = packed.Places(sequence.batch_sizes, sequence.sorted_indices if order else None, CPU)
    assert torch.equal(places.active, wanted)
    assert torch.equal(places.unpacked(sequence.data), filled)
    assert torch.equal(places.packed(steps), sequence.data)
    state = torch.randn(2, 4, 3)
    columns = state[:, sequence.sorted_indices] if order else state
    assert torch.equal(places.as_packed(state), columns)
    assert torch.equal(places.by_sample(columns), state)


@pytest.mark.parametrize("first", [True, False])
def test_packing_by_indexing(first: bool) -> None:
    steps, lengths = torch.randn(4, 4, 2), torch.tensor([4, 2, 2, 1])
    given = steps if first else steps.transpose(0, 1)
    data, sizes = packed.pack_padded(given, lengths, first)
    expected = rnn.pack_padded_sequence(steps, lengths, batch_first=True)
    assert torch.equal(data, expected.data) and torch.equal(sizes, expected.batch_sizes)


def test_packed_sequences_among_nested_inputs() -> None:
    one, other = (
        rnn.pack_sequence([torch.randn(n, 2) for n in sizes], enforce_sorted=False)
        for sizes in ((1, 3), (2, 2, 4))
    )
    found = list(packed.sequence_orders(([one], {"more": (other, 3)}, torch.zeros(2))))
    for (sizes, order), sequence in zip(found, (one, other), strict=True):
        assert sizes is sequence.batch_sizes and order is sequence.sorted_indices
    chosen = packed.some_of(other, torch.tensor([2, 0]))
    padded = rnn.pad_packed_sequence(other, batch_first=True)[0]
    again, sizes = rnn.pad_packed_sequence(chosen, batch_first=True)
    assert sizes.tolist() == [4, 2] and torch.equal(again, padded[[2, 0]])
