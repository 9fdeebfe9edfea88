"""All parameters of a ResNet-50 on 32 x 32 images: ours beside the authors' loop, on any device.

The setting of the paper's CIFAR-100 experiments: 50,000 images, 10 checkpoints, two passes. A part
of the images is timed for one checkpoint, float32 without tf32 for both, and the rest of the
setting is multiplied out; the row says which part.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moso_fast.bench.measure import timed

from ....suites.bench_full_gradient import Ours, authors_loop, check
from ..worker import Wrong
from .timing import device

IMAGES, CHECKPOINTS = 50_000, 10  # the authors' setting
# Samples of ours, samples of the loop, batch, width of the first stage, side of an image.
FULL = (1024, 32, 128, 64, 32)
DRY = (4, 2, 2, 4, 8)
ROUNDS = 3


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut; four times ``width`` channels out."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with the 3 x 3 stem that is usual for 32 x 32 images."""

    def __init__(self, classes: int = 100, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, inputs = [], width
        for stage, depth in enumerate((3, 4, 6, 3)):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inputs, width << stage, stride))
                inputs = 4 * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to logits (B, classes)."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Time both, after comparing their scores; a wrong result gets no number."""
    where, gpu = device(), bool(unit["gpu"])
    many, few, batch, width, side = FULL if gpu else DRY
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet50(width=width).eval().to(where)
    inputs = torch.randn(many, 3, side, side, generator=g).to(where)
    labels = torch.randint(100, (many,), generator=g).to(where)
    start, targets = inputs[:few], labels[:few]
    emit(
        network=f"ResNet-50, 3 x {side} x {side}",
        parameters=sum(p.numel() for p in model.parameters()),
        precision="float32, no tf32",
        samples=many,
        samples_of_loop=few,
        fraction_of_setting=many / IMAGES / CHECKPOINTS,
    )
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected = authors_loop(model, start, targets).cpu()
        try:
            check("ours", Ours(model, start, targets, batch).scores().cpu(), expected)
        except RuntimeError as error:
            raise Wrong(str(error)) from None
        ours = Ours(model, inputs, labels, batch)
        ours.scores()  # finds its chunk, and warms up
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        jobs = {
            "ours": (ours.scores, many),
            "loop": (lambda: authors_loop(model, start, targets), few),
            "forward": (ours.forward, many),
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(ROUNDS if gpu else 1):
            for name, (job, _count) in jobs.items():
                seconds[name].append(timed(job, str(where))[0])
    finally:
        torch.backends.cudnn.allow_tf32 = before
    each = {n: statistics.median(seconds[n]) / count for n, (_, count) in jobs.items()}
    whole = IMAGES * CHECKPOINTS
    emit(
        milliseconds_a_sample={name: 1e3 * value for name, value in each.items()},
        times_loop=each["loop"] / each["ours"],
        setting_minutes=each["ours"] * whole / 60,
        setting_minutes_of_loop=each["loop"] * whole / 60,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if gpu else None,
    )
