"""Whole-network scores of models that do unusual things: exact, traced or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, data, gradients, scores
from full_scorer_cases import score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer

N = 13


class Frames(nn.Module):
    """Images folded into the batch, sample by sample or frame by frame."""

    def __init__(self, frames_first: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.gn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.ln, self.mix, self.fc = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.frames_first = frames_first

    def forward(self, x: Tensor) -> Tensor:
        samples, frames = x.shape[:2]
        x = (x.transpose(0, 1) if self.frames_first else x).reshape(-1, 1, 6, 6)
        h = self.gn(torch.relu(self.bn(self.conv(x)))).mean((2, 3))
        h = self.mix(self.ln(h))
        if self.frames_first:
            return self.fc(h.view(frames, samples, 4).mean(0))
        return self.fc(h.view(samples, frames, 4).mean(1))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv3d(1, 4, 2, (1, 2, 1), (1, 0, 1), (1, 1, 2))
        self.conv1 = nn.Conv1d(4, 6, 3, groups=2, padding="same")
        self.bn, self.fc = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv1(self.conv3(x[:, None]).flatten(2).tanh())).mean(2))


class InPlace(nn.Module):
    """A view, an operation in place, a scalar parameter and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(144, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu_().view(x.size(0), -1)) * self.scale


class Masked(nn.Module):
    """Self-attention with both masks and weights, and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(12, 2, 16, batch_first=True)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :48].unflatten(1, (4, 12))
        padding = torch.zeros(len(z), 4, dtype=torch.bool)
        padding[:, 3] = x[:, 0, 0, 0] > 0
        causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
        mixed, weights = self.attention(
            z, z, z, key_padding_mask=padding, attn_mask=causal, average_attn_weights=False
        )
        return self.fc(self.decoder(z, mixed).mean(1)) + weights.mean((1, 2, 3))[:, None]


class Queries(nn.Module):
    """Learned queries through a layer that sees no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 12))
        self.q, self.k, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :48].unflatten(1, (4, 12))
        weights = (self.q(self.queries) @ self.k(z).transpose(1, 2)).softmax(-1)
        return self.fc((weights @ z).mean(1))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().amax((2, 3)))


class Gpt(nn.Module):
    """Positions looked up once, addmm with a raw weight, a norm used twice, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.weight, self.bias = (
            nn.Parameter(0.2 * torch.randn(8, 24)),
            nn.Parameter(torch.ones(24)),
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions(torch.arange(7)[None])
        mixed = torch.addmm(self.bias, self.norm(h).view(-1, 8), self.weight)
        q, k, v = (t.transpose(1, 2) for t in mixed.view(*x.shape, 3, 2, 4).unbind(2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm(h + self.out(a.transpose(1, 2).flatten(2))))[:, -1]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 6), nn.LSTM(6, 4, batch_first=True)
        self.fc = nn.Linear(4, 11)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x > 2).sum(1).clamp_min(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.fc(self.rnn(packed)[1][0][-1])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.EmbeddingBag(11, 6), nn.Linear(6, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))


class Temperature(nn.Module):
    """A parameter without dimensions that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(108, CLASSES), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * self.scale.exp()


class Permuted(nn.Module):
    """Batch norm whose gradient comes in permuted."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine)
        self.mix, self.fc = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc(self.mix(h).tanh().mean(1))


# name: model, how many of its parameters are not traced, how the alignment is computed
CASES: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "frames, sample by sample": (lambda: Frames(False), 0, "forward mode"),
    "frames, frame by frame": (lambda: Frames(True), 0, "forward mode"),
    "volumes": (Volumes, 0, "forward mode"),
    "in place": (InPlace, 0, "forward mode"),
    "masked": (Masked, 4, "forward mode"),
    "queries": (Queries, 3, "forward mode"),
    "transposed": (Transposed, 4, "forward mode"),
    "temperature": (Temperature, 1, "forward mode"),
    "permuted": (lambda: Permuted(affine=False), 0, "forward mode"),
    "lstm: gpt": (Gpt, 0, "forward mode"),
    "lstm: packed": (Packed, 0, "forward mode"),
    "lstm: bag": (Bag, 0, "forward mode"),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_exact(name: str) -> None:
    build_it, explicit, alignment = CASES[name]
    torch.manual_seed(0)
    model = build_it().double().eval()
    inputs, labels = data(name, N)
    copies = 2 if name == "permuted" else 1
    expected = scores(gradients(model, inputs, labels, copies=copies), "moso")
    table = score(model, inputs, labels)
    assert (table.scores - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert len(table.provenance["norms_explicit"]) == explicit
    assert table.provenance["alignment"].startswith(alignment)


def test_frozen_batch_norm_and_a_batch_of_one() -> None:
    """Six samples in batches of 5 and 1: plain autograd of torch 2.13 is wrong there on a CPU."""
    torch.manual_seed(0)
    model, (inputs, labels) = Permuted().double().eval(), data("cnn", 6)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("conv"))
    expected = scores(gradients(model, inputs, labels, copies=2), "moso")
    table = score(model, inputs, labels, scope="conv")
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)


def test_layouts_that_the_first_checkpoint_does_not_show() -> None:
    """With a head of zeros no gradient tells how frames and samples lie in the batch."""
    torch.manual_seed(0)
    model = Frames(True).double().eval()
    inputs, labels = data("cnn", N)
    trained, start = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    start["fc.weight"].zero_()
    g = gradients(model, inputs, labels)
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False)
    table = scorer.score(TensorDataset(inputs, labels), [start, trained])
    found = table.per_checkpoint["grad_sqnorm"][1]
    torch.testing.assert_close(found, g.square().sum(1), rtol=1e-10, atol=1e-12)
