"""A small network, its samples and its weights: what the tests of surrogates share."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

N, D, C = 31, 6, 3
QUICK = {"parts": 3, "epochs": 4, "batch_size": 4, "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.body(x))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(N, D, generator=generator)
    return TensorDataset(inputs, torch.randint(C, (N,), generator=generator))


class Watched(Dataset):
    """Counts reads of every item and can stop a run like Ctrl-C would."""

    def __init__(self, dataset, stop_after=math.inf):
        self.dataset, self.reads, self.stop_after = dataset, [], stop_after

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if len(self.reads) >= self.stop_after:
            raise KeyboardInterrupt
        self.reads.append(index)
        return self.dataset[index]


def weights(surrogates):
    return [c.source for s in surrogates for c in s.checkpoints]


def same(a, b):
    pairs = list(zip(a, b, strict=True))
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
