"""Time of scoring beside that of plain PyTorch on the same head."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sources.checkpoints.checkpoint import load_state_dict
from ..surrogate.training import Surrogate, sample_positions
from ..tables.table import ScoreTable
from .data import Digits
from .model import SmallCNN


@dataclass(frozen=True)
class Timing:
    """Seconds to score ``num_samples`` samples at ``num_checkpoints`` checkpoints, head only.

    ``moso_fast`` is the median of full scorings; the other two were measured on
    ``measured_samples`` samples at one checkpoint, and extrapolated. ``difference`` is the largest
    difference between the alignments of the loop and of moso_fast on those samples, relative to
    the largest alignment.
    """

    num_samples: int
    num_checkpoints: int
    measured_samples: int
    autograd_loop: float
    closed_form: float
    difference: float
    moso_fast: float = math.nan


def measure_timing(
    digits: Digits,
    surrogates: list[Surrogate],
    table: ScoreTable,
    samples: int,
    seed: int,
) -> Timing:
    """Time batch-1 autograd and the batched closed form on one part at its middle checkpoint."""
    surrogate = surrogates[0]
    positions = sample_positions(len(surrogate.checkpoints), samples, seed)
    middle = len(positions) // 2
    model = SmallCNN().eval()
    model.load_state_dict(load_state_dict(surrogate.checkpoints[positions[middle]].source))
    images = digits.train_images[surrogate.index]
    labels = digits.train_labels[surrogate.index]

    start = time.perf_counter()
    alignment = autograd_alignment(model, images, labels)
    loop_seconds = time.perf_counter() - start
    closed_form = []
    for _ in range(5):
        start = time.perf_counter()
        closed_form_alignment(model, images, labels)
        closed_form.append(time.perf_counter() - start)

    ours = table.per_checkpoint["alignment"][middle][torch.isin(table.index, surrogate.index)]
    difference = (ours - alignment).abs().max() / alignment.abs().max()
    factor = len(positions) * len(table.scores) / len(labels)
    return Timing(
        num_samples=len(table.scores),
        num_checkpoints=len(positions),
        measured_samples=len(labels),
        autograd_loop=loop_seconds * factor,
        closed_form=statistics.median(closed_form) * factor,
        difference=float(difference),
    )


def autograd_alignment(model: SmallCNN, images: Tensor, labels: Tensor) -> Tensor:
    """<g_i, mean gradient> (N,) of the head by autograd at batch size 1, in two passes."""
    parameters = list(model.head.parameters())

    def gradient(i: int) -> Tensor:
        loss = F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    mean = torch.zeros(sum(p.numel() for p in parameters), device="cpu")
    for i in range(len(labels)):
        mean += gradient(i) / len(labels)
    return torch.stack([gradient(i) @ mean for i in range(len(labels))])


@torch.no_grad()
def closed_form_alignment(model: SmallCNN, images: Tensor, labels: Tensor) -> Tensor:
    """Compute the same (N,) values as r_i^T (mean gradient) h_i: no per-sample gradients."""
    features = model.backbone(images)
    residual = model.head(features).softmax(dim=1) - F.one_hot(labels, model.head.out_features)
    features = torch.cat([features, torch.ones(len(labels), 1, device="cpu")], dim=1)
    mean = residual.T @ features / len(labels)
    return ((residual @ mean) * features).sum(dim=1)
