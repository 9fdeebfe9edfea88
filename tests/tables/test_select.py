"""Counts, quotas and order of the selection."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moso_fast.tables.select import BALANCES, METHODS, apportion, keep_count, select
from moso_fast.tables.table import ScoreTable

NAN = float("nan")

score_lists = st.lists(
    st.one_of(st.just(NAN), st.integers(-3, 3).map(float)), min_size=1, max_size=40
)


@pytest.mark.parametrize(
    ("keep", "total", "expected"),
    [
        (0.2, 50_000, 10_000),
        (1 - 0.8, 50_000, 10_000),
        (1 - 0.9, 50_000, 5_000),
        (1 - 0.9, 5, 1),  # 0.5 of a sample, although 1 - 0.9 < 0.1 in binary
        (0.1, 5, 1),
        (0.5, 3, 2),
        (0.5, 5, 3),
        (1 / 3, 3, 1),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.0, 10, 0),
        (1.0, 10, 10),
        (1, 10, 1),
        (0, 10, 0),
        (np.int64(7), 10, 7),
        (np.float32(0.2), 50_000, 10_000),
        (torch.tensor(4), 10, 4),
        (0.1, 1_000_000_007, 100_000_001),
    ],
)
def test_keep_count_is_exact_in_decimal(keep, total, expected):
    assert keep_count(keep, total) == expected


@given(st.integers(0, 100), st.integers(0, 10**7))
def test_percentages_round_half_up(percent, total):
    expected = (2 * percent * total + 100) // 200
    assert keep_count(percent / 100, total) == expected
    assert keep_count(1 - (100 - percent) / 100, total) == expected


@pytest.mark.parametrize(
    "keep", [True, False, np.bool_(True), torch.tensor(True), "0.5", None, [1]]
)
def test_keep_of_a_wrong_type_is_refused(keep):
    with pytest.raises(TypeError, match="keep must be a count"):
        select(torch.arange(4.0), keep)


@pytest.mark.parametrize("keep", [-1, -0.1, 1.1, NAN, float("inf")])
def test_keep_out_of_range_is_refused(keep):
    with pytest.raises(ValueError, match="keep must be a count"):
        select(torch.arange(4.0), keep)


@settings(max_examples=200)
@given(
    score_lists,
    st.data(),
    st.sampled_from(METHODS),
    st.sampled_from([None, *BALANCES]),
)
def test_selection_is_exact_unique_sorted_and_scored(values, data, method, balance):
    scores = torch.tensor(values)
    labels = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    )
    valid = [i for i, v in enumerate(values) if v == v]
    keep = data.draw(st.integers(0, len(valid)))
    kept = select(scores, keep, labels=labels, balance=balance, method=method, seed=3)
    assert kept.dtype == torch.int64
    rows = kept.tolist()
    assert rows == sorted(set(rows)) and len(rows) == keep
    assert set(rows) <= set(valid)
    assert torch.equal(
        kept, select(scores, keep, labels=labels, balance=balance, method=method, seed=3)
    )
    if method in ("top", "bottom"):
        groups = [valid] if balance is None else _by_class(valid, labels)
        sign = -1 if method == "top" else 1
        for group in groups:
            inside = sum(i in set(rows) for i in group)
            ranking = sorted(group, key=lambda i: (sign * values[i], i))
            assert sorted(ranking[:inside]) == [i for i in group if i in set(rows)]
    if balance is not None:
        sizes = Counter(labels[valid].tolist())
        shares = Counter(labels[kept].tolist())
        for one in sizes:
            for other in sizes:
                if balance == "equal" and shares[one] < sizes[one]:
                    assert shares[other] <= shares[one] + 1
        if balance == "proportional":
            for name, size in sizes.items():
                assert abs(shares[name] - keep * size / len(valid)) < 1


def _by_class(valid, labels):
    return [[i for i in valid if labels[i] == c] for c in labels.unique().tolist()]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=6), st.data())
def test_apportion_fills_exactly_and_within_capacity(groups, data):
    weights = [w for w, _ in groups]
    capacity = [c for _, c in groups]
    room = sum(c for w, c in groups if w)
    places = data.draw(st.integers(0, room))
    shares = apportion(places, weights, capacity)
    assert sum(shares) == places
    assert all(0 <= s <= c for s, c in zip(shares, capacity, strict=True))
    with pytest.raises(ValueError, match="exceed"):
        apportion(room + 1, weights, capacity)


def test_apportion_by_hand():
    assert apportion(10, [1, 1, 1], [2, 100, 100]) == [2, 4, 4]
    assert apportion(10, [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert apportion(7, [6, 3, 1], [60, 30, 10]) == [4, 2, 1]
    assert apportion(0, [1, 1], [5, 5]) == [0, 0]
    assert apportion(0, [], []) == []


def test_classes_stay_full_where_scores_are_negative():
    # Zero-filling the other classes would hand the places of class 0 to samples of class 1.
    scores = torch.tensor([-5.0, -4.0, -3.0, 1.0, 2.0, 3.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert select(scores, 4, labels=labels, balance="equal").tolist() == [1, 2, 4, 5]


def test_ties_go_to_the_lower_row():
    assert select(torch.zeros(100), 3).tolist() == [0, 1, 2]
    assert select(torch.zeros(100), 3, method="bottom").tolist() == [0, 1, 2]


def test_infinite_scores_are_ranked():
    scores = torch.tensor([float("-inf"), 0.0, float("inf"), NAN])
    assert select(scores, 1).tolist() == [2]
    assert select(scores, 1, method="bottom").tolist() == [0]


def test_sample_prefers_high_ranks_in_the_stated_proportion():
    scores = torch.tensor([30.0, 10.0, 20.0])
    first = Counter(int(select(scores, 1, method="sample", seed=seed)) for seed in range(3000))
    # Ranks 3, 1, 2 of 6: 1500, 500 and 1000 draws; 5 standard deviations are below 140.
    for row, expected in enumerate((1500, 500, 1000)):
        assert abs(first[row] - expected) < 140


def test_sample_treats_ties_alike():
    first = Counter(
        int(select(torch.zeros(2), 1, method="sample", seed=seed)) for seed in range(1000)
    )
    assert abs(first[0] - 500) < 80


def test_random_ignores_values_and_heeds_the_seed():
    scores = torch.arange(200.0)
    one = select(scores, 50, method="random", seed=1)
    assert torch.equal(one, select(-scores, 50, method="random", seed=1))
    assert not torch.equal(one, select(scores, 50, method="random", seed=2))
    state = torch.get_rng_state()
    select(scores, 50, method="random")
    assert torch.equal(state, torch.get_rng_state())


def test_table_gives_data_set_indices_and_heeds_direction():
    table = ScoreTable(torch.tensor([1.0, 2.0, 3.0]), index=torch.tensor([30, 20, 10]))
    assert select(table, 2).tolist() == [10, 20]
    table.higher_is_better = False
    assert select(table, 2).tolist() == [20, 30]


@pytest.mark.parametrize(
    "scores",
    [
        np.array([0.5, np.nan, 2.0, 1.0]),
        np.array([0.5, np.nan, 2.0, 1.0], dtype=">f4"),
        np.array([1.0, 2.0, np.nan, 0.5])[::-1],
        [0.5, NAN, 2.0, 1.0],
        (0.5, NAN, 2.0, 1.0),
        [torch.tensor(0.5), torch.tensor(NAN), torch.tensor(2.0), torch.tensor(1.0)],
    ],
)
def test_arrays_and_lists_are_scores_too(scores):
    assert select(scores, 2).tolist() == [2, 3]
    for labels in (
        [0, 0, 1, 1],
        np.array([0, 0, 1, 1], dtype=np.uint16),
        torch.tensor([0, 0, 1, 1]),
    ):
        assert select(scores, 2, labels=labels, balance="equal").tolist() == [0, 2]


def test_lists_of_floats_are_ranked_in_full_precision():
    assert select([1.0, 1.0 + 1e-12], 1).tolist() == [1]


def test_labels_of_a_table_that_lost_rows_may_be_those_of_the_data_set():
    table = ScoreTable(torch.tensor([1.0, 2.0, 3.0, 4.0]), index=torch.tensor([9, 1, 5, 3]))
    whole = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0, 1])  # of 10 samples: rows 1, 1, 0, 0
    assert select(table, 2, labels=whole, balance="equal").tolist() == [1, 3]
    assert select(table, 2, labels=whole[table.index], balance="equal").tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), as scores; got \(9,\)"):
        select(table, 2, labels=whole[:9], balance="equal")


def test_labels_that_could_be_in_two_orders_give_a_warning():
    table = ScoreTable(torch.tensor([1.0, 2.0, 3.0, 4.0]), index=torch.tensor([3, 2, 1, 0]))
    labels = torch.tensor([1, 0, 0, 0])
    with pytest.warns(UserWarning, match=r"give labels\[table.index\] if") as seen:
        assert select(table, 2, labels=labels, balance="equal").tolist() == [0, 3]
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(table, 2, labels=labels)  # without quotas they are not looked at
        in_order = ScoreTable(table.scores)
        assert select(in_order, 2, labels=labels, balance="equal").tolist() == [0, 3]
        fewer = ScoreTable(table.scores, index=torch.tensor([7, 2, 1, 0]))
        assert select(fewer, 2, labels=labels, balance="equal").tolist() == [0, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes(dtype):
    assert select(torch.tensor([3, 1, 2], dtype=dtype), 2).tolist() == [0, 2]


def test_scores_that_require_grad_and_empty_ones():
    assert select(torch.tensor([1.0, 2.0], requires_grad=True), 1).tolist() == [1]
    assert select(torch.empty(0), 0).tolist() == []
    empty = torch.empty(0, dtype=torch.int64)
    assert select(torch.empty(0), 0.5, labels=empty, balance="equal").tolist() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 4}, ValueError, "asks for 4 samples, but only 3 of 4 have a score"),
        ({"keep": 1.0}, ValueError, "only 3 of 4 have a score"),
        ({"method": "best"}, ValueError, "method must be one of top, bottom, random, sample"),
        ({"balance": "even"}, ValueError, "balance must be None, equal or proportional"),
        ({"balance": "equal"}, ValueError, "balance needs labels"),
        ({"balance": "equal", "labels": torch.zeros(3).long()}, ValueError, r"shape \(4,\)"),
        ({"balance": "equal", "labels": torch.zeros(4)}, TypeError, "labels must be integers"),
        (
            {"scores": {1.0, 2.0}},
            TypeError,
            "scores must be a torch.Tensor, an array, a pandas col",
        ),
        ({"scores": ["a", "b"]}, TypeError, "scores must hold numbers; it holds text"),
        ({"scores": [1.0, None]}, TypeError, r"Python objects \(None at \[1\]\)"),
        ({"labels": ["cat"] * 4, "balance": "equal"}, TypeError, "labels must hold numbers; it ho"),
        ({"scores": torch.zeros(2, 2)}, ValueError, r"scores must have shape \(N,\)"),
        ({"scores": torch.zeros(4).bool()}, TypeError, "scores must be real numbers"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, error, message):
    call = {"scores": torch.tensor([1.0, NAN, 2.0, 3.0]), "keep": 1, **arguments}
    with pytest.raises(error, match=message) as caught:
        select(call.pop("scores"), call.pop("keep"), **call)
    assert "\n" not in str(caught.value)


def test_sample_gives_tied_scores_the_mean_of_their_ranks():
    """Nine tied scores have rank 5 each, the one above them 10: it is drawn 10 times in 55."""
    scores = torch.tensor([0.0] * 9 + [1.0])
    drawn = Counter(int(select(scores, 1, method="sample", seed=seed)) for seed in range(3000))
    deviation = (3000 * 10 / 55 * 45 / 55) ** 0.5
    assert abs(drawn[9] - 3000 * 10 / 55) < 4 * deviation
