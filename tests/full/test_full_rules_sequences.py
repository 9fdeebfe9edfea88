"""Rules for look-ups, bags, recurrent layers and attention: traced, and as plain autograd says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import ROWS, batch_of, check_rule, network_of
from torch import Tensor, nn
from torch.nn.utils import rnn

from moso_fast.full.norms.tape import Plan
from moso_fast.full.passes import new_trace

WORDS, LENGTH = 11, 7


class Table(nn.Module):
    """Calls ``run(x, table)``, then mixes what it gives."""

    def __init__(self, run: Callable[..., Tensor], rows: int = WORDS) -> None:
        super().__init__()
        self.table, self.run = nn.Parameter(torch.randn(rows, 6)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.table).sin()


def words(length: int = LENGTH) -> Tensor:
    return torch.randint(WORDS, (ROWS, length))


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


LOOK_UPS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda x, t: F.embedding(x, t),
    "sparse": lambda x, t: F.embedding(x, t, sparse=True),
    "int32": lambda x, t: F.embedding(x.int(), t),
    "one a sample": lambda x, t: F.embedding(x[:, 0], t),
    "padding": lambda x, t: F.embedding(x, t, 3),
    "padding, first": lambda x, t: F.embedding(x, t, padding_idx=0),
    "padding, from the end": lambda x, t: F.embedding(x, t, -2),
    "tokens first": lambda x, t: F.embedding(x.t(), t).transpose(0, 1),
    "tokens folded": lambda x, t: F.embedding(x.flatten(), t).view(len(x), -1, 6),
    "positions": lambda x, t: F.embedding(positions(x), t) * x[..., None],
    "positions of one": lambda x, t: F.embedding(positions(x)[None], t) * x[..., None],
    "tied": lambda x, t: F.linear(F.embedding(x, t).sin(), t),
    "tied, with a bag": lambda x, t: F.embedding(x, t).sin().sum(1) + F.embedding_bag(x, t),
    "twice": lambda x, t: F.embedding(x, t, 3).sin() + F.embedding(x.flip(1), t),
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name: str) -> None:
    calls = 2 if name.startswith(("tied", "twice")) else 1
    check_rule(Table(LOOK_UPS[name]).double(), words(), calls=calls)


@pytest.mark.parametrize("length", [ROWS, 2 * ROWS])
def test_positions_as_many_as_samples(length: int) -> None:
    """Or a multiple; the first samples, of which there are fewer, show that they are none."""
    check_rule(Table(LOOK_UPS["positions"]).double(), words(length), calls=1)


BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "sum, padding": {"mode": "sum", "padding_idx": 3},
    "mean, padding": {"mode": "mean", "padding_idx": -1},
    "max, padding": {"mode": "max", "padding_idx": 0},
}


def three(x: Tensor) -> Tensor:
    return x[:, :6].unflatten(1, (3, 2))


def offsets(x: Tensor, ends: bool) -> dict[str, Any]:
    starts = torch.arange(len(x) + ends) * x.shape[1]
    return {"offsets": starts, "include_last_offset": ends}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", BAGS)
def test_bags(name: str) -> None:
    """Rows of a table, flat words with offsets, with weights, with several bags a sample."""
    options, x = BAGS[name], words()
    x[2] = 3  # a bag of nothing but padding, and one word only
    ways: list[Callable[..., Tensor]] = [
        lambda x, t: F.embedding_bag(x, t, **options),
        lambda x, t: F.embedding_bag(x.flatten(), t, **offsets(x, False), **options),
        lambda x, t: F.embedding_bag(x.flatten(), t, **offsets(x, True), **options),
        lambda x, t: F.embedding_bag(three(x).flatten(0, 1), t, **options).view(len(x), -1),
        lambda x, t: (
            F.embedding_bag(three(x).transpose(0, 1).reshape(-1, 2), t, **options)
            .view(3, len(x), -1)
            .transpose(0, 1)
        ),
    ]
    if options["mode"] == "sum":
        ways += [
            lambda x, t: F.embedding_bag(x, t, per_sample_weights=x.double().cos(), **options),
            lambda x, t: F.embedding_bag(
                x.flatten(),
                t,
                per_sample_weights=x.double().cos().flatten(),
                **offsets(x, True),
                **options,
            ),
        ]
    for way in ways:
        check_rule(Table(way).double(), x, calls=1)
    if options["mode"] != "max":
        both = Table(lambda x, t: F.embedding_bag(x, t, **options).sin() + ways[1](x[:, 2:], t))
        check_rule(both.double(), x, calls=2)


def test_maxima_of_a_table_that_is_used_twice_have_no_rule() -> None:
    def run(x: Tensor, t: Tensor) -> Tensor:
        return F.embedding_bag(x, t, mode="max").sin() + F.embedding_bag(x[:, 2:], t, mode="max")

    check_rule(Table(run).double(), words(), ("table",))


class Learned(nn.Module):
    """Words in a bag with weights that are looked up as well."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(WORDS, 6, mode="sum", padding_idx=padding)
        self.weights = nn.Embedding(WORDS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x, per_sample_weights=self.weights(x)[..., 0])


@pytest.mark.parametrize("padding", [None, 3])
def test_learned_weights_in_a_bag(padding: int | None) -> None:
    model = Learned(padding).double()
    nn.init.normal_(model.embed.weight)
    check_rule(model, words(), calls=2)


class Recurrent(nn.Module):
    """A recurrent layer over (B, T, 4), with all that it returns."""

    def __init__(self, kind: Callable[..., nn.RNNBase], first: bool, start: bool, **options: Any):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=first, **options)
        self.first, self.start = first, start

    def forward(self, x: Tensor) -> Tensor:
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        state: Any = x[:, :1, :3].transpose(0, 1).repeat(count, 1, 1) if self.start else None
        if self.start and isinstance(self.rnn, nn.LSTM):
            state = state, state.cos()
        outputs, last = self.rnn(x if self.first else x.transpose(0, 1), state)
        outputs = outputs if self.first else outputs.transpose(0, 1)
        both = last if isinstance(last, tuple) else (last,)
        states = [s.transpose(0, 1).flatten(1) * (k + 2) for k, s in enumerate(both)]
        return torch.cat([outputs.flatten(1), *states], 1)


KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers(kind: str) -> None:
    x = torch.randn(ROWS, 4, 4, dtype=torch.float64)
    for first, start, options in (
        (True, False, {}),
        (False, True, {"bias": False}),
        (True, True, {"num_layers": 2, "bidirectional": True}),
    ):
        model = Recurrent(KINDS[kind], first, start, **options).double()
        check_rule(model, x)


def test_recurrent_layers_without_a_rule() -> None:
    """Projections; the alignment has a second way."""
    model = Recurrent(nn.LSTM, True, False, proj_size=2).double()
    names = tuple(name for name, _ in model.named_parameters())
    check_rule(model, torch.randn(ROWS, 4, 4, dtype=torch.float64), names)


class Cell(nn.Module):
    """A cell called for each step, with a state to begin with or without."""

    def __init__(self, kind: Callable[..., nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return (
            torch.cat([s * (k + 2) for k, s in enumerate(state)], 1)
            if isinstance(state, tuple)
            else state
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind: Callable[..., nn.RNNCellBase], bias: bool) -> None:
    x = torch.randn(ROWS, 4, 4, dtype=torch.float64)
    check_rule(Cell(kind, bias=bias).double(), x, calls=8)
    if kind is nn.RNNCell:
        check_rule(Cell(kind, bias=bias, nonlinearity="relu").double(), x, calls=8)


class Packed(nn.Module):
    """Sequences of different lengths; all that a recurrent layer returns for them."""

    def __init__(self, kind: Callable[..., nn.RNNBase], first: bool, **options: Any) -> None:
        super().__init__()
        self.rnn, self.first = kind(4, 3, batch_first=first, **options), first

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
        given = x if self.first else x.transpose(0, 1)
        packed = rnn.pack_padded_sequence(given, lengths, self.first, enforce_sorted=False)
        outputs, last = self.rnn(packed)
        padded = rnn.pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0]
        both = last if isinstance(last, tuple) else (last,)
        states = [s.transpose(0, 1).flatten(1) * (k + 2) for k, s in enumerate(both)]
        return torch.cat([padded.flatten(1), *states], 1)


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str) -> None:
    x = torch.randn(ROWS, 5, 4, dtype=torch.float64)
    check_rule(Packed(KINDS[kind], True, bias=False).double(), x)
    check_rule(Packed(KINDS[kind], False, num_layers=2, bidirectional=True).double(), x)


class Attends(nn.Module):
    """nn.MultiheadAttention with options of the layer and of the call."""

    def __init__(self, first: bool, given: Callable[[Tensor], dict[str, Any]], **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=first, **options)
        self.first, self.given = first, given

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.first else x.transpose(0, 1)
        found, weights = self.attention(z, z, z, **self.given(x))
        found = found if self.first else found.transpose(0, 1)
        return (
            found.flatten(1)
            if weights is None
            else torch.cat([found.flatten(1), weights.flatten(1)], 1)
        )


LATER = torch.ones(4, 4, dtype=torch.bool).triu(1)
ATTENTION: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda x: {},
    "no weights": lambda x: {"need_weights": False},
    "weights of each head": lambda x: {"average_attn_weights": False},
    "mask": lambda x: {"attn_mask": LATER},
    "mask of numbers": lambda x: {"attn_mask": LATER.double()},
    "mask for each head": lambda x: {
        "attn_mask": (x[:, :, 0] > 9).repeat_interleave(2, 0)[:, None] | LATER
    },
    "padding": lambda x: {"key_padding_mask": (x[:, :, 0] > 0) & (torch.arange(4) > 1)},
    "both": lambda x: {
        "key_padding_mask": (x[:, :, 0] > 0) & (torch.arange(4) > 1),
        "attn_mask": LATER,
        "is_causal": True,
    },
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    x = torch.randn(ROWS, 4, 6, dtype=torch.float64)
    for first, options in ((True, {}), (False, {"bias": False})):
        model = Attends(first, ATTENTION[name], **options).double()
        for p in model.parameters():
            nn.init.normal_(p)
        check_rule(model, x, calls=2)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_without_a_rule(options: dict[str, Any]) -> None:
    """Its output projection is a linear layer like any other."""
    model = Attends(True, lambda x: {}, **options).double()
    names = tuple(n for n, _ in model.named_parameters())
    check_rule(model, torch.randn(ROWS, 4, 6, dtype=torch.float64), names)


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_of_whole_numbers_are_refused_as_torch_does(name: str) -> None:
    """By the function, which the layer calls with masks that it has looked at itself."""
    mask = torch.zeros((ROWS, 4) if name == "key_padding_mask" else (4, 4), dtype=torch.int64)
    layer, x = nn.MultiheadAttention(6, 2).eval(), torch.randn(4, ROWS, 6)
    weights = layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0
    out = layer.out_proj.weight, layer.out_proj.bias, False
    said = []
    trace, _ = new_trace(network_of(layer), Plan({}), batch_of(x.transpose(0, 1)), True)
    for surrounding in (contextlib.nullcontext(), trace):
        with pytest.raises(AssertionError) as caught, surrounding:
            F.multi_head_attention_forward(x, x, x, 6, 2, *weights, *out, **{name: mask})
        said.append(str(caught.value))
    assert said[0] == said[1] and name in said[0]
