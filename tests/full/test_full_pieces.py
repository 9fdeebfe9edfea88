"""What is found out on the first batch keeps to the samples that go through the model at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moso_fast.scorer import MoSoScorer

TOKENS = 9


class Model(nn.Module):
    """Predicts the next token, and has a loss that tells; ``most`` samples fit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(TOKENS, 6), nn.Linear(6, TOKENS)
        self.most, self.told = most, [0]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("more than fit")
        logits = self.out(self.embed(input_ids).tanh())
        if labels is None:
            return {"logits": logits}
        self.told.append(len(input_ids))
        ids = labels[:, 1:].flatten()
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), ids)}


def texts(ignored: int) -> list[Any]:
    ids = torch.randint(TOKENS, (12, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:ignored] = -100
    return [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]


@pytest.mark.parametrize(("ignored", "chunk_size"), [(0, 2), (3, 2), (0, 4), (0, 6)])
def test_labels_are_understood_by_as_many_samples_as_fit(ignored: int, chunk_size: int) -> None:
    """Those of which no label counts tell nothing: the next ones of the batch are asked."""
    torch.manual_seed(0)
    model = Model(chunk_size)
    options = {"gradient": "full", "batch_size": 6, "progress": False}
    table = MoSoScorer(model, chunk_size=chunk_size, **options).score(texts(ignored))
    assert max(model.told) == chunk_size
    model.most = 12
    whole = MoSoScorer(model, shift_labels=True, **options).score(texts(ignored))
    torch.testing.assert_close(table.scores, whole.scores, equal_nan=True)
