"""What plots share: ranks, ranges, and figures that need no display."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from moso_fast.util.plot import (
    average_rank,
    finite_values,
    inner_range,
    new_axes,
    new_figure,
    rank_correlation,
    save_png,
)


def test_ranks_are_those_of_scipy(generator):
    x = torch.randint(0, 9, (40,), generator=generator)
    y = torch.rand(40, generator=generator) + x
    assert average_rank(x).tolist() == rankdata(x).tolist()
    assert average_rank(x).dtype == torch.float64
    expected = spearmanr(x, y).statistic
    assert rank_correlation(x, y) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(rank_correlation(x, torch.ones(40)))


def test_finite_values_are_flat_and_double():
    given = torch.tensor([[1.0, math.nan], [-math.inf, 2.0]], requires_grad=True)
    found = finite_values(given)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert found.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 2.0], (1.0, 3.0)),
        ([5.0] * 4, (4.995, 5.005)),
        ([-2.0], (-2.002, -1.998)),
        ([0.0, 0.0], (-1e-3, 1e-3)),
        # One outlier on either side of 401 values: the inner 99.5 percent, 2 left out on each.
        ([-1e6, *range(1, 400), 1e6], (2.0, 398.0)),
        # Three times as wide as the inner ones is still drawn whole.
        ([*range(1, 400), 1189.0, 2.0], (1.0, 1189.0)),
        ([*range(1, 400), 1190.1, 2.0], (2.0, 398.0)),
        # Nearly all the same: no inner range to show.
        ([1.0] * 400 + [9.0], (1.0, 9.0)),
    ],
)
def test_range_of_a_plot(values, expected):
    given = torch.tensor([float(value) for value in values], dtype=torch.float64)
    assert inner_range(given) == pytest.approx(expected, abs=1e-12)


def test_figures_have_a_size_and_a_layout_and_are_written_whole(tmp_path):
    figure = new_figure(3.0, 2.0)
    assert figure.get_size_inches().tolist() == [3.0, 2.0]
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    path = save_png(figure, str(tmp_path / "f.png"))
    assert path == tmp_path / "f.png" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    assert imread(path).shape[:2] == (300, 450)  # 150 dots an inch


def test_axes_have_no_frame_above_and_a_grid_below_the_lines():
    figure, axes = new_axes(4.0, 3.0)
    assert figure.axes == [axes] and figure.get_size_inches().tolist() == [4.0, 3.0]
    seen = {side: axes.spines[side].get_visible() for side in ("top", "right", "left", "bottom")}
    assert seen == {"top": False, "right": False, "left": True, "bottom": True}
    assert (
        all(line.get_visible() for line in axes.get_xgridlines()) and axes.get_axisbelow() is True
    )
    assert np.all([line.get_alpha() < 1 for line in axes.get_xgridlines()])
