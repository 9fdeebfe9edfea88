"""Surrogate training and scoring: Algorithm 1 of the MoSo paper, seeded from end to end."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ..core.errors import DataError
from ..scorer import MoSoScorer
from ..scoring.partition import partition_ids
from ..sources.checkpoints.checkpoint import Checkpoint
from ..tables.table import ScoreTable
from .store import CheckpointStore, Recipe, input_and_label, open_folder

__all__ = ["Surrogate", "sample_positions", "score_surrogates", "train_surrogates"]

_SCORE_ARGUMENTS = ("formula", "combine", "num_steps")


@dataclass(frozen=True)
class Surrogate:
    """One network of Algorithm 1: its part of the data and its checkpoints along training.

    ``index`` (n,) holds the data-set indices of part ``part``; ``checkpoints`` are in training
    order; ``num_steps`` is T, the number of optimiser steps.
    """

    part: int
    index: Tensor
    checkpoints: list[Checkpoint]
    num_steps: int


def train_surrogates(
    model_factory: Callable[[], nn.Module],
    dataset: Dataset,
    *,
    parts: int = 8,
    epochs: int = 50,
    batch_size: int = 256,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 2e-4,
    nesterov: bool = True,
    min_lr: float = 1e-4,
    seed: int = 0,
    every: int = 1,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    train_transform: Callable[[Any], Any] | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> list[Surrogate]:
    """Train one surrogate network on each part of a seeded, shuffled partition of the data.

    Every surrogate starts from the same weights and is trained on its part alone, by SGD on the
    mean cross-entropy with a cosine learning rate that changes at every step; a checkpoint is
    kept after every ``every``-th epoch and after the last one, with the learning rate of the step
    just before it (NeurIPS 2023 paper, Algorithm 1). The authors' code instead cuts contiguous
    index ranges (whole classes, where a data set is stored by class), changes the learning rate
    once an epoch and seeds neither training nor the choice of checkpoints.

    Parameters
    ----------
    model_factory
        Called without arguments for every part; returns the network, whose output is the logits
        (B, C). Runs under ``seed``.
    dataset
        Map-style data set of (input, label): class ids, or probabilities (C,) as floats. It
        should yield inputs as they are to be scored, without random augmentation.
    parts
        Number of parts I, between 1 and half the number of samples.
    epochs, batch_size, lr, momentum, weight_decay, nesterov, min_lr
        Training recipe. The batches of an epoch differ by at most one sample in size.
    seed
        Decides partition, initial weights and order: the same seed on the same machine gives the
        same weights. The caller's global generator is left as it was.
    every
        Keep a checkpoint after each ``every``-th epoch.
    device
        Where to train; None takes the GPU if there is one.
    out
        Folder for the checkpoints, one file each: ``trial_{part}_{epoch}.pth`` with ``net``,
        ``lr`` and ``epoch`` as in the authors' files, beside ``manifest.json`` (settings, seed)
        and ``partition.pt`` (part of every sample). A part whose files are all there is not
        trained again. None keeps them in memory: parts x checkpoints copies of the weights.
    train_transform
        Random augmentation, applied to each input in training only; draws from torch's generator.
    num_workers
        Worker processes of the data loader; random augmentation depends on their number.
    progress
        Show a line on stderr when it is a terminal.

    Raises
    ------
    TypeError, ValueError
        For a bad argument, an item that is not (input, label), a loss that is not finite, or an
        ``out`` folder that holds the surrogates of other settings.
    """
    num_samples = _dataset_length(dataset)
    recipe = Recipe(
        parts, epochs, batch_size, lr, momentum, weight_decay, nesterov, min_lr, seed, every
    )
    recipe.check(num_samples)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ids = partition_ids(num_samples, parts, seed)
    folder = None
    if out is not None:
        model = _new_model(model_factory, seed, where)
        with _seeded(seed, where):
            folder = open_folder(Path(out), recipe, model, dataset, ids, train_transform)

    surrogates = []
    for part in range(parts):
        index = torch.nonzero(ids == part).squeeze(1)
        steps = math.ceil(len(index) / batch_size)
        store = CheckpointStore(folder, part, recipe, steps)
        if not store.complete():
            view = _TrainingView(dataset, index.tolist(), train_transform)
            _train_part(model_factory, view, recipe, store, where, num_workers, progress)
        surrogates.append(Surrogate(part, index, store.checkpoints(), epochs * steps))
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    return surrogates


def sample_positions(num_checkpoints: int, samples: int | None, seed: int = 0) -> list[int]:
    """Draw ``samples`` of ``num_checkpoints`` positions without replacement, sorted; None = all."""
    if samples is None:
        return list(range(num_checkpoints))
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise TypeError(f"samples: expected an int or None, got {samples!r}")
    if not 1 <= samples <= num_checkpoints:
        raise ValueError(
            f"samples: expected 1 to {num_checkpoints}, the number of checkpoints of a surrogate, "
            f"or None for all of them, got {samples}"
        )
    generator = torch.Generator().manual_seed(seed)
    return sorted(
        torch.randperm(num_checkpoints, generator=generator, device="cpu")[:samples].tolist()
    )


def score_surrogates(
    surrogates: Sequence[Surrogate],
    model_factory: Callable[[], nn.Module],
    dataset: Dataset,
    *,
    samples: int | None = 10,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    **scorer_kwargs: Any,
) -> ScoreTable:
    """Score every part of the data by its own surrogate against the part's own mean gradient.

    The expectation over training steps is estimated from ``samples`` checkpoints (None: all of
    them), the same seeded choice for every part: scores of different parts then stand on the same
    stages of training. The authors' code draws them afresh, unseeded, for every part.

    Parameters
    ----------
    surrogates
        As returned by `train_surrogates`; their indices must not overlap.
    model_factory
        Builds the network whose weights the checkpoints hold.
    dataset
        The data set that the surrogates were trained on, without random augmentation.
    samples, seed
        How many checkpoints of each surrogate are used, and the seed that chooses them.
    resume
        Folder in which an interrupted scoring continues; one folder a part is made in it.
    **scorer_kwargs
        ``formula``, ``combine`` and ``num_steps`` go to `MoSoScorer.score`, the others to
        `MoSoScorer`.

    Returns
    -------
    ScoreTable
        Over the union of the parts, sorted by data-set index.

    Raises
    ------
    TypeError, ValueError
        For no surrogates, surrogates that differ in their number of checkpoints, ``samples`` out
        of range, an index outside the data set, and whatever the scorer refuses.
    """
    surrogates = list(surrogates)
    if not surrogates:
        raise ValueError("surrogates: expected at least one, got none")
    num_samples = _dataset_length(dataset)
    counts = {len(s.checkpoints) for s in surrogates}
    if len(counts) > 1:
        raise ValueError(
            f"surrogates: expected the same number of checkpoints for every part, got {counts}"
        )
    for surrogate in surrogates:
        if int(surrogate.index.max()) >= num_samples:
            raise ValueError(
                f"dataset: has {num_samples} samples, but part {surrogate.part} holds index "
                f"{int(surrogate.index.max())}; pass the data set of the training"
            )
    positions = sample_positions(counts.pop(), samples, seed)
    score_kwargs = {k: scorer_kwargs.pop(k) for k in _SCORE_ARGUMENTS if k in scorer_kwargs}
    scorer = MoSoScorer(model_factory(), **scorer_kwargs)
    tables = []
    for surrogate in surrogates:
        try:
            table = scorer.score(
                Subset(dataset, surrogate.index.tolist()),
                [surrogate.checkpoints[i] for i in positions],
                index=surrogate.index,
                resume=None if resume is None else Path(resume) / f"part_{surrogate.part}",
                **score_kwargs,
            )
        except DataError as error:
            row = int(surrogate.index[error.row])
            raise error.moved(row, f"part {surrogate.part}: ") from error
        tables.append(table)
    return ScoreTable.concat(tables)


class _TrainingView(Dataset):
    """The samples of one part, augmented, with items checked to be (input, label)."""

    def __init__(self, dataset: Dataset, index: list[int], transform: Callable | None) -> None:
        self.dataset, self.index, self.transform = dataset, index, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        inputs, label = input_and_label(self.dataset, self.index[position])
        return (inputs if self.transform is None else self.transform(inputs)), label


class _EvenBatches(Sampler):
    """Freshly shuffled batches whose sizes differ by at most one.

    A plain loader may end an epoch on a single sample, for which batch norm raises.
    """

    def __init__(self, num_samples: int, batch_size: int, generator: torch.Generator) -> None:
        self.num_samples, self.generator = num_samples, generator
        self.count = math.ceil(num_samples / batch_size)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_samples, generator=self.generator, device="cpu")
        for batch in torch.tensor_split(order, self.count):
            yield batch.tolist()


def _train_part(
    model_factory: Callable[[], nn.Module],
    view: _TrainingView,
    recipe: Recipe,
    store: CheckpointStore,
    device: torch.device,
    num_workers: int,
    progress: bool,
) -> None:
    """Train one surrogate and hand its checkpoints to the store."""
    model = _new_model(model_factory, recipe.seed, device).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    # Distinct per part and per seed, so that parts of equal size do not share their order.
    part_seed = (recipe.seed * 1_000_003 + store.part + 1) % 2**63
    generator = torch.Generator().manual_seed(part_seed)
    batches = _EvenBatches(len(view), recipe.batch_size, generator)
    loader = DataLoader(view, batch_sampler=batches, num_workers=num_workers, generator=generator)
    saved, num_steps, step = set(store.epochs), recipe.epochs * len(batches), 0
    with _seeded(part_seed, device):
        for epoch in range(1, recipe.epochs + 1):
            total = torch.zeros((), device=device)
            for inputs, labels in loader:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step, num_steps)
                logits = model(inputs.to(device))
                if not isinstance(logits, Tensor):
                    raise TypeError(
                        f"model_factory: the network must return the logits as a tensor, "
                        f"got {type(logits).__name__}"
                    )
                loss = F.cross_entropy(logits, labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
                step += 1
            if not math.isfinite(total.item()):
                raise ValueError(
                    f"training of part {store.part} diverged: loss {total.item()} in epoch "
                    f"{epoch}; lower lr ({recipe.lr} given) or check the inputs"
                )
            if epoch in saved:
                store.add(epoch, model)
            if progress and sys.stderr.isatty():
                line = f"surrogate {store.part + 1}/{recipe.parts}, epoch {epoch}/{recipe.epochs}"
                print(f"\r{line} ", end="", file=sys.stderr, flush=True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of ``device``, and put them back afterwards."""
    cuda = []
    if device.type == "cuda":
        cuda = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for number in cuda:
            torch.cuda.default_generators[number].manual_seed(seed)
        yield


def _new_model(
    model_factory: Callable[[], nn.Module], seed: int, device: torch.device
) -> nn.Module:
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise TypeError(
            "model_factory: expected a function that returns a new nn.Module, got "
            f"{type(model_factory).__name__}; for example lambda: Net()"
        )
    with _seeded(seed, device):
        model = model_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_factory: must return an nn.Module, got {type(model).__name__}")
    return model.to(device)


def _dataset_length(dataset: Dataset) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "dataset: expected a map-style data set with __len__ and __getitem__, got "
            f"{type(dataset).__name__}"
        )
    return len(dataset)
