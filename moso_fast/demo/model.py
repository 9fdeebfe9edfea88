"""The small network of the demonstration and its plain training loop."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import NUM_CLASSES

BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class SmallCNN(nn.Module):
    """Two convolutions for 8x8 images, 64 features, and a linear head on the ten classes."""

    def __init__(self, width: int = 16, num_features: int = 64) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        return self.head(self.backbone(images))


def train_network(images: Tensor, labels: Tensor, *, steps: int, seed: int) -> SmallCNN:
    """Train a new network for ``steps`` SGD steps, however many images there are.

    A fixed number of steps, not of epochs: otherwise a small subset would be judged by a network
    that has hardly been trained.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = SmallCNN().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            order = torch.randperm(len(labels), generator=generator, device="cpu")
            batches = list(torch.tensor_split(order, math.ceil(len(labels) / BATCH_SIZE)))
        batch = batches.pop()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the network assigns to their class, between 0 and 1."""
    return (model(images).argmax(dim=1) == labels).double().mean().item()
