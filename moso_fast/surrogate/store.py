"""Recipe, checkpoint files and manifest of surrogate training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..sources.checkpoints.checkpoint import Checkpoint
from ..util.files import atomic_path

_LABEL_PROBES = 64


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the model and the data: the manifest records it."""

    parts: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    min_lr: float
    seed: int
    every: int

    def check(self, num_samples: int) -> None:
        """Raise ValueError or TypeError for the first setting that cannot be trained with."""
        for name in ("parts", "epochs", "batch_size", "every", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value < (0 if name == "seed" else 1):
                wanted = "an int of at least 0" if name == "seed" else "a positive int"
                raise ValueError(f"{name}: expected {wanted}, got {value}")
        if 2 * self.parts > num_samples:
            raise ValueError(
                f"parts: {self.parts} parts of {num_samples} samples leave fewer than 2 a part; "
                f"at most {num_samples // 2} parts are possible"
            )
        for name in ("lr", "momentum", "weight_decay", "min_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a float, got {value!r}")
            if not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
                wanted = "positive" if name == "lr" else "not negative"
                raise ValueError(f"{name}: expected a finite float that is {wanted}, got {value}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: expected at most lr = {self.lr}, got {self.min_lr}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs momentum > 0, got 0; pass nesterov=False")

    def lr_at(self, step: int, num_steps: int) -> float:
        """Cosine learning rate of step ``step`` in 0..num_steps-1, from lr towards min_lr."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
        return self.min_lr + (self.lr - self.min_lr) * cosine

    def saved_epochs(self) -> list[int]:
        """Numbers of finished epochs after which a checkpoint is kept; the last is among them."""
        kept = list(range(self.every, self.epochs + 1, self.every))
        return kept if kept and kept[-1] == self.epochs else [*kept, self.epochs]


class CheckpointStore:
    """Checkpoints of one part, in memory or as the authors' files."""

    def __init__(self, folder: Path | None, part: int, recipe: Recipe, steps: int) -> None:
        self.folder, self.part, self.recipe, self.steps = folder, part, recipe, steps
        self.epochs = recipe.saved_epochs()
        self.sources: dict[int, Any] = {}
        if folder is not None:
            self.sources = {e: folder / f"trial_{part}_{e}.pth" for e in self.epochs}

    def complete(self) -> bool:
        """Tell whether every file of this part is there."""
        return self.folder is not None and all(path.exists() for path in self.sources.values())

    def lr(self, epoch: int) -> float:
        """Learning rate of the last step of ``epoch`` (counted from 1)."""
        return self.recipe.lr_at(epoch * self.steps - 1, self.recipe.epochs * self.steps)

    def add(self, epoch: int, model: nn.Module) -> None:
        """Keep the weights that ``model`` has now, after ``epoch``."""
        # .clone(): on the CPU, .cpu() alone would alias weights that training goes on changing.
        state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        if self.folder is None:
            self.sources[epoch] = state
        else:
            with atomic_path(self.sources[epoch]) as path:
                torch.save({"net": state, "lr": [self.lr(epoch)], "epoch": epoch}, path)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of the part in training order."""
        return [
            Checkpoint(self.sources[epoch], lr=self.lr(epoch), step=epoch * self.steps)
            for epoch in self.epochs
        ]


def input_and_label(dataset: Dataset, index: int) -> tuple[Any, Any]:
    """Read one item, which must be a pair."""
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"dataset: item {index} must be a pair (input, label), got {type(item).__name__}"
            + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        )
    return item[0], item[1]


def _plain(label: Any) -> Any:
    """Return the number, or the list of numbers, that a label is."""
    where = label.device if isinstance(label, Tensor) else "cpu"
    return torch.as_tensor(label, device=where).tolist()


def open_folder(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    dataset: Dataset,
    ids: Tensor,
    transform: Callable | None,
) -> Path:
    """Create the folder with its manifest, or check that what is there fits these settings."""
    layout = [(k, list(v.shape), str(v.dtype)) for k, v in model.state_dict().items()]
    # A few labels, since reading all of them could cost as much as an epoch.
    count = min(_LABEL_PROBES, len(ids))
    probes = torch.linspace(0, len(ids) - 1, count, device="cpu").long().tolist()
    labels = [_plain(input_and_label(dataset, i)[1]) for i in probes]
    manifest: dict[str, Any] = {
        "format": "moso_fast surrogates 1",
        **{f.name: getattr(recipe, f.name) for f in fields(recipe)},
        "num_samples": len(ids),
        "partition_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "labels_sha256": _digest(labels),
        "model_sha256": _digest(layout),
        "train_transform": getattr(transform, "__qualname__", type(transform).__qualname__),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    if not path.exists():
        if any(folder.glob("trial_*.pth")):
            raise ValueError(f"out: {folder} holds trial_*.pth files but no manifest.json")
        with atomic_path(folder / "partition.pt") as temporary:
            torch.save(ids, temporary)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        return folder
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"out: {path} is not a readable manifest ({error})") from None
    for key, value in manifest.items():
        if found.get(key) != value:
            raise ValueError(
                f"out: {folder} holds surrogates of another run: {key} is {found.get(key)!r} "
                f"there and {value!r} here; choose another folder"
            )
    return folder


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
