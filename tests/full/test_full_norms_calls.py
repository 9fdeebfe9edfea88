"""Which calls are traced, what the tape keeps of them, and which calls may move the samples."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moso_fast.full.norms import moves
from moso_fast.full.norms.factors import Factors
from moso_fast.full.norms.layout import Layout
from moso_fast.full.norms.tape import Plan, Tape, UnknownCall
from moso_fast.full.norms.trace import Trace

CPU = torch.device("cpu")


MOVES = [
    *("sort", "argsort", "msort", "topk", "kthvalue", "unique", "nonzero", "argwhere", "flip"),
    *("masked_select", "index_select", "gather", "take", "take_along_dim", "roll", "bincount"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_"),
    *("index_put", "index_put_", "index_copy", "index_copy_", "masked_scatter", "masked_scatter_"),
    *("repeat_interleave", "tolist", "numpy", "item", "__array__", "__float__", "__int__"),
    *("__index__", "__bool__", "multinomial", "unique_consecutive", "fliplr", "flipud"),
]


def test_operations_that_move_rows() -> None:
    for name in MOVES:
        assert moves.moves_rows(getattr(Tensor, name), ()), name
        assert not hasattr(torch, name) or moves.moves_rows(getattr(torch, name), ()), name
    for function in (torch.randperm, torch.searchsorted, F.one_hot):
        assert moves.moves_rows(function, ())
    for function in (torch.add, torch.cumsum, Tensor.view, F.linear):
        assert not moves.moves_rows(function, ())


def test_indices_that_move_rows() -> None:
    x, index = torch.zeros(3, 2), torch.tensor([2, 0])
    for function in (Tensor.__getitem__, Tensor.__setitem__):
        for some in (index, [2, 0], (slice(None), index), (0, [1])):
            assert moves.moves_rows(function, (x, some))
        for some in (1, slice(0, 2), (slice(None), 1), None, ...):
            assert not moves.moves_rows(function, (x, some))
    assert moves.moves_rows(torch.where, (x,)) and not moves.moves_rows(torch.where, (x, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_tell_samples_apart(dtype: torch.dtype) -> None:
    one = torch.randn(4, 3, 2, dtype=dtype)
    found = moves.fingerprint(one)
    assert found.shape == (4,) and found.dtype == torch.float64
    torch.testing.assert_close(moves.fingerprint(one[[2, 0, 3, 1]]), found[[2, 0, 3, 1]])
    for k, place in itertools.product(range(3), range(2)):
        unit = torch.zeros(1, 3, 2, dtype=dtype)
        unit[0, k, place] = 1.0
        expected = torch.tensor([1.7 * (2 * k + place) + 0.3], dtype=torch.float64).cos()
        rtol = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(moves.fingerprint(unit), expected, rtol=rtol, atol=0)


def plan_of(**parameters: Tensor) -> Plan:
    return Plan({id(p): name for name, p in parameters.items()})


def test_calls_that_no_batch_has_made() -> None:
    weight, bias = (torch.zeros(n, requires_grad=True) for n in (3, 2))
    plan = plan_of(weight=weight, bias=bias)
    key = ("linear", id(weight), 2)
    asked: tuple[Any, ...] = ("linear", (weight, bias), ("matrix", "vector"), (4, 3), 1, 2)
    with pytest.raises(UnknownCall, match=r"^linear$") as caught:
        Tape(plan, 4, 4, CPU).call(*asked)
    assert caught.value.used == [id(weight), id(bias)]
    for rows, probing in ((4, True), (1, False)):
        tape = Tape(plan, rows, rows, CPU, probing)
        call = tape.call(*asked)
        assert call is not None and (call.number, call.key, call.lead) == (0, key, 1)
        assert call.layout is None
        assert tape.calls == [(call, (4,), [id(weight), id(bias)])]
        assert tape.kinds == {id(weight): {"matrix"}, id(bias): {"vector"}}
        assert tape.only_use(weight) and tape.only_use(bias)
    plan.layouts[key] = Layout("alone", 0)
    tape = Tape(plan, 4, 4, CPU)
    first, second = tape.call(*asked), tape.call(*asked)
    assert first is not None and first.layout == Layout("alone", 0)
    assert second is not None and second.number == 1
    assert not tape.only_use(weight)
    assert tape.known_call("linear", weight, 2) and not tape.known_call("linear", weight, 3)
    with pytest.raises(UnknownCall):
        Tape(plan, 3, 3, CPU).call(*asked)  # the layout does not fit this shape
    plan.others[id(weight)] = "why"
    assert not plan.tracked(weight) and plan.tracked(bias) and not plan.tracked(asked)
    assert Tape(plan, 4, 4, CPU).call(*asked) is None
    assert Tape(plan, 4, 4, CPU).call("x", (None, None), (), (4,), 1, 1) is None
    bias.requires_grad_(False)
    assert Tape(plan, 4, 4, CPU).call("x", (bias,), ("vector",), (4,), 1, 1) is None


def test_uses_of_one_parameter_are_added_before_they_are_squared() -> None:
    """Also where a use has no part in the loss, so that its gradient never comes."""
    one, other = torch.randn(3, 2), torch.randn(3, 2)
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(4, 5, requires_grad=True)
    for uses in (2, 3):
        tape = Tape(plan_of(p=p), 1, 3, CPU)
        for _ in range(uses):
            tape.call("x", (p,), ("vector",), (1,), 1, 1)
        torch.testing.assert_close(tape.vector(p, one), one.sum(0))
        tape.vector(p, other)
        assert (id(p) in tape.norms) is (uses == 2)
        tape.finish()
        expected = (one + other).square().sum(1).double()
        torch.testing.assert_close(tape.norms[id(p)], expected)
        torch.testing.assert_close(tape.total(), expected)
    dense = Factors(torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 5))
    numbers = Factors(torch.tensor([[0], [3], [3]]), torch.randn(3, 1, 1, 5))
    one_hot = F.one_hot(numbers.rows, 4).float()
    parts = torch.stack(
        [
            torch.einsum("ngtr,ngtc->nrc", dense.rows, dense.cols),
            torch.einsum("ntr,ngtc->nrc", one_hot, numbers.cols),
        ]
    )
    tape = Tape(plan_of(q=q), 1, 3, CPU)
    for _ in parts:
        tape.call("x", (q,), ("matrix",), (1,), 1, 1)
    for use, part in zip((dense, numbers), parts, strict=True):
        torch.testing.assert_close(tape.matrix(q, use, 4), part.sum(0)[None])
    expected = parts.sum(0).flatten(1).square().sum(1)
    torch.testing.assert_close(tape.norms[id(q)].float(), expected)
    assert tape.matrix(q, dense, 4, wanted=False) is None


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:Mismatch dtype")
def test_calls_without_a_rule_are_left_alone() -> None:
    """Each differs in one thing from a call that is traced."""
    x, table = torch.randn(1, 4), torch.randn(4, 3, requires_grad=True)
    p, ids = torch.randn(4, requires_grad=True), torch.tensor([[1, 0]])
    made = torch.randn(3, 4, requires_grad=True) * 1.0
    image, kernel = torch.randn(4, 1, 6), torch.randn(2, 4, 2, requires_grad=True)
    ends = {"offsets": torch.tensor([[0]])}
    plan = plan_of(table=table, p=p, kernel=kernel)
    left: list[Any] = [
        lambda: F.embedding(ids, table, max_norm=9.0),
        lambda: F.embedding(ids, table, scale_grad_by_freq=True),
        lambda: F.embedding(torch.tensor(1), table),
        lambda: F.embedding(ids, made),
        lambda: F.embedding_bag(ids, table, max_norm=9.0),
        lambda: F.embedding_bag(ids, table, scale_grad_by_freq=True, mode="sum"),
        lambda: F.embedding_bag(ids[0], table, **ends),
        lambda: F.linear(x, made),
        lambda: F.linear(x[0], table.t()),
        lambda: x[0] @ table,
        lambda: torch.matmul(x, table, out=None),
        lambda: torch.addmm(torch.zeros(1, 3), x, table),
        lambda: torch.addmm(torch.zeros(3), x, table, beta=2),
        lambda: F.conv1d(image[:, 0], kernel),
        lambda: F.conv1d(image.movedim(0, 1), kernel, padding="same"),
        lambda: F.layer_norm(x[0], (4,), p),
        lambda: F.layer_norm(x.double(), (4,), p),
        lambda: F.rms_norm(x[0], (4,), p),
        lambda: F.rms_norm(x.double(), (4,), p),
        lambda: F.group_norm(x.double(), 2, p),
        lambda: p + p,
        lambda: p * 2.0,
        lambda: torch.randn(2, 4) + p,
        lambda: torch.randn(()) + p,
        lambda: p.expand(3, 4),
        lambda: x.expand(1, 4),
    ]
    for number, run in enumerate(left):
        tape = Tape(plan, 1, 1, CPU)
        # torch itself refuses some: double with float weights, offsets of two dimensions.
        with Trace(tape), contextlib.suppress(RuntimeError, ValueError):
            run()
        assert tape.calls == [], number
