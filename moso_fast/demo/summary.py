"""The numbers of a demonstration as plain data, and the sentences that follow from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from .experiment import (
    FLIPPED,
    MOSO,
    NOTHING,
    PRUNING_METHODS,
    RANDOM,
    SUSPICION_SCORES,
    SUSPICIOUS_WHEN_LOW,
    DemoResult,
)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over repeats (0 for one repeat) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def compare(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Mean paired difference from a baseline, and whether it exceeds two standard errors.

    ``clear`` is False for fewer than three repeats, which say nothing about the noise.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 3:
        return {"mean": mean, "standard_error": None, "clear": False}
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "standard_error": error, "clear": abs(mean) > 2 * error}


def summarise(result: DemoResult) -> dict[str, Any]:
    """Everything measured as JSON-ready data; accuracies, shares and AUROC between 0 and 1."""
    config, timing = result.config, result.timing
    smaller = [keep for keep in config.keeps if keep < 1]
    averages = {
        method: _mean_over(result.pruning[method][keep] for keep in smaller)
        for method in PRUNING_METHODS
    }
    summary: dict[str, Any] = {
        "config": asdict(config),
        "data": {
            "name": "scikit-learn digits, 8x8 images",
            "train": len(result.digits.train_labels),
            "test": len(result.digits.test_labels),
        },
        "timing": {**asdict(timing), "speed_up": timing.autograd_loop / timing.moso_fast},
        "pruning": {
            method: {f"{keep:g}": spread(by_keep[keep]) for keep in config.keeps}
            for method, by_keep in result.pruning.items()
        },
        "pruning_against_random": {
            method: compare(averages[method], averages[RANDOM])
            for method in PRUNING_METHODS
            if method != RANDOM
        },
        "label_errors": {
            name: {"auroc": spread(result.auroc[name]), "found": spread(result.found[name])}
            for name in SUSPICION_SCORES
        },
        "cleaning": {name: spread(values) for name, values in result.cleaned.items()},
        "cleaning_against_nothing": {
            name: compare(values, result.cleaned[NOTHING])
            for name, values in result.cleaned.items()
            if name != NOTHING
        },
        "seconds": result.seconds,
    }
    summary["verdict"] = verdict(summary)
    summary["findings"] = findings(summary)
    return summary


def verdict(summary: dict[str, Any]) -> str:
    """Say in one sentence which score served which purpose, and where that proves nothing."""
    pruning, cleaning = summary["pruning_against_random"], summary["cleaning_against_nothing"]
    keeper = max(pruning, key=lambda name: pruning[name]["mean"])
    finder = _best_finder(summary)
    cleaner = max(SUSPICION_SCORES, key=lambda name: summary["cleaning"][name]["mean"])
    first = f"{keeper} served pruning best"
    if not _helps(pruning[keeper]):
        first = f"no score served pruning clearly better than random (best: {keeper})"
    last = f"{cleaner} served cleaning before training best"
    if not _helps(cleaning[cleaner]):
        last = f"dropping by no score was clearly better than dropping nothing (best: {cleaner})"
    return f"In this run {first}, {finder} found flipped labels best, and {last}."


def findings(summary: dict[str, Any]) -> list[str]:
    """Say what the numbers of this run show: pruning, finding flipped labels, cleaning."""
    return [_about_pruning(summary), _about_flipped(summary), _about_cleaning(summary)]


def _about_pruning(summary: dict[str, Any]) -> str:
    against = summary["pruning_against_random"]
    best = max(against, key=lambda name: against[name]["mean"])
    keeps = [keep for keep in summary["pruning"][RANDOM] if float(keep) < 1]
    winners = [
        max(PRUNING_METHODS, key=lambda m: summary["pruning"][m][keep]["mean"]) for keep in keeps
    ]
    if _helps(against[best]):
        text = f"{best} served best, {_difference(against[best], 'random on average')}"
    else:
        text = (
            f"no score beat random clearly on average; the best, {best}, was "
            f"{_difference(against[best], 'random')}"
        )
    if best != MOSO:
        text += f"; MoSo as in the paper was {_difference(against[MOSO], 'random')}"
    named = "/".join(f"{100 * float(keep):g}" for keep in keeps)
    return f"Pruning: {text}; most accurate at keep {named}%: {', '.join(winners)}."


def _about_flipped(summary: dict[str, Any]) -> str:
    auroc = {name: entry["auroc"]["mean"] for name, entry in summary["label_errors"].items()}
    best = _best_finder(summary)
    end = "low" if best in SUSPICIOUS_WHEN_LOW else "high"
    text = f"{end} {best} found them best (AUROC {auroc[best]:.3f})"
    if best != MOSO:
        text += f"; low MoSo as in the paper reached {auroc[MOSO]:.3f}"
    return f"Flipped labels: {text}; chance is 0.5."


def _about_cleaning(summary: dict[str, Any]) -> str:
    against, cleaning = summary["cleaning_against_nothing"], summary["cleaning"]
    share = f"{summary['config']['dropped']:.0%}"
    best = max(SUSPICION_SCORES, key=lambda name: cleaning[name]["mean"])
    accuracy = f"{100 * cleaning[best]['mean']:.1f}%"
    if _helps(against[best]):
        text = f"dropping the worst {share} by {best} served best, {accuracy}"
    else:
        text = (
            f"dropping the worst {share} by no score clearly helped; the best, {best}, "
            f"gave {accuracy}"
        )
    return (
        f"Cleaning: {text}, {_difference(against[best], 'dropping nothing')}; dropping exactly "
        f"{FLIPPED} gave {100 * cleaning[FLIPPED]['mean']:.1f}%."
    )


def _best_finder(summary: dict[str, Any]) -> str:
    errors = summary["label_errors"]
    return max(errors, key=lambda name: errors[name]["auroc"]["mean"])


def _helps(change: dict[str, Any]) -> bool:
    return change["mean"] > 0 and change["clear"]


def _difference(change: dict[str, Any], baseline: str) -> str:
    """Put a paired difference into words: '1.2 points below random (within the noise)'."""
    side = "above" if change["mean"] >= 0 else "below"
    noise = "" if change["clear"] else " (within the noise)"
    return f"{100 * abs(change['mean']):.1f} points {side} {baseline}{noise}"


def _mean_over(columns: Iterable[Sequence[float]]) -> list[float]:
    """Average equally long lists entry by entry."""
    return [statistics.fmean(entries) for entries in zip(*columns, strict=True)]
