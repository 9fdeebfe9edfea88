"""The command line in this process, its input files, and what they hold."""

from __future__ import annotations

import numpy as np
import torch

from moso_fast.cli import main

N, D, C = 90, 6, 4
SCORE = "score --features F.npy --labels y.npy --head h0.safetensors -o o.parquet"


def run(capsys, words, code=0):
    capsys.readouterr()
    assert main(words if isinstance(words, list) else words.split()) == code
    return capsys.readouterr()


def inputs():
    features, labels = torch.from_numpy(np.load("F.npy")), torch.from_numpy(np.load("y.npy"))
    files = [torch.load(f"c{k}.pt")["net"] for k in range(3)]
    weight = torch.stack([file["weight"] for file in files])
    return features, weight, labels, torch.stack([file["bias"] for file in files])
