"""Plots of scores and of what pruning by them did; PNG files, no display, no global state.

Colours are those of Okabe and Ito, told apart by all common forms of colour vision; lines differ
by marker too. Every function writes one file, whole or not at all, and returns its path. Where
tensors are meant, arrays, columns of pandas and lists are taken too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..util.array_like import as_tensor
from ..util.plot import (
    COLOURS,
    GREY,
    MARKERS,
    average_rank,
    finite_values,
    inner_range,
    new_axes,
    new_figure,
    save_png,
)
from .plots import checkpoint_bands, metric_panels

__all__ = [
    "auroc",
    "checkpoint_bands",
    "extremes",
    "label_error_curve",
    "metric_panels",
    "pruning_curve",
    "score_histogram",
]

PathLike = str | os.PathLike[str]


def score_histogram(
    groups: Mapping[str, Any],
    path: PathLike,
    *,
    title: str = "Scores",
    xlabel: str = "score (high = informative = keep)",
    cut: float | None = None,
) -> Path:
    """Histogram of one or several groups of scores over common bins, as shares of each group.

    Parameters
    ----------
    groups
        Legend name -> (N,) scores; NaN and infinite ones are left out and counted in the legend.
    path
        The .png to write.
    title, xlabel
        Texts; the unit of a MoSo score is a loss difference.
    cut
        Draws a line at this score, such as the lowest one kept.

    Raises
    ------
    ValueError
        No group, or none with a finite score.
    ModuleNotFoundError
        matplotlib is missing (``pip install "moso-fast[plot]"``).
    """
    groups = {name: as_tensor(f"groups[{name!r}]", values) for name, values in groups.items()}
    finite = {name: finite_values(values) for name, values in groups.items()}
    everything = torch.cat([*finite.values()]) if finite else torch.empty(0, device="cpu")
    if not everything.numel():
        raise ValueError("groups hold no finite score: nothing to draw")
    figure, axes = new_axes(7.0, 4.2)
    low, high = inner_range(everything)
    outside = int(((everything < low) | (everything > high)).sum())
    edges = torch.linspace(low, high, 61, dtype=torch.float64, device="cpu")
    for number, (name, values) in enumerate(finite.items()):
        if not values.numel():
            continue
        counts = torch.histogram(values.clamp(low, high), edges).hist / values.numel() * 100
        missing = groups[name].numel() - values.numel()
        label = f"{name} (n = {values.numel():,}{f', {missing:,} without' if missing else ''})"
        colour = COLOURS[number % len(COLOURS)]
        axes.stairs(counts, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(counts, edges, color=colour, linewidth=1.6, label=label)
    if cut is not None and low <= cut <= high:
        axes.axvline(cut, color="black", linestyle="--", linewidth=1.2, label=f"cut at {cut:.3g}")
    axes.set_xlabel(xlabel + (f"; the outer {outside:,} stand in the end bins" if outside else ""))
    axes.set_ylabel("share of the group [%]")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save_png(figure, path)


def pruning_curve(
    keeps: Sequence[float],
    results: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: PathLike,
    *,
    title: str = "Accuracy after pruning",
    ylabel: str = "test accuracy [%]",
) -> Path:
    """Accuracy over the share of the data kept, with a band of one standard deviation.

    Parameters
    ----------
    keeps
        Fractions kept, in (0, 1].
    results
        Method -> (means, standard deviations) in the unit of ``ylabel``, one a fraction.
    path
        The .png to write.
    title, ylabel
        Texts.

    Raises
    ------
    ValueError
        No method, or a method with another number of values than ``keeps``.
    ModuleNotFoundError
        matplotlib is missing.
    """
    if not results:
        raise ValueError("results hold no method: nothing to draw")
    for name, (means, deviations) in results.items():
        if not len(keeps) == len(means) == len(deviations):
            raise ValueError(
                f"results[{name!r}] must have {len(keeps)} means and deviations, as keeps; "
                f"got {len(means)} and {len(deviations)}"
            )
    figure, axes = new_axes(7.0, 4.6)
    shares = [100 * float(keep) for keep in keeps]
    for number, (name, (means, deviations)) in enumerate(results.items()):
        plain = name.lower() == "random"
        colour = GREY if plain else COLOURS[number % len(COLOURS)]
        mean = [float(value) for value in means]
        width = [float(value) for value in deviations]
        axes.fill_between(
            shares,
            [m - d for m, d in zip(mean, width, strict=True)],
            [m + d for m, d in zip(mean, width, strict=True)],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            shares,
            mean,
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            linestyle="--" if plain else "-",
            label=name,
        )
    axes.set_xticks(shares)
    axes.set_xlabel("training data kept [%]")
    axes.set_ylabel(f"{ylabel} (band: ±1 std)")
    axes.set_title(title)
    axes.legend(frameon=False)
    return save_png(figure, path)


def extremes(
    images: Any,
    labels: Any,
    scores: Any,
    path: PathLike,
    *,
    count: int = 10,
    title: str = "Lowest and highest scores",
) -> Path:
    """Draw the images with the lowest (upper rows) and the highest (lower rows) scores.

    Parameters
    ----------
    images
        (N, H, W) grey or (N, H, W, 3) colour images, any real dtype; scaled over the whole set.
    labels
        N labels, printed above each image with its score.
    scores
        (N,); NaN is left out.
    path
        The .png to write.
    count
        Images of each kind, at least 1; fewer are drawn where there are fewer.
    title
        Text.

    Raises
    ------
    ValueError
        Shapes that disagree, ``count`` below 1, or no scored image.
    ModuleNotFoundError
        matplotlib is missing.
    """
    images, scores = as_tensor("images", images), as_tensor("scores", scores)
    labels = labels if isinstance(labels, Tensor) else list(labels)  # by position, text too
    colour = images.dim() == 4 and images.shape[-1] == 3
    if not colour and images.dim() != 3:
        raise ValueError(f"images must be (N, H, W) or (N, H, W, 3); got {tuple(images.shape)}")
    if not images.shape[0] == len(labels) == scores.shape[0]:
        raise ValueError(
            f"images, labels and scores must have one entry a sample; got {images.shape[0]}, "
            f"{len(labels)} and {scores.shape[0]}"
        )
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    scored = (~scores.isnan()).nonzero().flatten().cpu()
    order = scored[scores.detach().cpu()[scored].argsort(stable=True)]
    count = min(count, order.numel() // 2 or order.numel())
    if not count:
        raise ValueError("scores hold no scored image: nothing to draw")
    lowest, highest = order[:count], order.flip(0)[:count]
    columns = min(count, 10)
    depth = -(-count // columns)
    figure = new_figure(max(1.0 * columns, 4.0), 1.35 * 2 * depth + 0.9)
    grid = figure.subplots(2 * depth, columns, squeeze=False)
    pixels = images.detach().cpu().double()
    shown = pixels[torch.cat([lowest, highest])]
    low, high = float(shown.min()), float(shown.max())
    for kind, rows in enumerate((lowest.tolist(), highest.tolist())):
        for position in range(depth * columns):
            axes = grid[kind * depth + position // columns][position % columns]
            axes.set_axis_off()
            if position >= len(rows):
                continue
            sample = rows[position]
            picture = (pixels[sample] - low) / ((high - low) or 1.0)
            axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"{_text(labels[sample])}\n{float(scores[sample]):.2g}", fontsize=8)
            if position == 0:
                axes.text(
                    -0.25,
                    0.5,
                    ("lowest", "highest")[kind],
                    transform=axes.transAxes,
                    rotation=90,
                    ha="right",
                    va="center",
                    fontsize=10,
                )
    figure.suptitle(f"{title} (above each image: label, score)", fontsize=11)
    return save_png(figure, path)


def label_error_curve(
    scores_by_name: Mapping[str, Any],
    is_error: Any,
    path: PathLike,
    *,
    title: str = "Finding label errors",
) -> Path:
    """Share of the label errors found over the share of the data inspected, worst first.

    Parameters
    ----------
    scores_by_name
        Legend name -> (N,) suspicion, high = suspicious (negate a MoSo score and a margin); NaN is
        inspected last. The area under the ROC curve stands in the legend.
    is_error
        (N,) bool.
    path
        The .png to write.
    title
        Text.

    Raises
    ------
    ValueError
        Shapes that disagree, no error or nothing else in ``is_error``.
    ModuleNotFoundError
        matplotlib is missing.
    """
    truth = as_tensor("is_error", is_error).detach().cpu().bool()
    errors, total = int(truth.sum()), truth.numel()
    if not 0 < errors < total:
        raise ValueError(f"is_error must mark some but not all samples; it marks {errors}/{total}")
    figure, axes = new_axes(7.0, 4.6)
    inspected = torch.arange(total + 1, dtype=torch.float64, device="cpu") * 100 / total
    for number, (name, given) in enumerate(scores_by_name.items()):
        values = as_tensor(f"scores_by_name[{name!r}]", given)
        if values.shape != truth.shape:
            raise ValueError(
                f"scores_by_name[{name!r}] must have shape {tuple(truth.shape)}, as is_error; "
                f"got {tuple(values.shape)}"
            )
        suspicion = values.detach().cpu().double().nan_to_num(nan=-torch.inf)
        order = suspicion.argsort(stable=True, descending=True)
        found = torch.cat([torch.zeros(1, device="cpu"), truth[order].cumsum(0)]) * 100 / errors
        axes.plot(
            inspected,
            found,
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.8,
            marker=MARKERS[number % len(MARKERS)],
            markevery=(number * total // 60, max(1, total // 10)),
            markersize=5,
            label=f"{name}: AUROC {auroc(suspicion, truth):.3f}",
        )
    share = 100 * errors / total
    axes.plot([0, share, 100], [0, 100, 100], color=GREY, linestyle=":", label="best possible")
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="by chance")
    axes.set_xlabel("data inspected, most suspicious first [%]")
    axes.set_ylabel(f"label errors found [% of {errors:,}]")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_title(title)
    axes.legend(frameon=False, loc="lower right")
    return save_png(figure, path)


def auroc(suspicion: Any, is_error: Any) -> float:
    """Probability that an error is more suspicious than a correct sample; a tie counts 1/2.

    Raises
    ------
    ValueError
        ``is_error`` marks none or all of the samples.
    """
    truth = as_tensor("is_error", is_error).detach().cpu().bool()
    errors = int(truth.sum())
    if not 0 < errors < truth.numel():
        raise ValueError("is_error must mark some but not all samples")
    values = as_tensor("suspicion", suspicion).detach().cpu().double().nan_to_num(nan=-torch.inf)
    wins = float(average_rank(values)[truth].sum()) - errors * (errors + 1) / 2
    return wins / (errors * (truth.numel() - errors))


def _text(label: Any) -> str:
    return str(label.item()) if isinstance(label, Tensor) else str(label)
