"""Data sets and checkpoints that go through the scorer with gradient="full"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from full_cases import ConvNet, build, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.tables.table import ScoreTable

N, RATES = 17, (0.3, 0.1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def full(model: nn.Module, **options: Any) -> MoSoScorer:
    """Return a scorer of whole-network gradients, in batches of 5."""
    options = {"batch_size": 5, "progress": False, **options}
    return MoSoScorer(model, gradient="full", **options)


def score(model: nn.Module, inputs: Tensor, labels: Tensor, **options: object) -> ScoreTable:
    """Return the whole-network scores of these samples."""
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False, **options)
    return scorer.score(TensorDataset(inputs, labels))


def samples(count: int = N) -> TensorDataset:
    """Return inputs and labels for the model "cnn"."""
    return TensorDataset(*data("cnn", count))


def checkpoints() -> list[Checkpoint]:
    """Weights and running statistics that differ."""
    result = []
    for k, rate in enumerate(RATES):
        torch.manual_seed(k)
        result.append(Checkpoint(ConvNet().double().state_dict(), lr=rate, step=k))
    return result


def expected(ids: Tensor | None = None, formula: str = "moso") -> Tensor:
    """Return the scores of `samples` over `checkpoints`, from explicit gradients, part by part."""
    inputs, labels = samples().tensors
    ids = torch.zeros(N, dtype=torch.int64) if ids is None else ids
    total = torch.zeros(N, dtype=torch.float64)
    for checkpoint in checkpoints():
        net = build("cnn")
        net.load_state_dict(checkpoint.source)
        g = gradients(net, inputs, labels)
        for part in ids.unique():
            rows = ids == part
            total[rows] += checkpoint.lr * scores(g[rows], formula) / len(RATES)
    return total


def same(one: ScoreTable, other: ScoreTable) -> bool:
    """Whether the scores and all statistics of two tables are equal bit for bit."""
    return torch.equal(one.scores, other.scores) and all(
        torch.equal(v, other.per_checkpoint[n]) for n, v in one.per_checkpoint.items()
    )


class Listed(Dataset):
    """A data set that is collated item by item."""

    def __init__(self, base: TensorDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.base[index]


class Stream(IterableDataset):
    """The samples one after the other, their number unknown."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(samples()))
