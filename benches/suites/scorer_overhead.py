"""What scoring costs beside plain inference: ResNet-18 on 32 x 32 images, interleaved, medians.

    python -m benches.suites.scorer_overhead [--images 512] [--checkpoints 3] [--rounds 5]

Plain inference is ``load_state_dict`` and one forward pass over the same loader per checkpoint, in
inference mode, outputs thrown away. The ratio is taken round by round, so that a machine that is
slower for a while slows both down. Both are run once before: the first score of a process also
imports what torch needs for custom operators, about a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.sources.checkpoints.checkpoint import Checkpoint


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the 3 x 3 stem that is usual for 32 x 32 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to logits (B, classes)."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one line a round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 512), ("checkpoints", 3), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, plain = ResNet18(), ResNet18().eval()
    labels = torch.randint(10, (options.images,))
    data = TensorDataset(torch.randn(options.images, 3, 32, 32), labels)
    loader = DataLoader(data, batch_size=128)
    whole, heads = [], []
    for _ in range(options.checkpoints):
        state = {
            n: t + 0.01 * torch.randn_like(t) if n.endswith("weight") else t.clone()
            for n, t in model.state_dict().items()
        }
        whole.append(Checkpoint(state, lr=0.1))
        moved = {
            n: t if n.startswith("fc.") else s
            for (n, t), s in zip(state.items(), model.state_dict().values(), strict=True)
        }
        heads.append(Checkpoint(moved, lr=0.1))
    scorer = MoSoScorer(model, progress=False)

    def infer() -> None:
        with torch.inference_mode():
            for checkpoint in whole:
                plain.load_state_dict(checkpoint.source)
                for inputs, _ in loader:
                    plain(inputs)

    work: dict[str, Callable[[], object]] = {
        "plain inference": infer,
        "score": lambda: scorer.score(loader, whole),
        "score, frozen backbone": lambda: scorer.score(loader, heads),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    infer()
    scorer.score(TensorDataset(*data[:128]))
    for number in range(options.rounds):
        for name, function in work.items():
            times[name].append(seconds(function))
        print(f"round {number + 1}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
    base, score, frozen = times.values()
    ratio = statistics.median(b / a for a, b in zip(base, score, strict=True))
    one = statistics.median(c * options.checkpoints / a for a, c in zip(base, frozen, strict=True))
    print(f"score / {options.checkpoints} plain passes: {ratio:.3f} (at most 1.05 is wanted)")
    print(f"score with a frozen backbone / 1 plain pass: {one:.3f}")


if __name__ == "__main__":
    main()
