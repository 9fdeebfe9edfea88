"""What a model does with its head besides calling it once: other reads, writes, other names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast import MoSoScorer

N, CLASSES = 12, 3
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % CLASSES


class Factor(nn.Linear):
    """Keeps a factor that the model applies."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(2.0))


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 6), head or nn.Linear(6, CLASSES)
        self.forwards = 0

    def hidden(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x))


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.fc.scale


class ScaledByNumber(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.fc.scale.item()


class Normed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x) / self.fc.weight.norm())


class NormedData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x) / self.fc.weight.data.norm())


class Asks(Net):
    """Asks the head for facts alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.fc.weight.dim() == 2 and len(self.fc.weight) == CLASSES
        return self.fc(self.hidden(x).to(self.fc.weight.dtype))


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two, of which the second has another head."""
    first = copy.deepcopy(model.state_dict())
    second = {n: 3.5 * t + 0.1 if n.startswith("fc") else t.clone() for n, t in first.items()}
    return [first, second]


def score(model: nn.Module, data: Any = None, given: Any = None, **options: Any) -> Any:
    scorer = MoSoScorer(model, batch_size=N, progress=False)
    return scorer.score(TensorDataset(X, Y) if data is None else data, given, **options)


@pytest.mark.parametrize(
    "model",
    [Scaled(Factor(6, CLASSES)), ScaledByNumber(Factor(6, CLASSES)), Normed(), NormedData()],
    ids=lambda model: type(model).__name__,
)
def test_a_head_that_is_read_elsewhere_shares_no_features(model: Net, tmp_path: Path) -> None:
    given = states(model)
    both = score(model, given=given, resume=tmp_path)
    for k, state in enumerate(given):
        alone = copy.deepcopy(model)
        alone.load_state_dict(state)
        losses = F.cross_entropy(alone(X), Y, reduction="none").detach()
        torch.testing.assert_close(both.per_checkpoint["loss"][k], losses, rtol=1e-5, atol=1e-6)
    again = score(model, given=given, resume=tmp_path)
    assert again.provenance == both.provenance
    if isinstance(model, Scaled):
        assert both.provenance["logits"] == (
            "a factor of 2 of the head's output z; a factor of 7.1 of the head's output z"
        )


def test_one_that_is_asked_for_facts_does() -> None:
    model = Asks()
    score(model, given=states(model))
    assert model.forwards == 1


def test_an_output_that_inference_mode_overwrites() -> None:
    class Overwrites(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            z *= 5.0
            return z

    model = Overwrites()
    losses = F.cross_entropy(5 * model.fc(torch.tanh(model.body(X))), Y, reduction="none")
    found = score(model).metrics["loss"]
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-6)


def test_a_last_batch_of_one_bag_is_not_doubled() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.EmbeddingBag(9, 6), nn.Linear(6, CLASSES)

        def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
            return self.fc(self.body(text, offsets))

    bags = [torch.tensor(words) for words in ([1, 2], [3], [4, 5, 6], [7, 8], [2])]

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        lengths = torch.tensor([0, *(len(bags[k]) for k in numbers[:-1])])
        text = torch.cat([bags[k] for k in numbers])
        return {"text": text, "offsets": lengths.cumsum(0), "labels": Y[numbers]}

    model = Bags()
    loader = DataLoader(range(5), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    one = collate([0, 1, 2, 3, 4])
    losses = F.cross_entropy(model(one["text"], one["offsets"]), one["labels"], reduction="none")
    found = score(model, loader).metrics["loss"]
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-6)


def test_a_last_batch_of_one_text() -> None:
    class Texts(Net):
        def forward(self, text: list[str]) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack([X[len(one)] for one in text]))

    def collate(items: list[int]) -> dict[str, Any]:
        return {"text": ["a" * k for k in items], "labels": Y[items]}

    model = Texts()
    loader = DataLoader(range(5), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    losses = F.cross_entropy(model(["a" * k for k in range(5)]), Y[:5], reduction="none")
    found = score(model, loader).metrics["loss"]
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-6)


def test_a_head_under_its_second_name() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.out = self.fc

    model = Twice()
    named = MoSoScorer(model, head="out", progress=False).score(TensorDataset(X, Y))
    assert torch.equal(named.scores, score(model).scores)
