"""Whole-network scores of flat inputs, of models that fail in a batch of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_bags import CLOSE, WORDS, Bags, Texts, collate, one_by_one
from full_cases import scores
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moso_fast.scorer import MoSoScorer
from moso_fast.tables.table import ScoreTable


class Squeezed(nn.Module):
    """Another model's logits, whose first dimension a bare ``.squeeze()`` takes away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs).squeeze()


class Converts(Bags):
    """Gives its bags other tensors than it was given."""

    def forward(self, words: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().forward(words.long(), bounds.long(), weights)


def check(model: nn.Module, g: Tensor, loader: DataLoader, **options: Any) -> ScoreTable:
    scorer = MoSoScorer(Squeezed(model), gradient="full", progress=False, **options)
    table = scorer.score(loader)
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1), **CLOSE)
    return table


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", ["offsets", "dict", "ends", "lengths", "weights"])
@pytest.mark.parametrize("texts", [Texts(), Texts(1, 0), Texts(1, 1)], ids=["0-8", "0-1", "1"])
@pytest.mark.parametrize("by_value", [False, True])
def test_bags_in_batches_of_every_size(kind: str, texts: Texts, by_value: bool) -> None:
    def given(items: list[Any]) -> Any:
        batch = collate(kind)(items)
        if not by_value:
            return batch
        if kind == "dict":
            return {**batch, "bounds": batch["bounds"].int()}
        return (batch[0][0], batch[0][1].int(), *batch[0][2:]), batch[1]

    torch.manual_seed(0)
    model = Converts(kind, mode="sum" if kind == "weights" else "mean").double()
    nn.init.zeros_(model.embed.weight)  # an empty bag gives what a full one does
    g = one_by_one(model, texts, kind)
    for size, chunk in ((1, None), (3, None), (5, 1)):
        loader = DataLoader(texts, batch_size=size, collate_fn=given)
        table = check(model, g, loader, chunk_size=chunk)
        assert "in a batch of one" in table.provenance["rows_in_pairs"]


def test_first_batch_has_one_sample() -> None:
    """The next one shows which inputs are flat for all that follow."""
    torch.manual_seed(0)
    model, texts = Bags("offsets").double(), Texts()
    g = one_by_one(model, texts, "offsets")
    sizes = [[0], [1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11], [12]]
    check(model, g, DataLoader(texts, batch_sampler=sizes, collate_fn=collate("offsets")))


def explicit(model: nn.Module, items: list[Any], collate_fn: Any) -> Tensor:
    rows = []
    for item in items:
        args, labels = collate_fn([item])
        found = torch.autograd.grad(F.cross_entropy(model(*args), labels), [*model.parameters()])
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


class Shifted(Bags):
    """Adds a number of each row; bags by lengths, or of one word each."""

    def forward(self, words: Tensor, *more: Tensor) -> Tensor:
        *lengths, shift = more
        starts = lengths[0].cumsum(0) - lengths[0] if lengths else torch.arange(len(words))
        return self.fc((self.embed(words, starts) + shift[:, None]).tanh())


@pytest.mark.quick(2)
@pytest.mark.parametrize("by_lengths", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.3, 0, 1])
def test_numbers_of_a_row_that_look_like_offsets(by_lengths: bool, shift: float) -> None:
    """In a batch of one, 0 may be where the first bag begins."""

    def given(items: list[Any]) -> Any:
        (words, lengths), labels = collate("lengths")(items)
        shifts = torch.tensor([shift] * len(items))
        shifts = shifts.double() if isinstance(shift, float) else shifts
        return (words, *([lengths] if by_lengths else []), shifts), labels

    torch.manual_seed(0)
    model, texts = Shifted("offsets").double(), Texts(4, 0) if by_lengths else Texts(1, 1)
    g = explicit(model, texts.items, given)
    check(model, g, DataLoader(texts, batch_size=1, collate_fn=given))


def test_bags_of_one_row_alone() -> None:
    """A model that takes one text at a time needs no offsets; nobody has to take a row twice."""

    class One(Bags):
        def forward(self, words: Tensor, shift: Tensor) -> Tensor:
            h = self.embed(words, torch.zeros(1, dtype=torch.long))
            return self.fc((h + shift[:, None]).tanh())

    def given(items: list[Any]) -> Any:
        (words, lengths), labels = collate("lengths")(items)
        return (words, lengths / 7 + 0.0), labels

    torch.manual_seed(0)
    model, texts = One("offsets").double(), Texts()
    loader = DataLoader(texts, batch_size=1, collate_fn=given)
    table = MoSoScorer(model, gradient="full", progress=False).score(loader)
    g = explicit(model, texts.items, lambda items: _double(given(items)))
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)
    assert "rows_in_pairs" not in table.provenance


def _double(batch: Any) -> Any:
    (words, shift), labels = batch
    return (words, shift.double()), labels


def test_row_that_cannot_be_taken_twice() -> None:
    """One word: its number 0 and its offset 0 are alike, and the model makes its own offsets."""

    class Two(Converts):
        def forward(self, words: Tensor, bounds: Tensor, kind: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(words, bounds) + kind[:, None]

    def given(items: list[Any]) -> Any:
        (words, starts), labels = collate("offsets")(items)
        return (words, starts.int(), labels % 3), labels

    loader = DataLoader([(torch.tensor([3 % WORDS]), k) for k in (1, 2, 3)], 1, collate_fn=given)
    scorer = MoSoScorer(Squeezed(Two("offsets").double()), gradient="full", progress=False)
    with pytest.raises(ValueError, match=r"model: it fails in a batch of one.*at least two"):
        scorer.score(loader)
