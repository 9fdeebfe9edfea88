"""Explicit gradients, forward mode and double backward, pass by pass, against plain autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import CLOSE, ROWS, batch_of, gradients_by_name, network_of, squares
from torch import Tensor, nn
from torch.nn.utils import rnn

from moso_fast.full import explicit, passes
from moso_fast.full.batches import Batch
from moso_fast.full.flat import Flat
from moso_fast.full.loss import OutputLoss
from moso_fast.full.modes import Substitution
from moso_fast.full.passes import (
    alignment_double_backward,
    alignment_forward,
    explicit_gradients,
)


class Net(nn.Module):
    """A bilinear layer without a rule, a batch norm, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.norm = nn.Bilinear(4, 4, 3), nn.BatchNorm1d(3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pair(x, x.sin())).tanh()


def net() -> Net:
    return Net().double().eval()


def used_gradients(model: Net, inputs: Tensor) -> dict[int, Tensor]:
    """Gradients (n, ...) of all parameters by id."""
    model.unused.requires_grad_(False)
    found = gradients_by_name(model, inputs)
    model.unused.requires_grad_(True)
    found["unused"] = torch.zeros(len(inputs), 2, dtype=torch.float64)
    return {id(p): found[name] for name, p in model.named_parameters()}


def inputs_of(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


@pytest.mark.parametrize("method", [explicit.one_by_one, explicit.vmapped])
@pytest.mark.parametrize("views", [1, 2])
def test_gradients_norms_and_products(
    method: Any, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of two samples, the last of them shorter."""
    monkeypatch.setattr(explicit, "_SAMPLES", 2)
    model, inputs = net(), inputs_of(ROWS * views)
    network, batch = network_of(model), batch_of(inputs, views=views)
    expected = {
        key: g.unflatten(0, (ROWS, views)).mean(1)
        for key, g in used_gradients(model, inputs).items()
    }
    some = [id(model.pair.weight), id(model.norm.bias)]
    seen: dict[int, list[Tensor]] = {key: [] for key in some}
    sizes = []
    for where, gradients in method(network, batch, some):
        assert gradients.keys() == set(some)
        sizes.append(len(torch.arange(ROWS)[where]))
        for key, g in gradients.items():
            assert not g.requires_grad
            seen[key].append(g)
    assert sizes == ([1] * 5 if method is explicit.one_by_one else [2, 2, 1])
    for key in some:
        torch.testing.assert_close(torch.cat(seen[key]), expected[key], **CLOSE)
    norms = explicit.norms(method, network, batch, some)
    whole = torch.cat([expected[key].flatten(1) for key in some], 1)
    torch.testing.assert_close(norms, whole.square().sum(1), **CLOSE)
    tangents = {key: torch.randn_like(g[0]) for key, g in expected.items()}
    dots = explicit.dots(method, network, batch, tangents)
    along = sum((g * tangents[key]).flatten(1).sum(1) for key, g in expected.items())
    torch.testing.assert_close(dots, along, **CLOSE)
    assert norms.dtype == dots.dtype == torch.float64


def test_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as their gradients have room for, and not more than for the activations."""
    model, inputs = net(), inputs_of()
    network, batch = network_of(model), batch_of(inputs)
    for only, entries in (([id(model.pair.bias)], 3), (list(network.names), 4 * 4 * 3 + 3 * 3 + 2)):
        one = 8 * entries
        for room, sizes in (
            (2 * one, [2, 2, 1]),
            (2 * one - 1, [1] * 5),
            (0, [1] * 5),
            (99 * one, [5]),
        ):
            monkeypatch.setattr(explicit, "_BYTES", room)
            found = explicit.vmapped(network, batch, only)
            assert [len(torch.arange(ROWS)[some]) for some, _ in found] == sizes


def test_inputs_that_all_samples_share() -> None:
    """Such as a table, or a number."""

    class Shared(nn.Linear):
        def forward(self, x: Tensor, shift: Tensor, factor: Tensor, name: str) -> Tensor:  # type: ignore[override]
            assert name == "text"
            return super().forward(x) * factor + shift

    model, inputs = Shared(4, 3).double(), inputs_of()
    shift, factor = torch.randn(3).double(), torch.tensor(2.0).double()
    batch = Batch(
        (inputs,),
        {"shift": shift, "factor": factor, "name": "text"},
        torch.zeros(ROWS),
        torch.arange(ROWS),
    )
    network = network_of(model)
    one, other = (
        explicit.norms(method, network, batch, list(network.names))
        for method in (explicit.vmapped, explicit.one_by_one)
    )
    torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.filterwarnings("error")
def test_nobody_hears_that_operations_run_sample_by_sample() -> None:
    def slow(outputs: Tensor, labels: Tensor) -> Tensor:
        warnings.warn("There is a performance drop because of x", UserWarning, stacklevel=1)
        return squares(outputs, labels)

    network, batch = network_of(net(), slow), batch_of(inputs_of())
    assert explicit.norms(explicit.vmapped, network, batch, list(network.names)).all()


def test_samples_of_different_sizes_have_no_vmap() -> None:
    said = "the samples of a batch have inputs of different sizes"
    packed = rnn.pack_sequence([torch.zeros(2, 4), torch.zeros(1, 4)])
    for batch in (
        Batch((torch.zeros(2, 4),), {}, torch.zeros(2), torch.arange(2), 1, (Flat((0,), 1, ""),)),
        Batch(([packed],), {}, torch.zeros(2), torch.arange(2)),
        Batch((), {"x": packed}, torch.zeros(2), torch.arange(2)),
    ):
        with pytest.raises(ValueError) as caught:
            list(explicit.vmapped(network_of(net()), batch, []))
        assert str(caught.value) == said


@pytest.mark.parametrize("way", [alignment_forward, alignment_double_backward])
@pytest.mark.parametrize("kind", ["rows", "nothing"])
def test_alignment(way: Any, kind: str) -> None:
    model, inputs = net(), inputs_of()
    loss = OutputLoss(squares if kind == "rows" else lambda z, y: z.detach().square().sum(1))
    network = network_of(model, loss)
    expected = used_gradients(model, inputs)
    tangents = {key: torch.randn_like(g[0]) for key, g in expected.items()}
    along = sum((g * tangents[key]).flatten(1).sum(1) for key, g in expected.items())
    if kind == "nothing":
        if way is alignment_double_backward:
            with pytest.raises(RuntimeError, match="does not require grad"):
                way(network, batch_of(inputs), tangents)
            return
        along = torch.zeros(ROWS, dtype=torch.float64)
    found = way(network, batch_of(inputs), tangents)
    torch.testing.assert_close(found.tangent.detach(), along, **CLOSE)
    torch.testing.assert_close(found.loss, squares(model(inputs), inputs).detach(), **CLOSE)


def test_gradients_of_one_sample_in_views() -> None:
    model, inputs = net(), inputs_of(2)
    expected = used_gradients(model, inputs)
    network = network_of(model)
    found = explicit_gradients(network, batch_of(inputs, views=2))
    assert found.keys() == expected.keys()
    for key, g in found.items():
        torch.testing.assert_close(g, expected[key].mean(0), **CLOSE)
    some = [id(model.norm.weight), id(model.unused)]
    assert explicit_gradients(network, batch_of(inputs, views=2), some).keys() == set(some)
    fixed = network_of(model, lambda z, y: z.detach().square().sum(1))
    zeros = explicit_gradients(fixed, batch_of(inputs, views=2), some)
    assert {key: g.tolist() for key, g in zeros.items()} == {some[0]: [0.0] * 3, some[1]: [0.0] * 2}


class Noted(torch.autograd.Function):
    """Gives what it is given; notes that its backward pass was run."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Noted.runs += 1
        return gradients[0]


def test_backward_passes_go_where_they_lead_to_parameters() -> None:
    """Unless they are asked to go everywhere."""

    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + Noted.apply(self.beside)

    model = Beside(4, 3).double()
    network = network_of(model)
    model.beside = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for options, runs in (({}, 0), ({"whole": False}, 0), ({"whole": True}, 1)):
        Noted.runs = 0
        found = explicit_gradients(network, batch_of(inputs_of(1)), **options)
        assert (found.keys(), Noted.runs) == (network.names.keys(), runs)


def test_what_a_backward_pass_leaves_in_parameters_is_refused() -> None:
    model = net()
    before = torch.ones(3, dtype=torch.float64)
    model.norm.bias.grad = before
    said = (
        "model: its backward pass writes to the gradients of parameters instead of returning them, "
        "as some gradient checkpointing does; switch that off to score it"
    )
    with passes.keeps_gradients(list(model.parameters())):
        assert model.norm.bias.grad is None
    assert model.norm.bias.grad is before
    with pytest.raises(ValueError) as caught, passes.keeps_gradients(list(model.parameters())):
        model.norm.weight.grad = torch.ones(3, dtype=torch.float64)
    assert str(caught.value) == said
    assert model.norm.bias.grad is before and model.norm.weight.grad is None


def test_other_tensors_in_place_of_some() -> None:
    """Among arguments, keywords and lists of them."""
    one, other = torch.ones(2, 2), torch.full((2, 2), 3.0)
    with Substitution({id(one): other}):
        assert torch.equal(torch.add(one, 1), other + 1)
        assert torch.equal(torch.add(input=one, other=one), other + other)
        assert torch.equal(torch.cat([one, one]), torch.cat([other, other]))
        assert torch.equal(torch.stack((one, other)), torch.stack([other, other]))
        assert torch.equal(torch.cat(tensors=[one, one]), torch.cat([other, other]))
        assert torch.equal(other + 1, torch.full((2, 2), 4.0))


class Held(nn.Module):
    """A table whose padding token is also looked up without being held."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table, self.padding = nn.Parameter(torch.randn(5, 3)), padding

    def forward(self, x: Tensor) -> Tensor:
        held = F.embedding(x, self.table, padding_idx=self.padding)
        return held.sin() + F.embedding(x, self.table).cos()


@pytest.mark.parametrize("padding", [None, 0, 3, -2])
def test_the_padding_token_is_held_in_forward_mode(padding: int | None) -> None:
    model, inputs = Held(padding).double(), torch.arange(5).repeat(ROWS, 1)
    g = gradients_by_name(model, inputs)["table"]
    tangent = torch.randn_like(g[0])
    found = alignment_forward(network_of(model), batch_of(inputs), {id(model.table): tangent})
    torch.testing.assert_close(found.tangent, (g * tangent).flatten(1).sum(1), **CLOSE)


def test_batch_norm_of_16_bits_in_forward_mode() -> None:
    """Within autocast it is given 16 bits; its tangent has the dtype of its result."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    inputs = torch.randn(ROWS, 4)
    network = network_of(model, autocast=torch.bfloat16)
    tangents = {id(p): torch.randn(p.shape) for p in model.parameters()}
    found = alignment_forward(network, batch_of(inputs), tangents)
    exact = alignment_forward(network_of(model), batch_of(inputs), tangents)
    assert found.tangent is not None and exact.tangent is not None
    error = (found.tangent - exact.tangent).abs().max()
    assert 0 < error <= 0.05 * exact.tangent.abs().max()
