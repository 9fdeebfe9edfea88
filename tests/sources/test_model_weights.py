"""Weights that are lent to a model, and how those of two checkpoints are compared and named."""

from __future__ import annotations

import pytest
import torch
from checkpoint_layouts import network
from torch import Tensor, nn

from moso_fast.sources.checkpoints.weights import (
    ModelWeights,
    Snapshot,
    computed_tensors,
    digest,
    same_memory,
)

ONE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def test_snapshots_are_equal_in_names_kinds_and_values() -> None:
    kept, shared = Snapshot(ONE, copy=True), Snapshot(ONE, copy=False)
    assert (
        kept.tensors["a"] is not ONE["a"] and shared.tensors["a"].data_ptr() == ONE["a"].data_ptr()
    )
    assert kept.tensors["a"].data_ptr() != ONE["a"].data_ptr()
    clones = {name: tensor.clone() for name, tensor in ONE.items()}
    for snapshot in (kept, shared):
        assert snapshot.equals(ONE) and snapshot.equals(clones)
        assert not snapshot.equals({"a": ONE["a"]})
        assert not snapshot.equals({**ONE, "c": ONE["a"]})
        for other in (
            ONE["a"].double(),
            ONE["a"].reshape(3, 2),
            ONE["a"] + 1,
            ONE["a"].to("meta"),
        ):
            assert not snapshot.equals({**ONE, "a": other})
    weight = nn.Parameter(torch.ones(2))
    assert not Snapshot({"w": weight}, copy=False).tensors["w"].requires_grad
    assert not Snapshot({"w": weight}, copy=True).tensors["w"].requires_grad


def test_the_same_memory_is_not_read() -> None:
    nan = {"a": torch.full((2,), torch.nan)}
    assert Snapshot(nan, copy=False).equals(nan) and not Snapshot(nan, copy=True).equals(nan)


def test_what_is_the_same_memory() -> None:
    base = torch.arange(16.0)
    assert same_memory(base, base.view(16)) and same_memory(base[2:4], base[2:4])
    for other in (base.clone(), base[:8], base.view(4, 4), base.view(torch.int32), base[::2]):
        assert not same_memory(base, other)
    square = base.view(4, 4)
    assert not same_memory(square, square.t())
    assert not same_memory(torch.empty(0), torch.empty(0))


def test_the_digest_is_of_names_kinds_shapes_and_bits() -> None:
    names = {
        digest(tensors)
        for tensors in (
            ONE,
            {**ONE, "a": ONE["a"] + 1},
            {**ONE, "a": ONE["a"].reshape(3, 2)},
            {**ONE, "a": ONE["a"].view(torch.int32)},
            {"a": ONE["a"], "c": ONE["b"]},
            {"a": ONE["a"]},
            {"a": torch.empty(0, 2)},
            {"a": torch.empty(2, 0)},
            {"a": torch.tensor(0.0)},
            {"a": torch.tensor(-0.0)},
            {},
        )
    }
    assert len(names) == 11 and {len(name) for name in names} == {32}
    assert digest(ONE) == digest(dict(reversed(ONE.items())))
    assert digest({**ONE, "a": ONE["a"].t().contiguous().t()}) == digest(ONE)
    assert digest({"a": nn.Parameter(ONE["a"])}) == digest({"a": ONE["a"]})


def test_tensors_that_modules_compute() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].hidden, model[1].other = torch.ones(1), "text"  # type: ignore[assignment]
    ((module, tensors),) = computed_tensors(model)
    assert module is model[1] and list(tensors) == ["hidden"]


def test_weights_are_lent_and_come_back() -> None:
    model = network()
    weights = ModelWeights(model, model[3])
    before = {name: t.data_ptr() for name, t in weights.tensors.items()}
    other = {name: t.detach() + 1 for name, t in weights.tensors.items()}
    model[0].seen = torch.ones(2)
    with weights.lent(other):
        assert torch.equal(model[3].weight, other["3.weight"])
        assert model[0].weight.data_ptr() == other["0.weight"].data_ptr(), "by reference"
        mean = model[1].running_mean
        assert torch.equal(mean, other["1.running_mean"])
        assert mean.data_ptr() != other["1.running_mean"].data_ptr(), "a forward pass may write"
        model[0].seen = torch.zeros(2)
    assert {name: t.data_ptr() for name, t in weights.tensors.items()} == before
    assert torch.equal(model[0].seen, torch.ones(2))
    with weights.lent(other, head_only=True):
        assert torch.equal(model[3].bias, other["3.bias"])
        assert model[0].weight.data_ptr() == before["0.weight"]
    with pytest.raises(KeyError), weights.lent(other):
        raise KeyError
    assert {name: t.data_ptr() for name, t in weights.tensors.items()} == before


def test_weights_in_another_form_and_place() -> None:
    model = network()
    model.register_buffer("table", torch.ones(2), persistent=False)
    model.register_buffer("ids", torch.arange(2), persistent=False)
    weights = ModelWeights(model, None, torch.device("cpu"), torch.float64)
    with weights.lent(weights.own()):
        assert model[0].weight.dtype == model.table.dtype == torch.float64
        assert model.ids.dtype == model[1].num_batches_tracked.dtype == torch.int64
    assert model.table.dtype == model[0].weight.dtype == torch.float32
    half = ModelWeights(model, model[3], dtype=torch.float16)
    with half.lent(half.own(), head_only=True):
        assert model[3].weight.dtype == torch.float16 and model[0].weight.dtype == torch.float32
        assert model.table.dtype == torch.float32
    with half.lent(half.own()):
        assert model.table.dtype == model[0].weight.dtype == torch.float16
    plain = ModelWeights(model, None)
    transposed = {**plain.own(), "0.weight": torch.ones(5, 8).t()}
    with plain.lent(transposed):
        assert model[0].weight.is_contiguous(), "as the model's own lies"
    wide = {name: t.double() for name, t in plain.own().items()}
    with plain.lent(wide):
        assert model[0].weight.dtype == torch.float32


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def test_names_of_the_head_and_of_what_decides_the_features() -> None:
    model = network()
    weights = ModelWeights(model, model[3])
    assert weights.head_names == {"3.weight", "3.bias"}
    assert weights.shapes()["3.weight"] == (3, 8) and weights.shapes()["1.running_mean"] == (8,)
    rest = weights.backbone(weights.own())
    assert rest.keys() == weights.tensors.keys() - weights.head_names
    assert not any(t.requires_grad for t in weights.own().values())
    assert ModelWeights(model, None).head_names == set()
    # What a head shares with an embedding decides the features too.
    tied = TiedHead()
    weights = ModelWeights(tied, tied.head)
    assert weights.head_names == {"head.bias"} and list(weights.tensors) == [
        "embed.weight",
        "head.bias",
    ]
    alone = nn.Module()
    alone.head = nn.Linear(3, 3)
    alone.head.second = alone.head.weight
    assert ModelWeights(alone, alone.head).head_names == {"head.weight", "head.bias"}


def test_tensors_of_inference_are_copied() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.inference_mode():
        given: dict[str, Tensor] = {"weight": torch.ones(2, 2)}
    with ModelWeights(layer, layer).lent(given):
        assert torch.equal(layer.weight.detach(), torch.ones(2, 2))
        assert layer.weight.data_ptr() != given["weight"].data_ptr()
        layer(torch.ones(1, 2)).sum().backward()
