"""What the last layer gives up: its scores against those of the whole network, on real images."""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint

MOMENTS = {"early": 0.05, "middle": 0.5, "late": 1.0}
KEEPS = (0.2, 0.5, 0.8)
STEPS, BATCH, RATE = {"digits": 600, "MNIST": 900}, 64, 0.05
RESULTS = Path(__file__).resolve().parents[1] / "results"


class Network(nn.Module):
    """Two convolutions with batch norm, 64 features, ten classes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, size, size) to logits (N, 10)."""
        return self.head(self.body(x))


def read_digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 images of 8 x 8."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 16, torch.from_numpy(bunch.target)


def read_mnist(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Read the first ``count`` training images of 28 x 28 from the files of the original site."""

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        with gzip.open(folder / name, "rb") as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=header)

    images = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:count]
    labels = read("train-labels-idx1-ubyte.gz", 8)[:count]
    return torch.from_numpy(images.copy()).float() / 255, torch.from_numpy(labels.copy()).long()


def train(images: Tensor, labels: Tensor, steps: int, seed: int) -> tuple[Network, list[Any]]:
    """Train with cosine SGD; return the network and its checkpoints with their learning rates."""
    torch.manual_seed(seed)
    model = Network(images.shape[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    moments = {max(1, round(share * steps)) for share in MOMENTS.values()}
    recorded = []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        rate = RATE * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        if len(order) < BATCH:
            order = torch.randperm(len(labels))
        some, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        F.cross_entropy(model(images[some]), labels[some]).backward()
        optimizer.step()
        if step in moments:
            recorded.append(Checkpoint(copy.deepcopy(model.state_dict()), lr=rate, step=step))
    return model, recorded


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def overlap(one: Tensor, other: Tensor, keep: float) -> float:
    """Share of the kept samples that both scores keep; chance gives ``keep``."""
    count = round(keep * len(one))
    kept = [set(v.argsort(descending=True, stable=True)[:count].tolist()) for v in (one, other)]
    return len(kept[0] & kept[1]) / count


def compare(name: str, images: Tensor, labels: Tensor, seed: int) -> list[dict[str, Any]]:
    """Train once and compare the scores at every moment and over all of them."""
    model, recorded = train(images, labels, STEPS[name], seed)
    data = TensorDataset(images, labels)
    scorers = {g: MoSoScorer(model, gradient=g, progress=False) for g in ("full", "last_layer")}
    runs: list[tuple[str, list[Any], str]] = [
        (moment, [c], "mean") for moment, c in zip(MOMENTS, recorded, strict=True)
    ]
    runs += [("all three, mean", recorded, "mean"), ("all three, zscore", recorded, "zscore")]
    rows = []
    for moment, chosen, how in runs:
        tables = {g: s.score(data, chosen, combine=how) for g, s in scorers.items()}
        full, last = tables["full"].scores, tables["last_layer"].scores
        row = {"data": name, "seed": seed, "checkpoint": moment}
        row["loss"] = float(tables["full"].metrics["loss"].mean())
        row["spearman"] = spearman(full, last)
        # Of the norms alone, which is all that is left of the score late in training.
        norms = [tables[g].metrics["grad_sqnorm"] for g in ("full", "last_layer")]
        row["spearman_norms"] = spearman(*norms)
        rows.append(row | {f"overlap_{round(100 * k)}": overlap(full, last, k) for k in KEEPS})
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and largest value over the seeds."""
    result = []
    for key in dict.fromkeys((row["data"], row["checkpoint"]) for row in rows):
        same = [row for row in rows if (row["data"], row["checkpoint"]) == key]
        one: dict[str, Any] = {"data": key[0], "checkpoint": key[1], "seeds": len(same)}
        for name in same[0].keys() - {"data", "checkpoint", "seed"}:
            values = [row[name] for row in same]
            one[name] = [statistics.mean(values), min(values), max(values)]
        result.append(one)
    return result


def markdown(table: list[dict[str, Any]], command: str) -> str:
    """Return the table as a page."""
    keeps = [f"overlap_{round(100 * k)}" for k in KEEPS]
    lines = [
        "# Last layer against whole network",
        "",
        'MoSo (`formula="moso"`) of the last layer against that of all parameters, same weights,'
        " one part: rank correlation, and the share of the kept samples that both keep (chance:"
        " 0.20, 0.50, 0.80). Mean over the seeds, least and largest in brackets. A convolutional"
        " network with batch norm; early, middle and late are 5, 50 and 100% of its training.",
        "",
        f"Made by `{command}`.",
        "",
        "| data | checkpoint | mean loss | Spearman | Spearman of the norms | kept 20% | kept 50% |"
        " kept 80% |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells = [row["data"], row["checkpoint"], f"{row['loss'][0]:.4f}"]
        for name in ("spearman", "spearman_norms", *keeps):
            mean, low, high = row[name]
            cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of kept samples in common over the training."""
    names = list(dict.fromkeys(row["data"] for row in table))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.2 * len(names), 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colours = ("#0072B2", "#E69F00", "#009E73", "#000000")
    for axis, name in zip(axes[0], names, strict=True):
        rows = [row for row in table if row["data"] == name and row["checkpoint"] in MOMENTS]
        places = range(len(rows))
        series = {f"kept {k:.0%} in common": f"overlap_{round(100 * k)}" for k in KEEPS}
        series["Spearman"] = "spearman"
        for (label, key), colour in zip(series.items(), colours, strict=True):
            mean, low, high = zip(*(row[key] for row in rows), strict=True)
            axis.plot(places, mean, "o-", color=colour, label=label)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        for k, colour in zip(KEEPS, colours, strict=False):
            axis.axhline(k, color=colour, linewidth=0.6, linestyle=":")
        axis.set_xticks(list(places), [row["checkpoint"] for row in rows])
        axis.set_title(f"{name}, {rows[0]['seeds']} seeds (dotted: chance)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("last layer against all parameters")
    axes[0][-1].legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=150)


def study(options: argparse.Namespace) -> None:
    """Run the study, print its table and save table, numbers and plot."""
    torch.set_num_threads(options.threads)
    sets = {"digits": read_digits()}
    command = "python -m benches.suites.bench_full_gradient study"
    if options.data_root is not None:
        sets["MNIST"] = read_mnist(options.data_root, options.samples)
        command += f" --data-root MNIST_FOLDER --samples {options.samples}"
    command += f" --seeds {options.seeds}"
    rows = [
        row
        for name, (images, labels) in sets.items()
        for seed in range(options.seeds)
        for row in compare(name, images, labels, seed)
    ]
    table = summary(rows)
    page = markdown(table, command)
    print(page)
    folder = options.save or RESULTS
    content = {"torch": str(torch.__version__), "command": command, "rows": rows}
    (folder / "full_gradient_study.json").write_text(
        json.dumps(content, indent=1) + "\n", encoding="utf-8"
    )
    (folder / "full_gradient_study.md").write_text(page, encoding="utf-8")
    plot(table, folder / "full_gradient_study.png")
