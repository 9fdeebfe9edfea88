"""Texts as flat words with offsets, a network of bags over them, and its explicit gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from full_cases import CLASSES
from torch import Tensor, nn
from torch.utils.data import Dataset

N, WORDS = 13, 11
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Texts(Dataset):
    """Words of different numbers, none among them, and a class."""

    def __init__(self, longest: int = 8, shortest: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(shortest, longest + 1, (N,), generator=generator)
        self.items = [
            (torch.randint(WORDS, (int(n),), generator=generator), k % CLASSES)
            for k, n in enumerate(lengths)
        ]

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


def collate(kind: str) -> Callable[[list[tuple[Tensor, int]]], Any]:
    def run(items: list[tuple[Tensor, int]]) -> Any:
        words, labels = torch.cat([w for w, _ in items]), torch.tensor([y for _, y in items])
        lengths = torch.tensor([len(w) for w, _ in items])
        starts = lengths.cumsum(0) - lengths
        if kind == "dict":
            return {"words": words, "bounds": starts, "labels": labels}
        if kind == "ends":
            return (words, torch.cat([starts, lengths.sum()[None]])), labels
        if kind == "lengths":
            return (words, lengths), labels
        if kind == "weights":
            return (words, starts, words.double() / 7 + 0.3), labels
        return (words, starts), labels

    return run


class Bags(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(WORDS, 6, include_last_offset=kind == "ends", **options)
        self.fc, self.kind = nn.Linear(6, CLASSES), kind

    def forward(self, words: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
        starts = bounds.cumsum(0) - bounds if self.kind == "lengths" else bounds
        return self.fc(self.embed(words, starts, per_sample_weights=weights).tanh())


def one_by_one(model: nn.Module, texts: Dataset, kind: str) -> Tensor:
    """Per-sample gradients (N, P), each sample collated alone."""
    parameters, rows = list(model.parameters()), []
    for k in range(N):
        batch = collate(kind)([texts[k]])
        labels = batch.pop("labels") if isinstance(batch, dict) else batch[1]
        logits = model(**batch) if isinstance(batch, dict) else model(*batch[0])
        found = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
        rows.append(torch.cat([g.to_dense().flatten() for g in found]))
    return torch.stack(rows)
