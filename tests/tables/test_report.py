"""Plots: files that appear, numbers that stand in them, input that is refused."""

from __future__ import annotations

import sys

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score

from moso_fast.tables import report
from moso_fast.tables.table import METRICS, ScoreTable

NAN = float("nan")


@pytest.fixture
def drawn(monkeypatch):
    """Figures in the order in which they were saved."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def record(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return figures


@pytest.fixture
def table(generator):
    rows = 300
    scores = torch.randn(rows, generator=generator)
    scores[5] = torch.nan
    return ScoreTable(
        scores,
        {name: torch.rand(rows, generator=generator) for name in METRICS},
        {"score": torch.randn(4, rows, generator=generator)},
    )


def assert_picture(path):
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert np.unique(pixels[..., :3].reshape(-1, 3), axis=0).shape[0] > 10  # not one blank sheet
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left


@pytest.mark.exhaustive
def test_histogram_shows_every_share(tmp_path, drawn, table):
    groups = {"clean": table.scores, "flipped": table.scores[:100] - 3}
    path = report.score_histogram(groups, tmp_path / "h.png", cut=0.0)
    assert_picture(path)
    axes = drawn[0].axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["clean (n = 299, 1 without)", "flipped (n = 99, 1 without)", "cut at 0"]
    outlines = [patch.get_data().values for patch in axes.patches]
    assert [float(sum(values)) for values in outlines] == pytest.approx([100.0] * 4)


@pytest.mark.exhaustive
def test_histogram_of_outliers_and_of_one_value(tmp_path, drawn):
    scores = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1e6, -1e6])])
    report.score_histogram({"all": scores}, tmp_path / "h.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlim()[1] < 2 and "the outer" in axes.get_xlabel()
    assert float(sum(axes.patches[0].get_data().values)) == pytest.approx(100.0)
    report.score_histogram({"all": torch.zeros(5)}, tmp_path / "h.png")
    assert_picture(tmp_path / "h.png")


def test_pruning_curve_draws_means_and_bands(tmp_path, drawn):
    results = {"MoSo": ([80.0, 90.0], [1.0, 2.0]), "random": ([81.0, 89.0], [0.5, 0.5])}
    assert_picture(report.pruning_curve([0.1, 1.0], results, tmp_path / "p.png"))
    axes = drawn[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["MoSo", "random"]
    assert axes.lines[0].get_xydata().tolist() == [[10.0, 80.0], [100.0, 90.0]]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (79.0, 92.0)


@pytest.mark.exhaustive
def test_extremes_are_the_lowest_and_the_highest(tmp_path, drawn):
    images = torch.arange(30.0)[:, None, None].expand(30, 8, 8)
    scores = torch.randperm(30, generator=torch.Generator().manual_seed(0)).float()
    scores[7] = NAN
    labels = [f"class {i}" for i in range(30)]
    assert_picture(report.extremes(images, labels, scores, tmp_path / "e.png", count=3))
    titles = [axes.get_title() for axes in drawn[0].axes]
    order = [i for i in scores.argsort().tolist() if i != 7]
    wanted = order[:3] + order[::-1][:3]
    assert titles == [f"class {i}\n{float(scores[i]):.2g}" for i in wanted]


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 8, 6), (23, 8, 8, 3)])
def test_extremes_of_few_images_and_of_colour(tmp_path, shape):
    count = shape[0]
    path = report.extremes(
        torch.rand(shape), torch.arange(count), torch.rand(count), tmp_path / "e.png", count=12
    )
    assert_picture(path)


def test_label_error_curve_states_the_auroc(tmp_path, drawn, generator):
    wrong = torch.rand(500, generator=generator) < 0.1
    scores = {
        "good": torch.rand(500, generator=generator) + wrong,
        "blind": torch.zeros(500),
    }
    assert_picture(report.label_error_curve(scores, wrong, tmp_path / "l.png"))
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    expected = roc_auc_score(wrong, scores["good"])
    good = lines[f"good: AUROC {expected:.3f}"]
    assert "blind: AUROC 0.500" in lines
    assert good.get_ydata()[0] == 0 and good.get_ydata()[-1] == pytest.approx(100)
    tenth = scores["good"].argsort(descending=True)[:50]
    assert good.get_ydata()[50] == pytest.approx(100 * float(wrong[tenth].sum() / wrong.sum()))


def test_auroc_is_that_of_scikit_learn(generator):
    for _ in range(20):
        wrong = torch.rand(60, generator=generator) < 0.3
        suspicion = torch.randint(0, 8, (60,), generator=generator).float()  # many ties
        expected = roc_auc_score(wrong, suspicion)
        assert report.auroc(suspicion, wrong) == pytest.approx(expected, abs=1e-12)
    # Samples without a score are the last to be inspected, after those of any other.
    for other in (1.0, -1.0):
        assert report.auroc(torch.tensor([NAN, other]), torch.tensor([True, False])) == 0.0


@pytest.mark.exhaustive
def test_panels_of_metrics(tmp_path, drawn, table):
    table.metrics["loss"] = table.scores.clone()
    table.metrics["entropy"] = torch.full((300,), torch.nan)  # as for the loss "mse"
    assert_picture(report.metric_panels(table, tmp_path / "m.png"))
    titles = {axes.get_xlabel(): axes.get_title(loc="right") for axes in drawn[0].axes}
    assert titles["loss"] == "rank corr. +1.00" and "entropy" not in titles


@pytest.mark.exhaustive
def test_bands_of_checkpoints(tmp_path, drawn, table):
    assert_picture(report.checkpoint_bands(table, tmp_path / "c.png"))
    medians = drawn[0].axes[0].lines[0].get_ydata()
    assert medians == pytest.approx(np.median(table.per_checkpoint["score"].numpy(), axis=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: report.score_histogram({}, p), "no finite score"),
        (lambda p: report.score_histogram({"a": torch.tensor([NAN])}, p), "no finite score"),
        (lambda p: report.pruning_curve([0.1], {}, p), "no method"),
        (
            lambda p: report.pruning_curve([0.1], {"a": ([1.0, 2.0], [0.0, 0.0])}, p),
            r"results\['a'\] must have 1 means",
        ),
        (
            lambda p: report.extremes(torch.zeros(4, 3), [0] * 4, torch.zeros(4), p),
            r"images must be \(N, H, W\)",
        ),
        (
            lambda p: report.extremes(torch.zeros(4, 2, 2), [0] * 3, torch.zeros(4), p),
            "one entry a sample; got 4, 3 and 4",
        ),
        (
            lambda p: report.extremes(torch.zeros(2, 2, 2), [0] * 2, torch.zeros(2), p, count=0),
            "count must be at least 1",
        ),
        (
            lambda p: report.extremes(torch.zeros(1, 2, 2), [0], torch.tensor([NAN]), p),
            "no scored image",
        ),
        (
            lambda p: report.label_error_curve({}, torch.zeros(3).bool(), p),
            "some but not all samples; it marks 0/3",
        ),
        (
            lambda p: report.label_error_curve(
                {"a": torch.zeros(2)}, torch.tensor([True, False, True]), p
            ),
            r"scores_by_name\['a'\] must have shape \(3,\)",
        ),
        (lambda p: report.checkpoint_bands(ScoreTable(torch.zeros(2)), p), "no 'score' per"),
        (lambda p: report.metric_panels(ScoreTable(torch.zeros(2)), p), "no metric with two"),
        (lambda p: report.auroc(torch.zeros(2), torch.ones(2).bool()), "some but not all"),
    ],
)
def test_nothing_to_draw_is_an_error_and_no_file(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "moso-fast\[plot\]"'):
        report.score_histogram({"a": torch.rand(9)}, tmp_path / "h.png")


@pytest.mark.exhaustive
def test_arrays_and_lists_are_drawn_as_tensors_are(tmp_path, drawn, generator):
    scores, wrong = torch.rand(12, generator=generator), torch.arange(12) % 3 == 0
    images, names = torch.rand(12, 4, 4, generator=generator), [f"class {i % 2}" for i in range(12)]
    for kind in (torch.as_tensor, np.asarray, lambda values: values.tolist()):
        report.score_histogram({"all": kind(scores)}, tmp_path / "h.png")
        report.extremes(kind(images), names, kind(scores), tmp_path / "e.png", count=3)
        report.label_error_curve({"score": kind(scores)}, kind(wrong), tmp_path / "c.png")
        assert report.auroc(kind(scores), kind(wrong)) == report.auroc(scores, wrong)
    titles = [[axes.get_title() for axes in figure.axes] for figure in drawn]
    assert titles[:3] == titles[3:6] == titles[6:]
    assert any(title.startswith("class") for title in titles[1])
    lines = [figure.axes[0].lines[0].get_ydata().tolist() for figure in drawn[2::3]]
    assert lines[0] == lines[1] == lines[2]
    with pytest.raises(TypeError, match=r"groups\['all'\] must hold numbers; it holds text"):
        report.score_histogram({"all": names}, tmp_path / "h.png")


@pytest.mark.parametrize(("shown", "scored"), [(1, 1), (1, 3), (2, 5), (9, 19)])
def test_no_image_is_drawn_among_the_lowest_and_the_highest(tmp_path, drawn, shown, scored):
    count = scored + 2
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(1)).float()
    scores[[0, count - 1]] = NAN
    labels = list(range(count))
    report.extremes(torch.rand(count, 4, 4), labels, scores, tmp_path / "e.png", count=10)
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    names = [int(title.splitlines()[0]) for title in titles]
    order = [i for i in scores.argsort().tolist() if 0 < i < count - 1]
    assert names == order[:shown] + order[::-1][:shown]
    assert scored == 1 or len(set(names)) == len(names)


def test_errors_without_a_score_are_found_last(tmp_path, drawn):
    suspicion = torch.tensor([NAN, -3.0, -2.0, -1.0])
    wrong = torch.tensor([True, False, False, False])
    report.label_error_curve({"x": suspicion}, wrong, tmp_path / "l.png")
    line = next(a for a in drawn[0].axes[0].lines if a.get_label() == "x: AUROC 0.000")
    assert line.get_ydata().tolist()[-1] == pytest.approx(100)
    assert max(line.get_ydata().tolist()[:-1]) == 0
