"""The digits of scikit-learn, split once, and labels flipped on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CLASSES = 10
NUM_TEST = 597


@dataclass(frozen=True)
class Digits:
    """Training and test images (n, 1, 8, 8) in [0, 1], with class ids (n,) from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """Read scikit-learn's 1,797 handwritten digits; a seeded third of them is held out."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return Digits(images[train], labels[train], images[test], labels[test])


def flip_labels(
    labels: Tensor, fraction: float, *, num_classes: int = NUM_CLASSES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Give a seeded ``fraction`` of the labels (N,) another class, each wrong class alike.

    Returns
    -------
    tuple of Tensor
        The labels (N,) and a mask (N,) that is True where a label was changed.
    """
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(labels))
    chosen = torch.randperm(len(labels), generator=generator, device="cpu")[:count]
    shift = torch.randint(1, num_classes, (count,), generator=generator, device="cpu")
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + shift) % num_classes
    return flipped, flipped != labels
