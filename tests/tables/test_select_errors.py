"""In full, what is said of a selection or a plot that cannot be."""

from __future__ import annotations

import pytest
import torch

from moso_fast.tables import report
from moso_fast.tables.select import apportion, keep_count, select
from moso_fast.tables.table import ScoreTable

NAN = float("nan")
HEADER = "index,score,loss,higher_is_better"


def error_of(call, *arguments, kind=ValueError, **named):
    with pytest.raises(kind) as caught:
        call(*arguments, **named)
    return str(caught.value)


def said_of(path, text):
    path.write_bytes(text.encode())
    return error_of(ScoreTable.load, path).removeprefix(f"{path} is not a score table: ")


def test_selection_in_full():
    assert error_of(select, [1.0, NAN], 2) == (
        "keep=2 asks for 2 samples, but only 1 of 2 have a score"
    )
    assert error_of(select, [1.0], 1, balance="even") == (
        "balance must be None, equal or proportional; got 'even'"
    )
    assert error_of(select, [1.0], 1, method="best") == (
        "method must be one of top, bottom, random, sample; got 'best'"
    )
    assert error_of(select, [[1.0]], 1) == "scores must have shape (N,); got (1, 1)"
    assert error_of(select, torch.ones(1).bool(), 1, kind=TypeError) == (
        "scores must be real numbers; got torch.bool"
    )
    complex_ = torch.ones(1, dtype=torch.complex64)
    said = error_of(select, complex_, 1, kind=TypeError)
    assert said == "scores must be real numbers; got torch.complex64"
    for labels, kind, said in (
        (None, ValueError, "balance needs labels, (N,) integer classes; got None"),
        ([0.5], TypeError, "labels must be integers; got torch.float64"),
        ([True], TypeError, "labels must be integers; got torch.bool"),
        (complex_, TypeError, "labels must be integers; got torch.complex64"),
        ([0, 1], ValueError, "labels must have shape (1,), as scores; got (2,)"),
    ):
        assert error_of(select, [1.0], 1, labels=labels, balance="equal", kind=kind) == said
    for keep, kind in ((True, TypeError), ("0.5", TypeError), (-1, ValueError), (1.5, ValueError)):
        assert error_of(keep_count, keep, 4, kind=kind) == (
            f"keep must be a count (int) or a fraction (float in [0, 1]); got {keep!r}"
        )
    assert error_of(apportion, 6, [1, 0, 2], [2, 9, 3]) == (
        "6 places exceed the capacity 14 of the groups"
    )
    assert apportion(5, [1, 0, 2], [2, 9, 3]) == [2, 0, 3]


def test_plots_in_full(tmp_path):
    path = tmp_path / "p.png"
    one, two = torch.zeros(1), torch.zeros(2)
    for call, arguments, said in (
        (report.score_histogram, ({},), "groups hold no finite score: nothing to draw"),
        (report.pruning_curve, ([0.1], {}), "results hold no method: nothing to draw"),
        (
            report.pruning_curve,
            ([0.1], {"a": ([1.0], [0.0, 0.0])}),
            "results['a'] must have 1 means and deviations, as keeps; got 1 and 2",
        ),
        (
            report.extremes,
            (torch.zeros(1, 2), [0], one),
            "images must be (N, H, W) or (N, H, W, 3); got (1, 2)",
        ),
        (
            report.extremes,
            (torch.zeros(1, 2, 2, 4), [0], one),
            "images must be (N, H, W) or (N, H, W, 3); got (1, 2, 2, 4)",
        ),
        (
            report.extremes,
            (torch.zeros(1, 2, 2), [0], two),
            "images, labels and scores must have one entry a sample; got 1, 1 and 2",
        ),
        (
            report.extremes,
            (torch.zeros(1, 2, 2), [0], one * NAN),
            "scores hold no scored image: nothing to draw",
        ),
        (
            report.label_error_curve,
            ({}, [True, True]),
            "is_error must mark some but not all samples; it marks 2/2",
        ),
        (
            report.label_error_curve,
            ({"a": one}, [True, False]),
            "scores_by_name['a'] must have shape (2,), as is_error; got (1,)",
        ),
        (
            report.metric_panels,
            (ScoreTable(two, {"a": torch.tensor([1.0, NAN])}),),
            "the table has no metric with two finite values: nothing to draw",
        ),
        (
            report.checkpoint_bands,
            (ScoreTable(two),),
            "the table keeps no 'score' per checkpoint: nothing to draw",
        ),
    ):
        assert error_of(call, *arguments, path) == said
    assert error_of(report.extremes, torch.zeros(1, 2, 2), [0], one, path, count=0) == (
        "count must be at least 1; got 0"
    )
    assert error_of(report.auroc, two, [False, False]) == (
        "is_error must mark some but not all samples"
    )
    assert not path.exists()
