"""What the demonstration measures: pruning, finding flipped labels, and the time of scoring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..surrogate.training import Surrogate, score_surrogates, train_surrogates
from ..tables.select import select
from ..tables.table import ScoreTable
from .data import Digits, flip_labels, load_digits
from .model import SmallCNN, accuracy, train_network
from .timing import Timing, measure_timing

MOSO, MOSO_ZSCORE = "MoSo", "MoSo (zscore)"
RANDOM, EL2N, GRAND = "random", "EL2N", "GraNd"
SELF_INFLUENCE, LOSS, MARGIN = "self_influence", "loss", "margin"
NOTHING, FLIPPED = "nothing dropped", "the flipped ones"

PRUNING_METHODS = (MOSO, MOSO_ZSCORE, RANDOM, EL2N, GRAND)
SUSPICION_SCORES = (MOSO, MOSO_ZSCORE, SELF_INFLUENCE, EL2N, LOSS, MARGIN)
SUSPICIOUS_WHEN_LOW = (MOSO, MOSO_ZSCORE, MARGIN)


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demonstration; the defaults are what `moso-fast demo` runs."""

    seed: int = 0
    repeats: int = 4
    keeps: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    parts: int = 8
    epochs: int = 50
    samples: int = 10
    retrain_steps: int = 200
    flipped: float = 0.1
    dropped: float = 0.2

    @classmethod
    def quick(cls, seed: int = 0) -> DemoConfig:
        """Run every step in seconds, to see that it works: the networks are hardly trained."""
        return cls(
            seed=seed,
            repeats=2,
            keeps=(0.2, 0.6, 1.0),
            parts=4,
            epochs=6,
            samples=3,
            retrain_steps=40,
        )

    def total_work(self) -> int:
        """Count the progress ticks: one for each retraining and each set of surrogates."""
        smaller = sum(keep < 1 for keep in self.keeps)
        pruning = smaller * len(PRUNING_METHODS) + (1.0 in self.keeps)
        cleaning = len(SUSPICION_SCORES) + 3
        return self.repeats * (pruning + cleaning + 2)


@dataclass
class DemoResult:
    """Everything that the demonstration found; accuracies are fractions, one a repeat."""

    config: DemoConfig
    digits: Digits
    table: ScoreTable
    timing: Timing
    flipped_scores: dict[str, Tensor] = field(default_factory=dict)
    flipped_mask: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu")
    )
    pruning: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    auroc: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, list[float]] = field(default_factory=dict)
    cleaned: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Scored:
    """The tables of one set of surrogates: the same checkpoints, combined in two ways."""

    surrogates: list[Surrogate]
    mean: ScoreTable
    zscore: ScoreTable
    seconds: float


def run_demo(config: DemoConfig, tick: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Run the whole demonstration; ``tick`` is called with a caption after each piece of work.

    Every repeat draws new surrogates, new retraining seeds and new flipped labels; the held-out
    images are the same throughout. Results depend on ``config`` alone.
    """
    start = time.perf_counter()
    with _one_thread():
        digits = load_digits(config.seed)
        scoring_seconds = []
        for repeat in range(config.repeats):
            seed = config.seed * 1000 + repeat
            scored = _score(config, digits, digits.train_labels, seed)
            scoring_seconds.append(scored.seconds)
            tick("surrogates")
            if repeat == 0:
                timing = measure_timing(
                    digits, scored.surrogates, scored.mean, config.samples, seed
                )
                result = DemoResult(config, digits, scored.mean, timing)
            _prune_and_retrain(result, scored, seed, tick)
            _find_flipped_labels(result, seed, tick)
    result.timing = replace(result.timing, moso_fast=statistics.median(scoring_seconds))
    result.seconds = time.perf_counter() - start
    return result


def _score(config: DemoConfig, digits: Digits, labels: Tensor, seed: int) -> _Scored:
    dataset = TensorDataset(digits.train_images, labels)
    surrogates = train_surrogates(
        SmallCNN,
        dataset,
        parts=config.parts,
        epochs=config.epochs,
        batch_size=64,
        lr=0.05,
        seed=seed,
        progress=False,
    )

    def score(combine: str) -> ScoreTable:
        return score_surrogates(
            surrogates,
            SmallCNN,
            dataset,
            samples=config.samples,
            seed=seed,
            combine=combine,
            progress=False,
        )

    start = time.perf_counter()
    mean = score("mean")
    seconds = time.perf_counter() - start
    return _Scored(surrogates, mean, score("zscore"), seconds)


def _prune_and_retrain(
    result: DemoResult, scored: _Scored, seed: int, tick: Callable[[str], None]
) -> None:
    """Retrain on what each method keeps; all methods share seed, steps and class quotas."""
    config, digits = result.config, result.digits
    scores = {
        MOSO: scored.mean.scores,
        MOSO_ZSCORE: scored.zscore.scores,
        RANDOM: scored.mean.scores,
        EL2N: scored.mean.metrics["el2n"],
        GRAND: scored.mean.metrics["grand"],
    }
    for keep in config.keeps:
        for method in PRUNING_METHODS:
            outcomes = result.pruning.setdefault(method, {}).setdefault(keep, [])
            if keep == 1 and method != PRUNING_METHODS[0]:
                outcomes.append(result.pruning[PRUNING_METHODS[0]][keep][-1])
                continue
            kept = select(
                scores[method],
                keep,
                labels=digits.train_labels,
                balance="equal",
                method="random" if method == RANDOM else "top",
                seed=seed,
            )
            outcomes.append(_retrained(result, digits.train_labels, kept, seed))
            tick(f"retraining on {keep:.0%}")


def _find_flipped_labels(result: DemoResult, seed: int, tick: Callable[[str], None]) -> None:
    """Flip labels, score again, and see which score ranks the flipped ones as suspicious."""
    from sklearn.metrics import roc_auc_score

    config, digits = result.config, result.digits
    labels, mask = flip_labels(digits.train_labels, config.flipped, seed=seed)
    scored = _score(config, digits, labels, seed)
    tick("surrogates")
    metrics = scored.mean.metrics
    scores = {
        MOSO: scored.mean.scores,
        MOSO_ZSCORE: scored.zscore.scores,
        SELF_INFLUENCE: metrics["self_influence"],
        EL2N: metrics["el2n"],
        LOSS: metrics["loss"],
        MARGIN: metrics["margin"],
    }
    suspicion = {
        name: -values if name in SUSPICIOUS_WHEN_LOW else values for name, values in scores.items()
    }
    if not result.flipped_scores:
        result.flipped_scores, result.flipped_mask = suspicion, mask
    everything = torch.arange(len(labels), device="cpu")
    kept = {
        NOTHING: everything,
        RANDOM: select(metrics["loss"], 1 - config.dropped, method="random", seed=seed),
        FLIPPED: everything[~mask],
    }
    for name, values in suspicion.items():
        kept[name] = select(values, 1 - config.dropped, method="bottom")
        auroc = float(roc_auc_score(mask.numpy(), values.numpy()))
        result.auroc.setdefault(name, []).append(auroc)
        clean = torch.isin(everything[mask], kept[name], invert=True)
        result.found.setdefault(name, []).append(clean.double().mean().item())
    for name, indices in kept.items():
        outcome = _retrained(result, labels, indices, seed)
        result.cleaned.setdefault(name, []).append(outcome)
        tick("retraining without the suspicious labels")


def _retrained(result: DemoResult, labels: Tensor, kept: Tensor, seed: int) -> float:
    digits = result.digits
    model = train_network(
        digits.train_images[kept], labels[kept], steps=result.config.retrain_steps, seed=seed
    )
    return accuracy(model, digits.test_images, digits.test_labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: faster for networks this small, and the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
