"""Plots of one ScoreTable: its metrics against the score, its values per checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..util.plot import COLOURS, GREY, inner_range, new_axes, new_figure, rank_correlation, save_png
from .table import ScoreTable

PathLike = str | os.PathLike[str]


def metric_panels(table: ScoreTable, path: PathLike) -> Path:
    """One panel a metric: its density against the score, with their rank correlation.

    Raises
    ------
    ValueError
        The table has no metric with two finite values.
    ModuleNotFoundError
        matplotlib is missing.
    """
    score = table.scores.double()
    pairs = {}
    for name, values in table.metrics.items():
        both = score.isfinite() & values.isfinite()
        if int(both.sum()) >= 2:
            pairs[name] = (values.double()[both], score[both])
    if not pairs:
        raise ValueError("the table has no metric with two finite values: nothing to draw")
    columns = min(4, len(pairs))
    depth = -(-len(pairs) // columns)
    figure = new_figure(2.9 * columns, 2.7 * depth + 0.4)
    grid = figure.subplots(depth, columns, squeeze=False)
    for axes, (name, (x, y)) in zip(grid.flat, pairs.items(), strict=False):
        x_range, y_range = inner_range(x), inner_range(y)
        axes.hexbin(
            x.clamp(*x_range),
            y.clamp(*y_range),
            gridsize=35,
            bins="log",
            mincnt=1,
            cmap="cividis_r",
            extent=(*x_range, *y_range),
            linewidths=0.1,
        )
        axes.set_title(f"rank corr. {rank_correlation(x, y):+.2f}", fontsize=8, loc="right")
        axes.ticklabel_format(style="sci", scilimits=(-2, 3))
        axes.tick_params(labelsize=7)
        axes.set_xlabel(name, fontsize=8)
    for axes in list(grid.flat)[len(pairs) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("score", fontsize=8)
    figure.suptitle("Score against each metric (darker = more samples, log scale)", fontsize=11)
    return save_png(figure, path)


def checkpoint_bands(table: ScoreTable, path: PathLike, *, name: str = "score") -> Path:
    """Median, quartiles and 5-95% range over samples of one statistic at every checkpoint.

    Raises
    ------
    ValueError
        The table keeps no such statistic per checkpoint.
    ModuleNotFoundError
        matplotlib is missing.
    """
    if name not in table.per_checkpoint:
        raise ValueError(f"the table keeps no {name!r} per checkpoint: nothing to draw")
    values = table.per_checkpoint[name].double()
    # NumPy's, since torch.quantile refuses more than 16 million values.
    bands = np.nanquantile(values.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    figure, axes = new_axes(7.0, 4.2)
    steps = list(range(values.shape[0]))
    axes.fill_between(
        steps, bands[0], bands[4], color=COLOURS[0], alpha=0.15, label="5 to 95% of the samples"
    )
    axes.fill_between(
        steps, bands[1], bands[3], color=COLOURS[0], alpha=0.35, label="25 to 75% of the samples"
    )
    axes.plot(steps, bands[2], color=COLOURS[0], marker="o", label="median")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(steps[:: max(1, len(steps) // 12)])
    axes.set_xlabel("checkpoint, in the order scored")
    axes.set_ylabel("score x learning rate" if name == "score" else name)
    axes.set_title(f"{name} per checkpoint")
    axes.legend(frameon=False)
    return save_png(figure, path)
