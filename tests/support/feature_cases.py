"""Small models and data sets that the tests of heads, batches and features share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset


def net(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class LanguageModel(nn.Module):
    """Shaped like a causal model of transformers: the head is registered first."""

    def __init__(self, vocabulary: int = 7, width: int = 5) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict:
        return {"logits": self.lm_head(torch.tanh(self.mix(self.embed(input_ids))))}


class TinyForCausalLM(LanguageModel):
    pass


class Items(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(index)), index


class Stream(IterableDataset):
    def __init__(self, shuffle: bool = False) -> None:
        self.shuffle, self.passes = shuffle, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.passes += 1
        order = reversed(range(6)) if self.shuffle and self.passes > 1 else range(6)
        return ((torch.full((3,), float(i)), i % 2) for i in order)


ITEMS = Items()
X, Y = torch.ones(2, 3), torch.tensor([0, 1])
