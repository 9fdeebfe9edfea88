"""What every plot shares: figures without a display, colours, ranges, ranks, atomic PNG files.

Colours are those of Okabe and Ito, told apart by all common forms of colour vision.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8A8A8A"


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, NaN where either side is constant."""
    return float(torch.corrcoef(torch.stack([average_rank(x), average_rank(y)]))[0, 1])


def average_rank(values: Tensor) -> Tensor:
    """Float64 ranks from 1, ascending; equal values share their mean rank."""
    _, level, sizes = values.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(0).double() - (sizes - 1) / 2)[level]


def finite_values(values: Tensor) -> Tensor:
    """Finite values, flat, float64, on the CPU."""
    flat = values.detach().cpu().double().flatten()
    return flat[flat.isfinite()]


def inner_range(values: Tensor) -> tuple[float, float]:
    """Range of a plot: all values, or 0.5 to 99.5% where few outliers would squeeze the rest."""
    ordered = values.double().sort().values
    last = ordered.numel() - 1
    low, high = float(ordered[0]), float(ordered[-1])
    inner_low, inner_high = float(ordered[last // 200]), float(ordered[last - last // 200])
    if high - low > 3 * (inner_high - inner_low) > 0:
        low, high = inner_low, inner_high
    if not high > low:
        margin = abs(low) * 1e-3 or 1e-3
        low, high = low - margin, high + margin
    return low, high


def new_figure(width: float, height: float) -> Any:
    """Empty figure, sizes in inches; ModuleNotFoundError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "moso-fast[plot]"') from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """Figure and its only axes, in the style of the project."""
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def save_png(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write ``figure`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
