"""Whole-network scores of models that give the samples of a batch another order by the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.full import summed
from moso_fast.scorer import MoSoScorer
from moso_fast.tables.table import ScoreTable

N = 18


def score(model: nn.Module, inputs: Tensor, labels: Tensor) -> ScoreTable:
    scorer = MoSoScorer(model, gradient="full", batch_size=6, progress=False)
    return scorer.score(TensorDataset(inputs, labels))


def by_index(x: Tensor, order: Tensor) -> Tensor:
    return x[order]


def by_gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(0, order[:, None].expand_as(x))


def by_product(x: Tensor, order: Tensor) -> Tensor:
    return F.one_hot(order, len(x)).to(x) @ x


def by_list(x: Tensor, order: Tensor) -> Tensor:
    return torch.stack([x[k] for k in order.tolist()])


class Sorts(nn.Module):
    """Sorts the samples by an input, and puts the logits back."""

    def __init__(self, move: Callable[[Tensor, Tensor], Tensor], in_python: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(108, 6), nn.LayerNorm(6)
        self.fc, self.move, self.in_python = nn.Linear(6, CLASSES), move, in_python

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        order = (-x[:, 0]).argsort()
        if self.in_python:
            order = torch.tensor(sorted(range(len(x)), key=lambda k: -float(x[k, 0])))
        h = self.norm(self.first(self.move(x, order)).tanh())
        return self.fc(h)[order.argsort()]


SEEN = (by_index, by_gather, by_product, by_list)


def by_rows(x: Tensor, order: Tensor) -> Tensor:
    return torch.stack([x[k] for k in sorted(range(len(x)), key=lambda k: order[k])])


def by_ranks(x: Tensor, order: Tensor) -> Tensor:
    ranks = (order[:, None] > order).sum(1)
    return (ranks == torch.arange(len(x))[:, None]).to(x) @ x


class Compares(Sorts):
    """Sorts by comparisons alone, which no name of a function gives away."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        sorted_rows = torch.cat([x, torch.arange(len(x))[:, None].to(x)], 1)
        sorted_rows = self.move(sorted_rows, -x[:, 0])
        h = self.norm(self.first(sorted_rows[:, :-1]).tanh())
        return self.move(self.fc(h), sorted_rows[:, -1])


@pytest.mark.parametrize("in_order", [3, 6])
@pytest.mark.parametrize(
    ("move", "in_python"),
    [*((move, move in (by_product, by_list)) for move in SEEN), (by_rows, True), (by_ranks, False)],
)
def test_models_that_sort(move: Callable, in_python: bool, in_order: int) -> None:
    """The samples that the model is tried on, or its first batch, happen to be in order."""
    torch.manual_seed(0)
    kind = Sorts if move in SEEN else Compares
    model, (inputs, labels) = kind(move, in_python).double(), data("cnn", N)
    inputs[:in_order, 0, 0, 0] = torch.arange(9.0, 9.0 - in_order, -1)
    inputs[in_order::6, 0, 0, 0] = 5.0
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))
    reasons = {one.partition(" (")[2] for one in table.provenance["norms_explicit"]}
    assert reasons == {"used where the samples change their order)"}


def test_models_that_sort_only_later() -> None:
    """Where a comparison in Python says so: the first samples do not show it."""

    class Later(Compares):
        def forward(self, x: Tensor) -> Tensor:
            if x[:, 0, 0, 0].max() > 8:
                return super().forward(x)
            return self.fc(self.norm(self.first(x.flatten(1)).tanh()))

    torch.manual_seed(0)
    model, (inputs, labels) = Later(by_ranks, False).double(), data("cnn", N)
    inputs[10, 0, 0, 0] = 9.0
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)


class Packs(nn.Module):
    """Takes sequences by descending length alone; says so itself, or lets torch do it."""

    def __init__(self, checked: bool) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 6), nn.GRU(6, 4, batch_first=True)
        self.fc, self.checked = nn.Linear(4, CLASSES), checked

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x > 0).sum(1)
        if self.checked and (lengths.diff() > 0).any():
            raise RuntimeError("the longest ones come first")
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True)
        return self.fc(self.rnn(packed)[1][0])


@pytest.mark.parametrize("checked", [False, True])
def test_samples_that_cannot_be_turned_round(checked: bool) -> None:
    """A model that fails for another order is not refused; what cannot be checked is explicit."""
    torch.manual_seed(0)
    model, labels = Packs(checked).double(), torch.randint(CLASSES, (N,))
    inputs = torch.randint(1, 11, (N, 6))
    for row in range(N):
        inputs[row, 6 - row % 6 :] = 0
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))
    assert table.provenance["norms_explicit"]


class Experts(nn.Module):
    """Sends each of a sample's tokens to one of two experts."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.first, self.fc = nn.Linear(108 // tokens, 6), nn.Linear(6, CLASSES)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).view(len(x) * self.tokens, -1)
        h, result = self.first(tokens), None
        for number, expert in enumerate(self.experts):
            mine = ((tokens[:, 0] > 0).long() == number).nonzero()[:, 0]
            part = torch.zeros_like(h).index_add(0, mine, expert(h[mine]).tanh())
            result = part if result is None else result + part
        return self.fc(result.view(len(x), self.tokens, 6).mean(1))


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("alike", [False, True])
def test_mixture_of_experts(tokens: int, alike: bool) -> None:
    """How many tokens an expert gets changes; at first it may be all of them."""
    torch.manual_seed(0)
    model, (inputs, labels) = Experts(tokens).double(), data("cnn", N)
    if alike:
        inputs[:3] = inputs[:3].abs()
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))


class Unpadded(nn.Module):
    """Takes the padding out, runs a layer over all tokens, and puts it in again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, used = self.embed(x), x > 0
        mixed = torch.zeros_like(h)
        mixed[used] = self.mix(h[used]).tanh()
        return self.fc(mixed.sum(1))


def test_tokens_without_their_padding() -> None:
    """At first there is none; then the lengths differ, and their sum divides by the samples."""
    torch.manual_seed(0)
    model, labels = Unpadded().double(), torch.randint(CLASSES, (N,))
    inputs = torch.randint(1, 11, (N, 5))
    for row, length in zip(range(6, 12), (5, 2, 4, 1, 3, 3), strict=True):
        inputs[row, length:] = 0
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))


def test_models_that_keep_the_order_are_not_run_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those that only pick a place in each sample, found to be wrong."""
    asked = []
    check = summed.order_changes

    def watched(*args: object) -> set[int]:
        asked.append(check(*args))
        return asked[-1]

    class Picks(nn.Module):
        def __init__(self, by_tensor: bool) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 6), nn.Linear(6, CLASSES)
            self.by_tensor = by_tensor

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(self.embed(x).cumsum(1).tanh())
            return h[torch.arange(len(x)), (x > 2).sum(1) - 1] if self.by_tensor else h[:, -1]

    monkeypatch.setattr(summed, "order_changes", watched)
    inputs, labels = torch.randint(11, (N, 7)), torch.randint(CLASSES, (N,))
    for by_tensor in (False, True):
        torch.manual_seed(0)
        model = Picks(by_tensor).double()
        table = score(model, inputs, labels)
        expected = scores(gradients(model, inputs, labels), "moso")
        torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
        assert table.provenance["norms_explicit"] == []
        assert asked == ([set()] * 3 if by_tensor else [])
