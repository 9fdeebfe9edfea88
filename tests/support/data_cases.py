"""Seventeen samples, a small model, and what the tests of data and of streams share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from moso_fast import MoSoScorer
from moso_fast.tables.table import ScoreTable

N, WIDTH, CLASSES = 17, 5, 3
GRADIENTS = ["last_layer", "full"]
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
Y = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(1))
NUMBERS = torch.arange(N) + 100
IN_ORDER = list(range(N))


class Net(nn.Module):
    """Takes one input by the name of ``x``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.fc = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def score(data: Any, gradient: str, model: nn.Module | None = None, **options: Any) -> ScoreTable:
    model = model or Net()
    call = {name: options.pop(name) for name in ("index", "partition", "resume") if name in options}
    if gradient == "full":
        options["scope"] = ["fc"]
    scorer = MoSoScorer(model, gradient=gradient, progress=False, **{"batch_size": 5, **options})
    return scorer.score(data, **call)


def told(do: Callable[[], ScoreTable]) -> tuple[ScoreTable, list[str]]:
    """Return the table and what this package warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = do()
    return table, [str(one.message) for one in caught if "data: " in str(one.message)]


class Items(Dataset):
    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def number(k: int) -> int:
    return int(Y[k])


def expected_scores() -> Tensor:
    """Scores of the samples as a plain data set."""
    return score(TensorDataset(X, Y), "last_layer").scores
