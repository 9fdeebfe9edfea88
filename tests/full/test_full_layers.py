"""Whole-network scores through bags, sparse look-ups, recurrent cells and packed sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from full_cases import CLASSES, gradients, scores
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.tables.table import ScoreTable

N, WORDS = 13, 11


def score(model: nn.Module, inputs: Tensor, labels: Tensor, **options: Any) -> ScoreTable:
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False, **options)
    return scorer.score(TensorDataset(inputs, labels))


def check(model: nn.Module, explicit: int = 0) -> None:
    """Scores, self norms, alignment and the sum of the alignments against plain autograd."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(WORDS, (N, 7), generator=generator)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            nn.init.normal_(module.weight)  # the padding token's row, too, which begins as 0
    g = gradients(model, inputs, labels)
    table = score(model, inputs, labels)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(table.scores, scores(g, "moso"), **close)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1), **close)
    torch.testing.assert_close(table.metrics["alignment"], g @ g.mean(0), **close)
    total = float(table.metrics["alignment"].sum())
    assert total == pytest.approx(N * float(g.mean(0).square().sum()), rel=1e-10)
    assert table.provenance["alignment"] == "forward mode"
    assert len(table.provenance["norms_explicit"]) == explicit


class Bag(nn.Module):
    """One bag a sample, the same table for two bags, or three bags a sample."""

    def __init__(self, kind: str = "one", **options: Any) -> None:
        super().__init__()
        self.embed, self.fc = nn.EmbeddingBag(WORDS, 6, **options), nn.Linear(6, CLASSES)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "offsets":
            starts = torch.arange(len(x)) * x.shape[1]
            return self.fc(self.embed(x.flatten(), starts).tanh())
        if self.kind == "three":
            return self.fc(self.embed(x[:, :6].reshape(-1, 2)).tanh().view(len(x), 3, 6).mean(1))
        h = self.embed(x).tanh()
        return self.fc(h + self.embed(x.flip(1)[:, :3]) if self.kind == "shared" else h)


class Weighted(nn.Module):
    """A bag of weighted words; the weights are learned."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(WORDS, 6, mode="sum", padding_idx=padding)
        self.weights, self.fc = nn.Embedding(WORDS, 1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x, per_sample_weights=self.weights(x)[..., 0]).tanh())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", ["one", "offsets", "three", "shared"])
@pytest.mark.parametrize("padding", [None, 3, -1])
def test_bags(mode: str, kind: str, padding: int | None) -> None:
    torch.manual_seed(0)
    # Maxima of a table that is used twice are no sum of outer products.
    explicit = 1 if (mode, kind) == ("max", "shared") else 0
    check(Bag(kind, mode=mode, padding_idx=padding), explicit)


@pytest.mark.parametrize("padding", [None, 3])
def test_weights_of_the_words_in_a_bag(padding: int | None) -> None:
    torch.manual_seed(0)
    check(Weighted(padding))


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(WORDS, 6, **options), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x).tanh().mean(1))


class Unknown(Words):
    """A look-up by a function without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        looked_up = torch.embedding(self.embed.weight, x, -1, False, self.embed.sparse)
        return self.fc(looked_up.tanh().mean(1))


def test_bags_of_more_words_than_16_bits_count() -> None:
    torch.manual_seed(0)
    model, labels = Bag("one", mode="mean"), torch.randint(CLASSES, (6,))
    inputs = torch.randint(WORDS, (6, 1000))
    model = model.bfloat16().double()
    found = [
        MoSoScorer(
            copy.deepcopy(model).to(dtype),
            gradient="full",
            scope="*embed*",
            batch_size=6,
            progress=False,
        ).score(TensorDataset(inputs, labels))
        for dtype in (torch.bfloat16, torch.float64)
    ]
    for name in ("grad_sqnorm", "alignment"):
        rough, exact = (table.metrics[name].double() for table in found)
        assert (rough - exact).abs().max() <= 0.03 * exact.abs().max()
    assert found[0].provenance["norms_explicit"] == []


@pytest.mark.exhaustive
def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    for padding in (None, 3):
        check(Words(sparse=True, padding_idx=padding))
        check(Bag(sparse=True, padding_idx=padding))
    check(Bag("shared", mode="sum", sparse=True))
    check(Unknown(sparse=True), explicit=1)


class Square(torch.autograd.Function):
    """x^2, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def test_sparse_gradients_where_the_alignment_takes_a_second_derivative() -> None:
    class Squared(Words):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(Square.apply(self.embed(x)).mean(1))

    torch.manual_seed(0)
    model = Squared(sparse=True).double()
    inputs, labels = torch.randint(WORDS, (N, 7)), torch.randint(CLASSES, (N,))
    table = score(model, inputs, labels)
    expected = scores(gradients(model, inputs, labels), "moso")
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    assert table.provenance["alignment"].startswith("double backward")


class Cells(nn.Module):
    """A cell called step by step."""

    def __init__(self, kind: Callable[..., nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(WORDS, 6), kind(6, 4, **options)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind: Callable[..., nn.RNNCellBase], bias: bool) -> None:
    torch.manual_seed(0)
    check(Cells(kind, bias=bias))
    if kind is nn.RNNCell:
        check(Cells(kind, bias=bias, nonlinearity="relu"))


class Packed(nn.Module):
    """Sequences of different lengths, packed; the last state or the mean over the outputs."""

    def __init__(self, kind: type[nn.RNNBase], outputs: bool, how: str = "", **options: Any):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.rnn = kind(6, 4, batch_first=how != "time first", **options)
        self.fc = nn.Linear(4 * (1 + (outputs and self.rnn.bidirectional)), CLASSES)
        self.outputs, self.how = outputs, how

    def forward(self, x: Tensor) -> Tensor:
        lengths, h = (x > 2).sum(1).clamp_min(1), self.embed(x)
        first = self.how != "time first"
        order = None
        if self.how == "sorted before":
            lengths, order = lengths.sort(descending=True)
            h = h[order]
        h = h if first else h.transpose(0, 1)
        packed = rnn.pack_padded_sequence(h, lengths, first, enforce_sorted=order is not None)
        result, state = self.rnn(packed)
        if self.outputs:
            mixed = rnn.pad_packed_sequence(result, batch_first=first)[0].sum(1 if first else 0)
        else:
            state = state[0] if isinstance(state, tuple) else state
            mixed = state[-1] + state[0]
        return self.fc(mixed if order is None else mixed[order.argsort()])


@pytest.mark.quick(1)
@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase], outputs: bool) -> None:
    torch.manual_seed(0)
    check(Packed(kind, outputs))
    check(Packed(kind, outputs, "time first", num_layers=2, bidirectional=True))
    if kind is nn.GRU:
        check(Packed(kind, outputs, bias=False))


def test_packed_sequences_that_the_model_sorts_itself() -> None:
    """Which sample is where cannot be seen: explicit gradients for what lies between."""
    torch.manual_seed(0)
    check(Packed(nn.GRU, False, "sorted before"), explicit=4)


class Items(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Last(nn.Module):
    """The last state of packed sequences, or of one sequence (1, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(6, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Any) -> Tensor:
        packed = x if isinstance(x, rnn.PackedSequence) else rnn.pack_sequence(list(x))
        return self.fc(self.rnn(packed)[1][0][-1])


def test_packed_sequences_as_inputs() -> None:
    """Samples are taken out of a packed batch, and its order is known."""
    torch.manual_seed(0)
    model = Last().double()
    items = [(torch.randn(1 + k * 5 % 7, 6).double(), k % CLASSES) for k in range(N)]
    inputs, labels = [x for x, _ in items], torch.tensor([y for _, y in items])

    def collate(some: list[tuple[Tensor, int]]) -> tuple[tuple[rnn.PackedSequence], Tensor]:
        packed = rnn.pack_sequence([x for x, _ in some], enforce_sorted=False)
        return (packed,), torch.tensor([y for _, y in some])

    g = gradients(model, inputs, labels)
    loader = DataLoader(Items(items), batch_size=5, collate_fn=collate)
    table = MoSoScorer(model, gradient="full", progress=False).score(loader)
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))
    assert table.provenance["norms_explicit"] == []
