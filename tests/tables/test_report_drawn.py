"""What the plots of scores and of pruning draw: numbers, labels, colours and places, by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from moso_fast.tables import plots, report
from moso_fast.tables.table import ScoreTable
from moso_fast.util.plot import COLOURS, GREY, MARKERS

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def drawn(monkeypatch):
    """Figures in the order in which they would be written; writing them takes the time."""
    figures = []

    def keep(figure, path):
        figures.append(figure)
        return Path(path)

    monkeypatch.setattr(report, "save_png", keep)
    monkeypatch.setattr(plots, "save_png", keep)
    return figures


def colour(artist):
    """Colour of a line or of the edge of a patch."""
    return to_hex(artist.get_color() if hasattr(artist, "get_color") else artist.get_edgecolor())


def hexes(colours):
    return [to_hex(one) for one in colours]


def texts(axes):
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def outline(band):
    """Lower and upper line of what fill_between filled: a dictionary each, x -> y."""
    corners = band.get_paths()[0].vertices.tolist()
    places = sorted({x for x, _ in corners})
    return tuple(
        {x: edge(y for at, y in corners if at == x) for x in places} for edge in (min, max)
    )


def histogram(figure):
    """Filled and drawn outline of each group, as (edges, shares)."""
    found = [(p.get_data().edges, p.get_data().values, p) for p in figure.axes[0].patches]
    for (edges, values, filled), (same, as_filled, line) in itertools.pairwise(found):
        if filled.get_fill() and not line.get_fill():
            assert np.array_equal(edges, same) and np.array_equal(values, as_filled)
            assert to_hex(filled.get_facecolor()) == to_hex(line.get_edgecolor())
    return [one for one in found if not one[2].get_fill()]


def test_histogram_counts_by_hand(drawn):
    groups = {
        "a": torch.tensor([0.0, 0.0, 0.5, 60.0]),
        "none": [NAN, INF],
        "b": torch.tensor([30.5, NAN, -INF]),
    }
    assert report.score_histogram(groups, "h.png", cut=12.345) == Path("h.png")
    axes = drawn[0].axes[0]
    (edges, first, a), (_, second, b) = histogram(drawn[0])
    assert edges.tolist() == pytest.approx(list(range(61)), abs=1e-12)
    assert first.tolist() == pytest.approx([75.0] + [0.0] * 58 + [25.0])
    assert second.tolist() == pytest.approx([0.0] * 30 + [100.0] + [0.0] * 29)
    assert [colour(a), colour(b)] == hexes([COLOURS[0], COLOURS[2]])
    assert [patch.get_fill() for patch in axes.patches] == [True, False] * 2
    assert all(patch.get_alpha() < 0.5 for patch in axes.patches[::2])
    assert legend(axes) == ["a (n = 4)", "b (n = 1, 2 without)", "cut at 12.3"]
    assert texts(axes) == ("Scores", "score (high = informative = keep)", "share of the group [%]")
    assert axes.get_ylim()[0] == 0
    (line,) = axes.lines
    assert line.get_xdata() == [12.345, 12.345] and colour(line) == "#000000"
    assert line.get_linestyle() == "--"


def test_histogram_texts_large_numbers_and_outliers(drawn):
    inner, many = torch.linspace(0, 1, 2001), torch.full((1500,), NAN)
    scores = torch.cat([inner, torch.tensor([1e6, -1e6]), many])
    report.score_histogram({"all": scores}, "h.png", title="T", xlabel="X")
    axes = drawn[0].axes[0]
    assert legend(axes) == ["all (n = 2,003, 1,500 without)"]
    # 0.5% of 2003 values are left out on either side: 10, of which one is the outlier.
    assert texts(axes)[:2] == ("T", "X; the outer 20 stand in the end bins")
    ((edges, values, _),) = histogram(drawn[0])
    assert [edges[0], edges[-1]] == pytest.approx([9 / 2000, 1991 / 2000])
    assert float(sum(values)) == pytest.approx(100)
    assert values[0] > values[1] + 9 / 20.03 and values[-1] > values[-2] + 9 / 20.03


@pytest.mark.parametrize(("cut", "lines"), [(0, 1), (4, 1), (-0.01, 0), (4.01, 0), (None, 0)])
def test_a_cut_is_drawn_within_the_range_of_the_scores(drawn, cut, lines):
    report.score_histogram({"a": torch.arange(5.0)}, "h.png", cut=cut)
    assert len(drawn[0].axes[0].lines) == lines


def test_colours_and_markers_begin_again(drawn):
    names = [f"m{k}" for k in range(len(COLOURS) + 2)]
    expected = hexes(COLOURS[k % len(COLOURS)] for k in range(len(names)))
    report.score_histogram({name: torch.arange(3.0) for name in names}, "h.png")
    assert [colour(patch) for _, _, patch in histogram(drawn[0])] == expected
    report.pruning_curve([0.5], {name: ([1.0], [0.0]) for name in names}, "p.png")
    report.label_error_curve({n: [1.0, 2.0] for n in names}, [True, False], "l.png")
    for figure in drawn[1:]:
        lines = figure.axes[0].lines[: len(names)]
        assert [colour(line) for line in lines] == expected
        markers = [MARKERS[k % len(MARKERS)] for k in range(len(names))]
        assert [line.get_marker() for line in lines] == markers


def test_pruning_curve_in_full(drawn):
    results = {"MoSo": ([80, 90.5], [1, 2]), "Random": ([70, 89], [0.5, 0.25])}
    report.pruning_curve([0.25, 1], results, "p.png")
    axes = drawn[0].axes[0]
    moso, random = axes.lines
    assert moso.get_xydata().tolist() == [[25.0, 80.0], [100.0, 90.5]]
    assert random.get_xydata().tolist() == [[25.0, 70.0], [100.0, 89.0]]
    bands = [outline(band) for band in axes.collections]
    assert bands[0] == ({25.0: 79.0, 100.0: 88.5}, {25.0: 81.0, 100.0: 92.5})
    assert bands[1] == ({25.0: 69.5, 100.0: 88.75}, {25.0: 70.5, 100.0: 89.25})
    # What prunes at random is set apart.
    assert [colour(moso), colour(random)] == hexes([COLOURS[0], GREY])
    assert [moso.get_linestyle(), random.get_linestyle()] == ["-", "--"]
    faces = [to_hex(band.get_facecolor()[0]) for band in axes.collections]
    assert faces == hexes([COLOURS[0], GREY])
    assert all(band.get_alpha() < 0.5 for band in axes.collections)
    assert axes.get_xticks().tolist() == [25, 100] and legend(axes) == ["MoSo", "Random"]
    named = "test accuracy [%] (band: ±1 std)"
    assert texts(axes) == ("Accuracy after pruning", "training data kept [%]", named)
    report.pruning_curve([0.25, 1], results, "p.png", title="T", ylabel="Y")
    assert texts(drawn[1].axes[0])[::2] == ("T", "Y (band: ±1 std)")


def places(figure):
    """Row and column -> axes."""
    found = [(axes.get_subplotspec(), axes) for axes in figure.axes]
    return {(spec.rowspan.start, spec.colspan.start): axes for spec, axes in found}


def test_extremes_in_full(drawn):
    """24 images: 12 and 12, in two rows of ten and two each."""
    images = 10 + torch.arange(24.0)[:, None, None].expand(24, 2, 3)
    labels = torch.arange(24) + 100
    report.extremes(images, labels, torch.arange(24.0) / 4, "e.png", count=30)
    at = places(drawn[0])
    assert set(at) == set(itertools.product(range(4), range(10)))
    lowest, highest = list(range(12)), list(range(23, 11, -1))
    for first, samples in ((0, lowest), (2, highest)):
        for number, sample in enumerate(samples):
            axes = at[first + number // 10, number % 10]
            assert axes.get_title() == f"{100 + sample}\n{sample / 4:.2g}"
            (picture,) = axes.images
            assert picture.get_array().shape == (2, 3) and picture.get_clim() == (0, 1)
            assert picture.get_cmap().name == "gray_r"
            assert float(picture.get_array()[0, 0]) == pytest.approx(sample / 23)
        assert not any(at[first + 1, column].images for column in range(2, 10))
    said = {place: [text.get_text() for text in axes.texts] for place, axes in at.items()}
    assert {place: found for place, found in said.items() if found} == {
        (0, 0): ["lowest"],
        (2, 0): ["highest"],
    }
    assert not any(axes.axison for axes in at.values())
    assert drawn[0].get_suptitle() == "Lowest and highest scores (above each image: label, score)"


def test_extremes_scale_only_what_is_shown(drawn):
    """One image of each kind: the others' pixels do not count, and a flat one is drawn as 0."""
    images = torch.tensor([5.0, 1000.0, 9.0]).reshape(3, 1, 1).expand(3, 2, 2)
    report.extremes(images, ["a", "b", "c"], [1.0, 2.0, 3.0], "e.png", count=1, title="T")
    assert [axes.get_title() for axes in drawn[0].axes] == ["a\n1", "c\n3"]
    assert [axes.images[0].get_array().max() for axes in drawn[0].axes] == [0.0, 1.0]
    assert drawn[0].get_suptitle() == "T (above each image: label, score)"
    report.extremes(torch.full((2, 4, 4, 3), 7), "ab", [2.0, 1.0], "e.png")
    pictures = [axes.images[0].get_array() for axes in drawn[1].axes]
    assert [picture.shape for picture in pictures] == [(4, 4, 3)] * 2
    assert [axes.get_title() for axes in drawn[1].axes] == ["b\n1", "a\n2"]
    assert not any(picture.any() for picture in pictures)


def test_extremes_are_ten_of_each_kind(drawn):
    report.extremes(torch.rand(30, 2, 2), range(30), torch.arange(30.0), "e.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    expected = [*range(10), *range(29, 19, -1)]
    assert titles == [f"{k}\n{k:.2g}" for k in expected]


def test_label_error_curve_in_full(drawn):
    scores = {"good": [0.9, 0.1, NAN, 0.5], "bad": torch.tensor([1.0, 3.0, 2.0, 0.0])}
    report.label_error_curve(scores, [True, False, False, True], "l.png")
    axes = drawn[0].axes[0]
    good, bad, best, chance = axes.lines
    inspected = [0.0, 25.0, 50.0, 75.0, 100.0]
    for line, found in ((good, [0, 50, 100, 100, 100]), (bad, [0, 0, 0, 50, 100])):
        assert line.get_xdata().tolist() == inspected and line.get_ydata().tolist() == found
    assert best.get_xydata().tolist() == [[0, 0], [50, 100], [100, 100]]
    assert chance.get_xydata().tolist() == [[0, 0], [100, 100]]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", ":", "--"]
    assert [colour(line) for line in axes.lines] == hexes([*COLOURS[:2], GREY, GREY])
    assert legend(axes) == [
        "good: AUROC 1.000",
        "bad: AUROC 0.000",
        "best possible",
        "by chance",
    ]
    assert texts(axes) == (
        "Finding label errors",
        "data inspected, most suspicious first [%]",
        "label errors found [% of 2]",
    )
    assert axes.get_xlim() == (0, 100) and axes.get_ylim() == (0, 102)


def test_label_error_curve_of_many(drawn):
    """A marker at every tenth place, those of each line a little further; ties in their order."""
    wrong = torch.arange(6000) % 4 == 0
    report.label_error_curve({"a": torch.zeros(6000), "b": -wrong.int()}, wrong, "l.png", title="T")
    axes = drawn[0].axes[0]
    assert texts(axes)[::2] == ("T", "label errors found [% of 1,500]")
    assert [line.get_markevery() for line in axes.lines[:2]] == [(0, 600), (100, 600)]
    assert axes.lines[0].get_ydata()[:6].tolist() == pytest.approx(
        [0, *[100 / 1500] * 4, 200 / 1500]
    )
    assert axes.lines[1].get_ydata()[4500:4502].tolist() == pytest.approx([0, 100 / 1500])
    assert axes.lines[2].get_xdata().tolist() == [0, 25, 100]


def test_metric_panels_in_full(drawn):
    """Five panels, four in a row; each is of the samples that have both numbers."""
    scores = torch.tensor([NAN, 0.0, 1.0, 2.0, 3.0, INF])
    rising = torch.tensor([9.0, 0.0, 10.0, 20.0, 30.0, 9.0])
    metrics = {name: rising + k for k, name in enumerate(["a", "b", "c", "d"])}
    metrics["falling"] = torch.tensor([0.0, NAN, INF, 5.0, 4.0, 0.0])
    metrics["of one"] = torch.tensor([1.0, 1.0, NAN, NAN, NAN, 1.0])
    plots.metric_panels(ScoreTable(scores, metrics), "m.png")
    at = places(drawn[0])
    assert set(at) == set(itertools.product(range(2), range(4)))
    shown = [at[0, k] for k in range(4)] + [at[1, 0]]
    assert [axes.get_xlabel() for axes in shown] == ["a", "b", "c", "d", "falling"]
    assert [axes.get_title(loc="right") for axes in shown] == [
        *["rank corr. +1.00"] * 4,
        "rank corr. -1.00",
    ]
    assert [at[place].get_ylabel() for place in sorted(at)] == ["score", "", "", ""] * 2
    assert [axes.axison for axes in at.values()] == [axes in shown for axes in at.values()]
    for axes, samples, x, y in ((at[0, 1], 4, (1, 31), (0, 3)), (at[1, 0], 2, (4, 5), (2, 3))):
        (density,) = axes.collections
        assert density.get_array().tolist() == [1] * samples, "empty places stay blank"
        assert type(density.norm).__name__ == "LogNorm" and density.get_cmap().name == "cividis_r"
        limits = (*axes.dataLim.intervalx, *axes.dataLim.intervaly)
        assert limits == pytest.approx((*x, *y))
        assert density.get_paths()[0].get_extents().width < (x[1] - x[0]) / 30
    expected = "Score against each metric (darker = more samples, log scale)"
    assert drawn[0].get_suptitle() == expected


def test_metric_panels_hold_outliers_at_the_edge(drawn):
    scores = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1e6])])
    metric = torch.cat([torch.tensor([-1e6]), torch.linspace(0, 1, 1000)])
    plots.metric_panels(ScoreTable(scores, {"loss": metric}), "m.png")
    (axes,) = drawn[0].axes
    limits = np.array([*axes.dataLim.intervalx, *axes.dataLim.intervaly])
    assert limits == pytest.approx([0, 1, 0, 1], abs=0.01)
    assert sum(axes.collections[0].get_array()) == 1001


def test_checkpoint_bands_in_full(drawn):
    """Of the numbers 0 to 100, the quantiles are what they are called; NaN is left out."""
    values = torch.stack([k + torch.arange(101.0) for k in range(30)])
    values = torch.cat([values, torch.full((30, 1), NAN)], 1)
    order = torch.randperm(102, generator=torch.Generator().manual_seed(0))
    table = ScoreTable(torch.zeros(102), per_checkpoint={"score": values[:, order], "loss": values})
    plots.checkpoint_bands(table, "c.png")
    axes = drawn[0].axes[0]
    median, zero = axes.lines
    assert median.get_xdata().tolist() == list(range(30)) and median.get_marker() == "o"
    assert median.get_ydata().tolist() == [k + 50 for k in range(30)]
    assert zero.get_ydata() == [0, 0] and colour(zero) == to_hex(GREY)
    for band, (low, high) in zip(axes.collections, ((5, 95), (25, 75)), strict=True):
        lower, upper = outline(band)
        assert lower == pytest.approx({k: k + low for k in range(30)})
        assert upper == pytest.approx({k: k + high for k in range(30)})
        assert to_hex(band.get_facecolor()[0]) == to_hex(COLOURS[0])
    wide, narrow = axes.collections
    assert wide.get_alpha() < narrow.get_alpha() < 0.5 and colour(median) == to_hex(COLOURS[0])
    assert legend(axes) == ["5 to 95% of the samples", "25 to 75% of the samples", "median"]
    assert axes.get_xticks().tolist() == list(range(0, 30, 2))
    named = ("checkpoint, in the order scored", "score x learning rate")
    assert texts(axes) == ("score per checkpoint", *named)
    plots.checkpoint_bands(table, "c.png", name="loss")
    assert texts(drawn[1].axes[0])[::2] == ("loss per checkpoint", "loss")


def test_ticks_of_few_checkpoints(drawn):
    table = ScoreTable(torch.zeros(3), per_checkpoint={"score": torch.rand(4, 3)})
    plots.checkpoint_bands(table, "c.png")
    assert drawn[0].axes[0].get_xticks().tolist() == [0, 1, 2, 3]
