"""Folders for the command line to work in."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import C, D, N
from safetensors.torch import save_file

from moso_fast.tables.table import ScoreTable

MODULE = """
import os, signal
import numpy as np, torch
from torch import nn

class Interrupting(torch.utils.data.Dataset):
    def __len__(self): return 90
    def __getitem__(self, i):
        if i == 40: os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(6), 0

def net():
    return nn.Linear(6, 4)

def data():
    arrays = np.load("F.npy"), np.load("y.npy")
    return torch.utils.data.TensorDataset(*map(torch.from_numpy, arrays))

ready = net()
interrupting = Interrupting()

def faulty():
    raise ValueError("the user's own fault\\nin two lines")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, generator):
    """Working folder with features, labels, three heads and an importable module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_user_module", raising=False)
    np.save("F.npy", torch.randn(N, D, generator=generator).numpy())
    np.save("y.npy", (torch.arange(N) % C).numpy())
    for k in range(3):
        head = {
            "fc.weight": torch.randn(C, D, generator=generator),
            "fc.bias": torch.randn(C, generator=generator),
        }
        save_file(head, f"h{k}.safetensors")
        torch.save(
            {"net": {n.removeprefix("fc."): v for n, v in head.items()}, "lr": 0.5**k},
            f"c{k}.pt",
        )
    Path("cli_user_module.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def scored(folder, generator):
    table = ScoreTable(
        torch.randn(20, generator=generator),
        {"el2n": torch.rand(20, generator=generator), "margin": torch.randn(20)},
        {"score": torch.randn(3, 20, generator=generator)},
        index=torch.randperm(60, generator=generator)[:20],
    )
    table.scores[4] = torch.nan
    table.save("s.npz")
    return table
