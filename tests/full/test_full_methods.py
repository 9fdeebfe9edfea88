"""How gradients are had: what is traced, and by what else and why, told to the user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import batch_of, gradients_by_name, network_of, squares
from torch import Tensor, nn

from moso_fast.full import explicit, methods
from moso_fast.full.checks import SelfCheckError
from moso_fast.full.methods import Methods, _first_line
from moso_fast.full.norms import tape as tapes
from moso_fast.full.passes import (
    alignment_double_backward,
    alignment_forward,
)
from moso_fast.full.summed import summed

ROWS = 5


class Odd(nn.Module):
    """A layer with a rule, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(4, 4), nn.Bilinear(4, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.pair(x, x.sin())


def inputs_of(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


def prepared(model: nn.Module, inputs: Tensor) -> Methods:
    found = Methods(network_of(model.double()))
    found.prepare(batch_of(inputs))
    assert found.prepared
    return found


def explicit_of(found: Methods) -> dict[str, str]:
    return {found.network.names[key]: why for key, why in found.plan.others.items()}


NO_RULE = "used by an operation without a rule of its own"


def test_what_is_told_of_a_layer_without_a_rule() -> None:
    found = prepared(Odd(), inputs_of())
    assert found.describe() == {
        "alignment": "forward mode",
        "norms": "2 of 3 parameters traced",
        "norms_explicit": [f"pair.weight ({NO_RULE})"],
        "norms_explicit_by": "vmap",
    }
    found.network.pairs = True
    said = "the model fails in a batch of one: a row that is alone goes through it twice"
    assert found.describe()["rows_in_pairs"] == said


def test_what_is_told_where_vmap_fails() -> None:
    class Bent(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if float(x.detach().sum()) > -99 else 2.0)

    found = prepared(Bent(), inputs_of())
    assert found.others is explicit.one_by_one
    said = found.describe()["norms_explicit_by"]
    assert said.startswith("one by one (no vmap: vmap: ")
    assert said == f"one by one (no vmap: {found.others_reason})"


@pytest.mark.parametrize("at", [0, 2])
def test_vmap_that_gives_other_gradients(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first of three samples, or for the last."""
    own = explicit.vmapped

    def wrong_by(share: float) -> Any:
        def run(network: Any, batch: Any, only: Any) -> Any:
            for some, gradients in own(network, batch, only):
                for g in gradients.values():
                    g[at] *= (1 + share) ** 0.5
                yield some, gradients

        return run

    said = "one by one (no vmap: vmap gives other gradients than plain autograd)"
    for share in (-1.1e-6, -0.9e-6, 0.9e-6, 1.1e-6):
        monkeypatch.setattr(explicit, "vmapped", wrong_by(share))
        found = prepared(Odd(), inputs_of())
        expected = "vmap" if abs(share) < 1e-6 else said
        assert found.describe()["norms_explicit_by"] == expected


@pytest.mark.parametrize("wrong_at", [None, 0, 2])
def test_parameters_whose_rule_is_given_up_later(
    wrong_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vmap is tried on the first three samples of the batch at hand, then never again."""
    own, tried = explicit.vmapped, []

    def watched(network: Any, batch: Any, only: Any) -> Any:
        tried.append((batch.samples, [network.names[key] for key in only]))
        for some, gradients in own(network, batch, only):
            for g in gradients.values():
                g[wrong_at if wrong_at is not None else slice(0, 0)] *= 2
            yield some, gradients

    monkeypatch.setattr(explicit, "vmapped", watched)
    found = prepared(nn.Linear(4, 3), inputs_of())
    found.plan.others[id(found.network.model.bias)] = "given up"
    for _ in range(2):
        found.know_others(batch_of(inputs_of()))
    assert tried == [(3, ["bias"])]
    assert found.others is (watched if wrong_at is None else explicit.one_by_one)


@pytest.mark.parametrize("at", [0, 2])
def test_alignments_that_differ_from_plain_autograd(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(way: Any) -> Any:
        def run(*args: Any) -> Any:
            losses = way(*args)
            losses.tangent = losses.tangent.detach().clone()
            losses.tangent[at] *= 1 + 1e-3
            return losses

        return run

    def fails(*args: Any) -> Any:
        raise RuntimeError("\n  no derivative \nof the second kind\n")

    monkeypatch.setattr(methods, "alignment_forward", wrong(alignment_forward))
    found = prepared(Odd(), inputs_of())
    assert found.aligned is alignment_double_backward
    first = "no forward mode: its values differ from plain autograd"
    assert found.describe()["alignment"] == f"double backward; {first}"
    for second, said in (
        (wrong(alignment_double_backward), "its values differ from plain autograd"),
        (fails, "no derivative "),
    ):
        monkeypatch.setattr(methods, "alignment_double_backward", second)
        for model, kind in ((Odd(), "vmap"), (nn.Linear(4, 3), "vmap")):
            found = prepared(model, inputs_of())
            assert found.aligned is None and found.others is explicit.vmapped
            assert found.describe()["alignment"] == f"{kind}; {first}; no double backward: {said}"
            assert len(found.plan.others) == isinstance(model, Odd)


def test_first_lines_of_errors() -> None:
    operator = "Trying to use forward AD with aten::x that does not support it because"
    for error, said in (
        (RuntimeError("  first \nsecond"), "first "),
        (RuntimeError(), "RuntimeError"),
        (KeyError(" \n "), "' \\n '"),
        (RuntimeError("y" * 161), "y" * 160),
        (RuntimeError(operator), "aten::x does not support it"),
        (RuntimeError(f"first\n{operator}"), "first"),
    ):
        assert _first_line(error) == said


@pytest.mark.parametrize("at", [0, 2])
def test_a_rule_that_is_wrong_is_not_used(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first of three samples, or for the last."""
    own = tapes.Tape.vector

    def wrong_by(change: float) -> Any:
        def run(tape: Any, parameter: Tensor, gradients: Tensor) -> Tensor:
            total = own(tape, parameter, gradients)
            if len(gradients) == 3:
                tape.norms[id(parameter)][at] += change
            return total

        return run

    model, inputs = nn.Linear(4, 3).double(), inputs_of(3)
    squared = {n: g[at].square().sum() for n, g in gradients_by_name(model, inputs).items()}
    # A millionth of the parameter's own square, and of that of the whole gradient.
    allowed = 1e-6 * float(2 * squared["bias"] + squared["weight"])
    for share in (-1.1, -0.9, 0.9, 1.1):
        monkeypatch.setattr(tapes.Tape, "vector", wrong_by(share * allowed))
        why = explicit_of(prepared(model, inputs))
        said = "its traced gradients differ from plain autograd"
        assert why.get("bias") == (said if abs(share) > 1 else None)


def test_a_wrong_sum_of_gradients_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than a millionth of the first sample's gradient."""
    model, inputs = nn.Linear(4, 3).double(), inputs_of()
    first = torch.cat([g[0].flatten() for g in gradients_by_name(model, inputs).values()])
    off = torch.tensor([2.0, -1.0, 2.0]).double() / 3 * 1e-6 * first.norm()
    own = tapes.Tape.vector
    for share in (0.9, 1.1):
        monkeypatch.setattr(
            tapes.Tape, "vector", lambda *args, share=share: own(*args) + share * off
        )
        if share < 1:
            prepared(model, inputs)
            continue
        with pytest.raises(SelfCheckError) as caught:
            prepared(model, inputs)
        assert str(caught.value) == (
            "self-check failed: the gradient of bias differs from plain autograd"
        )


def test_alignments_agree_to_a_millionth_of_the_lengths() -> None:
    """Of the direction (5 here) and of the gradient (3 and 13), for the first and the last."""
    model = nn.Linear(2, 2).double()
    weight, bias = map(id, model.parameters())
    found = Methods(network_of(model))

    def tensors(*values: float) -> dict[int, Tensor]:
        parts = torch.tensor(values).double()
        return {weight: parts[:4].view(2, 2), bias: parts[4:]}

    direction = tensors(3, 0, 0, 0, 4, 0)
    gradients = [tensors(2, 0, 1, 0, 0, 2), tensors(3, 0, 0, 12, 4, 0)]
    exact = torch.tensor([6.0, 99.0, 25.0]).double()
    assert found._agrees(exact, direction, gradients)
    for at, length in ((0, 3), (2, 13)):
        for share in (-1.1, -0.9, 0.9, 1.1):
            values = exact.clone()
            values[at] += share * 1e-6 * 5 * length
            assert found._agrees(values, direction, gradients) is (abs(share) < 1)


class Mixed(nn.Module):
    """A linear layer over differences of neighbours, whose rows belong to two samples each."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.mix(x + x.roll(1, 0)) - self.mix(x.roll(1, 0)) - self.mix(x * 0)
        return self.fc(turned + self.mix(x * 0))


def test_samples_that_do_not_lie_apart() -> None:
    found = prepared(Mixed(), inputs_of())
    why = "used where the samples change their order"
    apart = "used where the samples do not lie apart"
    assert set(explicit_of(found).values()) <= {why, apart}
    assert explicit_of(found).keys() == {"mix.weight", "mix.bias"}

    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.t().reshape(1, -1)[:, : x.shape[1]]).expand(len(x), -1) * x

    found = Methods(network_of(Whole(4, 4).double()))
    inputs = torch.ones(ROWS, 4, dtype=torch.float64)
    found.prepare(batch_of(inputs))
    assert explicit_of(found) == dict.fromkeys(("weight", "bias"), apart)


def test_samples_that_cannot_be_told_apart() -> None:
    """Folded, and behind them a head of zeros: nothing tells sample by sample from part by part."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.fc = nn.Linear(2, 2), nn.Linear(4, 3)
            nn.init.zeros_(self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(x.view(-1, 2)).view(len(x), 4))

    found = prepared(Folded(), inputs_of())
    why = "used where the samples cannot be told apart: the first ones have no gradient there"
    assert explicit_of(found) == dict.fromkeys(("mix.weight", "mix.bias"), why)


def test_parameters_in_different_shapes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.kernel = nn.Parameter(torch.randn(3, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            image = x.unflatten(1, (2, 2))
            grouped = F.conv1d(x[:, :3, None].repeat(1, 2, 2), self.kernel, groups=3)
            one = F.conv1d(image, self.kernel).flatten(1) + grouped.flatten(1)
            return F.linear(x, self.weight) + one

    found = prepared(Twice(), inputs_of())
    assert explicit_of(found) == {"kernel": "used in different shapes"}


def test_a_look_up_that_cannot_be_repeated_for_each_sample() -> None:
    """The model wants the positions as they are."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(4, 3), nn.Linear(4, 3)
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            positions = self.table(torch.arange(4)).view(4, 3)
            return self.fc(x + self.shift) + x @ positions

    inputs = inputs_of()
    found = prepared(Positions(), inputs)
    assert not found.expanding
    assert explicit_of(found).keys() == {"table.weight", "shift"}
    found.moves = True  # so that the samples are also taken in another order
    _, values = summed(found.network, found, batch_of(inputs))
    g = gradients_by_name(found.network.model, inputs).values()
    square = sum(one.square().flatten(1).sum(1) for one in g)
    torch.testing.assert_close(values["grad_sqnorm"], square)
    assert prepared(nn.Linear(4, 3), inputs_of()).expanding


def test_bytes_that_a_sample_keeps() -> None:
    """Of every result of the forward pass: 3 and 3 numbers of 8 bytes."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    for rows in (3, 5):
        assert prepared(model, inputs_of(rows)).bytes_per_sample == 2 * 3 * 8
    assert prepared(model, inputs_of(1)).bytes_per_sample == 0  # nothing had to be found out


def test_calls_that_few_samples_make() -> None:
    """A second try on the same samples ends it."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rare = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, chosen = self.fc(x), x[:, 0] > 5
            return torch.where(chosen[:, None], self.rare(h), h) if chosen.any() else h

    model, inputs = Rare().double(), inputs_of()
    inputs[:, 0] = 0.0
    found = prepared(model, inputs)
    assert explicit_of(found) == {}
    inputs[3, 0] = 6.0
    gradients, values = summed(found.network, found, batch_of(inputs))
    why = "used in a call that few samples make"
    assert explicit_of(found) == dict.fromkeys(("rare.weight", "rare.bias"), why)
    for k in range(ROWS):
        loss = squares(model(inputs[[k]]), inputs)[0]
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        square = sum(float(g.square().sum()) for g in parts if g is not None)
        assert float(values["grad_sqnorm"][k]) == pytest.approx(square, rel=1e-10)
    assert len(gradients) == 4
