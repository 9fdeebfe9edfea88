"""Small networks whose every parameter is scored, and their exact answer one sample at a time.

Smooth throughout: where a ReLU or a maximum switches sides between float32 and float64, every
method in float32 is off by a thousandth in that sample, and none could be told to be wrong.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETWORKS", "exact_network", "make_network", "per_sample_gradient"]


def _mlp(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
        nn.Linear(256, classes),
    )  # fmt: skip


def _cnn(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(1568, classes),
    )  # fmt: skip


NETWORKS = {"mlp": _mlp, "cnn": _cnn}


def make_network(
    name: str, classes: int, rows: int, generator: torch.Generator
) -> tuple[nn.Module, Tensor, Tensor]:
    """Network in eval mode, (N, 1, 28, 28) images and their labels."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device="cpu")))
        model = NETWORKS[name](classes).eval()
    images = torch.randn(rows, 1, 28, 28, generator=generator, device="cpu")
    return model, images, torch.randint(0, classes, (rows,), generator=generator, device="cpu")


def per_sample_gradient(
    model: nn.Module, parameters: list[nn.Parameter], image: Tensor, label: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of one sample, and its gradient by all parameters as one vector."""
    loss = F.cross_entropy(model(image[None]), label[None])
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def exact_network(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Two passes over the samples one by one, in float64."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    samples = list(zip(images.double(), labels, strict=True))
    mean = parameters[0].new_zeros(sum(p.numel() for p in parameters))
    for image, label in samples:
        mean += per_sample_gradient(model, parameters, image, label)[1] / len(samples)
    losses, alignments, norms = [], [], []
    for image, label in samples:
        loss, gradient = per_sample_gradient(model, parameters, image, label)
        losses.append(loss)
        alignments.append(gradient @ mean)
        norms.append(gradient @ gradient)
    return {
        "loss": torch.stack(losses),
        "alignment": torch.stack(alignments),
        "grad_sqnorm": torch.stack(norms),
    }
