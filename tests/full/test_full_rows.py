"""The rows of a batch: apart from each other, in their order, alone or in pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from full_rules import ROWS, batch_of, network_of, squares
from torch import Tensor, nn

from moso_fast.core.errors import DataError
from moso_fast.full.loss import OutputLoss
from moso_fast.full.methods import Methods
from moso_fast.full.norms.layout import Layout
from moso_fast.full.passes import NoOtherOrder, order_changes, traced
from moso_fast.full.rows import Rows


def inputs_of(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


class Needs(nn.Module):
    """Fails, or gives other values, for fewer rows than ``least``."""

    def __init__(self, least: int, error: Exception | None = None, factor: float = 2.0) -> None:
        super().__init__()
        self.fc, self.least, self.error, self.factor = nn.Linear(4, 3), least, error, factor

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.least:
            return self.fc(x)
        if self.error is not None:
            raise self.error
        return self.factor * self.fc(x)


@pytest.mark.parametrize(("least", "pairs"), [(1, False), (2, True), (3, None)])
def test_models_that_fail_in_a_batch_of_one(least: int, pairs: bool | None) -> None:
    """Two rows of the same are tried then; what fails for them, too, has the model's own error."""
    error = RuntimeError("of the model")
    network = network_of(Needs(least, error))
    rows, batch = Rows(network), batch_of(torch.randn(3, 4))
    if pairs is None:
        with pytest.raises(RuntimeError) as caught:
            rows.know_pairs(batch)
        assert caught.value is error
    else:
        rows.know_pairs(batch)
    assert network.pairs is pairs
    network.pairs = False
    network.model.error = KeyError("nobody asks again")
    rows.know_pairs(batch)
    assert network.pairs is False


def test_samples_of_several_rows_need_no_pairs() -> None:
    network = network_of(Needs(2, RuntimeError("of the model")))
    Rows(network).know_pairs(batch_of(torch.randn(4, 4), views=2))
    assert network.pairs is None


@pytest.mark.parametrize(
    ("least", "settled", "views", "pairs"),
    [
        (1, False, 1, None),
        (2, False, 1, True),
        (2, True, 1, "no"),
        (3, False, 1, "no"),
        (3, False, 2, "no"),
    ],
)
def test_models_with_other_values_in_a_batch_of_one(
    least: int, settled: bool, views: int, pairs: Any
) -> None:
    """They get rows in pairs, unless it is settled how they are run, or two rows differ as well."""
    network = network_of(Needs(least))
    inputs = torch.randn(3 * views, 4)
    few = batch_of(inputs, views=views)
    ends = few.take(slice(0, 1)), few.take(slice(2, 3))
    if pairs != "no":
        Rows(network).check_independence(few, ends, settled)
        assert network.pairs is pairs
        return
    with pytest.raises(ValueError, match="gradients of single samples are not defined"):
        Rows(network).check_independence(few, ends, settled)
    assert not network.pairs


def test_losses_of_rows_have_no_gradient_and_labels_are_checked() -> None:
    network = network_of(nn.Linear(4, 3), OutputLoss("cross_entropy"))
    inputs = torch.randn(4, 4)
    found = Rows(network).losses(batch_of(inputs, torch.tensor([0, 1, 2, -100])))
    assert not found.requires_grad and float(found[3]) == 0.0
    with pytest.raises(DataError) as caught:
        Rows(network).losses(batch_of(inputs, torch.tensor([0, 1, 2, 3]), views=2))
    assert caught.value.row == 21


def test_calls_in_another_order_of_the_samples() -> None:
    """A call is wrong where what it makes of a sample is not where the sample is."""
    for change, names in (
        (lambda h: h, set()),
        (lambda h: h[(-h[:, 0]).argsort()], {"2.weight", "2.bias"}),
    ):
        model = nn.Sequential(nn.Linear(4, 3), Move(change), nn.Linear(3, 3)).double()
        network, batch = network_of(model), batch_of(inputs_of())
        plan = Methods(network).plan
        for p in (model[0].weight, model[2].weight):
            plan.layouts[("linear", id(p), 2)] = Layout("alone", 0)
        _, _, tape = traced(network, plan, batch, marked=True)
        assert tape.marks is not None and set(tape.marks) == {0, 1}
        wrong = order_changes(network, plan, batch, tape, True, 1e-6)
        assert {network.names[key] for key in wrong} == names


class Move(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def test_models_that_fail_in_another_order() -> None:
    first = inputs_of()

    def picky(h: Tensor) -> Tensor:
        if not torch.equal(h, first):
            raise error
        return h

    model = nn.Sequential(Move(picky), nn.Linear(4, 3)).double()
    network, batch = network_of(model), batch_of(first)
    plan = Methods(network).plan
    plan.layouts[("linear", id(model[1].weight), 2)] = Layout("alone", 0)
    for error, kind in (
        (ValueError("x"), NoOtherOrder),
        (RuntimeError("out of memory"), RuntimeError),
        (MemoryError(), MemoryError),
    ):
        _, _, tape = traced(network, plan, batch, marked=True)
        with pytest.raises(kind) as caught:
            order_changes(network, plan, batch, tape, True, 1e-6)
        assert (caught.value.__cause__ if kind is NoOtherOrder else caught.value) is error


def test_samples_that_influence_each_other() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Move(lambda h: h - h.mean(0))).double()
    inputs = inputs_of(3)
    alone = squares(model(inputs[:1]), inputs)[0].detach()
    among = squares(model(inputs), inputs)[0].detach()
    with pytest.raises(ValueError) as caught:
        Methods(network_of(model)).prepare(batch_of(inputs))
    assert str(caught.value) == (
        "model: the loss of a sample changes with the other samples of its batch "
        f"({float(alone):.6g} in a batch of one, {float(among):.6g} among 3); gradients of single "
        "samples are not defined"
    )


@pytest.mark.parametrize("share", [0.9e-3, 1.1e-3])
@pytest.mark.parametrize("at", [0, -1])
def test_losses_may_differ_in_a_batch_of_one(share: float, at: int) -> None:
    """By a thousandth of the largest loss; the gradient is the same."""
    inputs = torch.ones(3, 4, dtype=torch.float64)
    inputs[at] = 0.5

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        value = squares(outputs, labels)
        far = inputs.sum() if len(value) == 1 and float(outputs.detach()[0, 0]) == level else 0.0
        return value + (share * largest if not isinstance(far, float) else 0.0)

    model = nn.Linear(4, 3).double()
    largest = float(squares(model(inputs), inputs).detach().max())
    level = float(model(inputs[[at]]).detach()[0, 0])
    found = Methods(network_of(model, loss))
    if share < 1e-3:
        found.prepare(batch_of(inputs))
        assert found.network.pairs is None
        return
    # Two rows have the loss that they have among others.
    found.prepare(batch_of(inputs))
    assert found.network.pairs is True
