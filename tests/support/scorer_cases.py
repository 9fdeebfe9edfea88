"""A small network, its training and its scores by brute force: what the scorer tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.tables.table import ScoreTable

N, CLASSES = 23, 4
RATES = (0.3, 0.1, 0.05)


class SmallNet(nn.Module):
    """Convolution, batch norm, dropout and a head; counts its forward passes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 4, CLASSES, bias=bias)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1))


def images(count: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 1, 4, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def trained(model: nn.Module, steps: int = len(RATES)) -> list[dict[str, Tensor]]:
    """State dicts along a short training, with running statistics of batch norm that move."""
    model = copy.deepcopy(model).train()
    inputs, labels = images().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


def head_gradients(model: nn.Module, state: dict[str, Tensor], **loss: Any) -> Tensor:
    """Per-sample gradients of the head, (N, C * (D + 1)), by autograd in float64."""
    model = copy.deepcopy(model).double().eval()
    model.load_state_dict({n: t.double() if t.is_floating_point() else t for n, t in state.items()})
    inputs, labels = images().tensors
    rows = []
    for x, y in zip(inputs.double(), labels, strict=True):
        value = F.cross_entropy(model(x[None]), y[None], **loss)
        grads = torch.autograd.grad(value, list(model.fc.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def paper_score(gradients: Tensor) -> Tensor:
    """<mean gradient of the others, own gradient>, literally."""
    total = gradients.sum(0)
    return torch.stack([((total - g) / (len(gradients) - 1)) @ g for g in gradients])


def expected_scores(
    gradients: list[Tensor],
    ids: Tensor,
    combine: str = "mean",
    num_steps: int | None = None,
    rates: tuple[float, ...] = RATES,
) -> Tensor:
    scores = torch.zeros(N, dtype=torch.float64)
    for part in ids.unique():
        members = ids == part
        for eta, g in zip(rates, gradients, strict=True):
            s = paper_score(g[members])
            if combine == "zscore":
                s = (s - s.mean()) / s.std(unbiased=False)
            else:
                s = s * eta * (1 if num_steps is None else num_steps / int(members.sum()))
            scores[members] += s / len(gradients)
    return scores


def checkpoints_of(states: list[dict[str, Tensor]]) -> list[Checkpoint]:
    return [
        Checkpoint(s, lr=eta, step=k) for k, (s, eta) in enumerate(zip(states, RATES, strict=True))
    ]


def scorer(model: nn.Module, **options: Any) -> MoSoScorer:
    return MoSoScorer(model, batch_size=8, progress=False, **options)


def same_table(one: ScoreTable, other: ScoreTable) -> bool:
    """Whether two tables agree bitwise."""
    pairs = [(one.scores, other.scores)]
    for mine, theirs in ((one.metrics, other.metrics), (one.per_checkpoint, other.per_checkpoint)):
        assert mine.keys() == theirs.keys()
        pairs += [(mine[name], theirs[name]) for name in mine]
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
