"""Whole-network scores of unusual parameters: single numbers, tables, layers of few samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from full_cases import CLASSES, data, gradients, scores
from full_scorer_cases import score
from torch import Tensor, nn

N = 13


class Positions(nn.Module):
    """Positions looked up once for all samples."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 6), nn.Embedding(length, 6)
        self.fc = nn.Linear(6, 11)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)
        return self.fc((self.embed(x) + self.positions(where)).tanh().mean(1))


@pytest.mark.parametrize("length", [5, 10])
def test_as_many_positions_as_samples_in_a_batch(length: int) -> None:
    """Or a multiple of it: by the size alone they could belong to the samples."""
    torch.manual_seed(0)
    model = Positions(length).double()
    inputs, labels = torch.randint(11, (N, length)), torch.randint(11, (N,))
    expected = scores(gradients(model, inputs, labels), "moso")
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    assert table.provenance["norms_explicit"] == []


def test_numbers_as_outputs_and_parameters() -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(108, 1), nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)).squeeze(1) * self.scale

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()

    torch.manual_seed(0)
    model, inputs = Regression().double(), data("cnn", N)[0]
    targets = torch.randn(N, dtype=torch.float64)
    expected = scores(gradients(model, inputs, targets, loss), "moso")
    table = score(model, inputs, targets, loss=loss)
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    assert table.provenance["norms_explicit"] == []


def test_branch_that_only_a_later_sample_takes() -> None:
    """Not one of the first three of its batch, on which the layouts are found."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rare = nn.Linear(108, 6), nn.Linear(6, 6)
            self.also, self.fc = nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1)).tanh()
            chosen = x[:, 0, 0, 0] > 0
            if bool(chosen.any()):
                h = torch.where(chosen[:, None], self.also(self.rare(h)), h)
            return self.fc(h)

    torch.manual_seed(0)
    model, (inputs, labels) = Branch().double(), data("cnn", N)
    inputs[:, 0, 0, 0] = -1.0
    inputs[9, 0, 0, 0] = 1.0
    expected = scores(gradients(model, inputs, labels), "moso")
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    explicit = table.provenance["norms_explicit"]
    names = ["also.bias", "also.weight", "rare.bias", "rare.weight"]
    assert [one.split()[0] for one in explicit] == names
    assert all("used in a call that few samples make" in one for one in explicit)


class Words(nn.Module):
    """An embedding with options, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, **options)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.embed(x)).mean(1))


def test_embedding_options() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randint(11, (9, 12)), torch.randint(CLASSES, (9,))
    scaled = Words(scale_grad_by_freq=True).double().eval()
    with pytest.raises(ValueError, match="embedding 'embed' divides gradients by how often"):
        score(scaled, inputs, labels)
    scaled.embed.weight.requires_grad_(False)
    for model in (scaled, Words(padding_idx=-1).double().eval()):
        expected = scores(gradients(model, inputs, labels), "moso")
        error = (score(model, inputs, labels).scores - expected).abs().max()
        assert error <= 1e-10 * expected.abs().max()
