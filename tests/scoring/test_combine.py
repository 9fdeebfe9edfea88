"""Parts scored against their own mean, and the combination of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moso_fast.core.formulas import FORMULAS
from moso_fast.functional import last_layer_stats
from moso_fast.scoring import parts as parts_module
from moso_fast.scoring.combine import combine_checkpoints
from moso_fast.scoring.mapped import head_problem
from moso_fast.scoring.parts import FIELDS, part_stats, split_parts, with_scores

N, D, C, K = 60, 7, 5, 3


@pytest.fixture
def job(generator):
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(K, C, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(K, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (N,), generator=generator)
    labels[4] = -100
    partition = torch.randint(0, 3, (N,), generator=generator) * 5 - 5
    return features, weight, labels, bias, partition


def stats_of(features, weight, labels, bias, *, partition=None, progress=lambda: None, **more):
    heads = head_problem(features, weight, labels, bias, **more)
    return part_stats(heads, partition=partition, progress=progress)


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("formula", FORMULAS)
def test_each_part_is_scored_as_if_alone(job, formula):
    features, weight, labels, bias, partition = job
    result = stats_of(features, weight, labels, bias, partition=partition)
    scored = with_scores(result, formula, partition)
    assert len(result) == len(scored) == K and all(set(one) == set(FIELDS) for one in result)
    for part in (-5, 0, 5):
        rows = partition == part
        alone = last_layer_stats(features[rows], weight, labels[rows], bias)
        assert result.counts[part] == alone.count
        for k in range(K):
            assert_equal(scored[k]["score"][rows], alone.scores(formula)[k])
            for name in FIELDS:
                assert_equal(result[k][name][rows], getattr(alone, name)[k])


def test_one_part_needs_no_partition(job):
    features, weight, labels, bias, _ = job
    plain = stats_of(features, weight[0], labels, bias[0])
    whole = last_layer_stats(features, weight[0], labels, bias[0])
    assert len(plain) == 1 and plain.backend == whole.backend
    assert_equal(with_scores(plain, "moso", None)[0]["score"], whole.scores())
    ids = torch.zeros(N, dtype=torch.int32)
    same = stats_of(features, weight[0], labels, bias[0], partition=ids)
    assert_equal(same[0]["alignment"], plain[0]["alignment"])
    assert same.counts == plain.counts and same.mean_grad_sqnorm == plain.mean_grad_sqnorm


def test_a_part_above_the_budget_goes_through_a_file(job, monkeypatch):
    features, weight, labels, bias, partition = job
    weights = torch.rand(N)
    expected = stats_of(features, weight, labels, bias, partition=partition, sample_weight=weights)
    monkeypatch.setattr(parts_module, "GATHER_BYTES", 8)
    monkeypatch.setattr(parts_module, "_GATHER_BLOCK_ROWS", 7)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(a) or from_file(*a, **k))
    result = stats_of(features, weight, labels, bias, partition=partition, sample_weight=weights)
    assert len(mapped) == 9  # features, labels and weights of three parts
    for one, other in zip(result, expected, strict=True):
        for name in one:
            assert_equal(one[name], other[name])


def test_parts_of_sequences(job):
    features, weight, labels, bias, _ = job
    offsets = torch.tensor([0, 3, 10, 20, 33, 50, 60], dtype=torch.int32)
    partition = torch.tensor([0, 1, 0, 1, 0, 1])
    weights = torch.rand(N, dtype=torch.float64)
    result = stats_of(
        features,
        weight,
        labels,
        bias,
        partition=partition,
        cu_seqlens=offsets,
        sample_weight=weights,
    )
    scored = with_scores(result, "moso", partition)
    for part in (0, 1):
        picked = [r for r in range(6) if partition[r] == part]
        rows = torch.cat([torch.arange(offsets[r], offsets[r + 1]) for r in picked])
        lengths = torch.tensor([int(offsets[r + 1] - offsets[r]) for r in picked])
        alone = last_layer_stats(
            features[rows],
            weight,
            labels[rows],
            bias,
            cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            sample_weight=weights[rows],
        )
        for k in range(K):
            assert_equal(scored[k]["score"][picked], alone.scores()[k])


def test_progress_counts_parts(job):
    features, weight, labels, bias, partition = job
    seen = []
    stats_of(
        features,
        weight,
        labels,
        bias,
        partition=partition,
        progress=lambda: seen.append(1),
    )
    assert sum(seen) == 3


def test_rows_in_errors_are_those_of_the_whole_set(job):
    features, weight, labels, bias, partition = job
    wrong = labels.clone()
    wrong[33] = 77
    part = int(partition[33])
    with pytest.raises(ValueError, match=rf"part {part} of partition: labels\[33\] is 77"):
        stats_of(features, weight, wrong, bias, partition=partition)
    broken = features.clone()
    broken[41, 3] = torch.inf
    with pytest.raises(ValueError, match=r"features\[41, 3\] is inf; row 41 is the first"):
        stats_of(broken, weight, labels, bias, partition=partition)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"partition": torch.zeros(N - 1).long()},
            ValueError,
            "partition must have shape (60,), one id a sample; got (59,)",
        ),
        (
            {"partition": torch.zeros(N)},
            TypeError,
            "partition must hold integer ids; got torch.float32",
        ),
        (
            {"partition": torch.arange(N) // 59},
            ValueError,
            "part 1 of partition has 1 counted sample; every part needs at least 2, so use "
            "fewer parts",
        ),
        (
            {"partition": (torch.arange(N) == 4) | (torch.arange(N) == 5)},
            TypeError,
            "partition must hold integer ids; got torch.bool",
        ),
        (
            {"partition": ((torch.arange(N) == 4) | (torch.arange(N) == 5)).long()},
            ValueError,
            "part 1 of partition has 1 counted sample; every part needs at least 2, so use "
            "fewer parts",  # row 4 is ignored
        ),
        (
            {"labels": torch.zeros(9).long()},
            ValueError,
            "labels must have shape (60,) class ids or (60, 5) probabilities to go with "
            "features (60, 7), got (9,)",
        ),
    ],
)
def test_bad_input(job, change, error, message):
    features, weight, labels, bias, partition = job
    call = {"labels": labels, "partition": partition, **change}
    with pytest.raises(error) as caught:
        stats_of(features, weight, call.pop("labels"), bias, **call)
    assert str(caught.value) == message


def test_split_parts_orders_ids_and_rows():
    parts = split_parts(torch.tensor([7, -1, 7, 3]), 4)
    assert [(part, rows.tolist()) for part, rows in parts] == [(-1, [1]), (3, [3]), (7, [0, 2])]


def make_stats(generator, rows=12, depth=K, dtype=torch.float64):
    stats = []
    for _ in range(depth):
        one = {n: torch.rand(rows, generator=generator, dtype=dtype) for n in (*FIELDS, "score")}
        for values in one.values():
            values[3] = torch.nan
        stats.append(one)
    return stats


def test_mean_by_hand(generator):
    stats = make_stats(generator)
    lr = [0.1, 0.2, 0.4]
    partition = torch.tensor([0] * 5 + [1] * 7)
    index = torch.arange(12) * 2
    plain = combine_checkpoints(stats, lr=lr, index=index, provenance={"a": 1})
    scaled = combine_checkpoints(stats, lr=lr, index=index, partition=partition, num_steps=50)
    whole = combine_checkpoints(stats, lr=lr, index=index, num_steps=50)
    for i in (0, 4, 5, 11):
        expected = sum(rate * float(s["score"][i]) for rate, s in zip(lr, stats, strict=True)) / 3
        assert float(plain.scores[i]) == pytest.approx(expected, rel=1e-14)
        counted = 4 if i < 5 else 7  # row 3 does not count
        assert float(scaled.scores[i]) == pytest.approx(expected * 50 / counted, rel=1e-14)
        assert float(whole.scores[i]) == pytest.approx(expected * 50 / 11, rel=1e-14)
        loss = sum(float(s["loss"][i]) for s in stats) / 3
        assert float(plain.metrics["loss"][i]) == pytest.approx(loss, rel=1e-14)
        grand = sum(float(s["grad_sqnorm"][i]) ** 0.5 for s in stats) / 3
        assert float(plain.metrics["grand"][i]) == pytest.approx(grand, rel=1e-14)
        influence = sum(r * float(s["grad_sqnorm"][i]) for r, s in zip(lr, stats, strict=True)) / 3
        assert float(plain.metrics["self_influence"][i]) == pytest.approx(influence, rel=1e-14)
    assert plain.scores[3].isnan() and all(v[3].isnan() for v in plain.metrics.values())
    assert plain.index.tolist() == index.tolist() and plain.provenance == {"a": 1}
    for k, one in enumerate(stats):
        assert_equal(plain.per_checkpoint["score"][k], one["score"] * lr[k])
        assert_equal(plain.per_checkpoint["el2n"][k], one["el2n"])


def test_zscore_standardises_within_part_and_checkpoint(generator):
    stats = make_stats(generator)
    stats[0]["score"] *= 1e6  # an early checkpoint must not drown the rest
    partition = torch.tensor([0] * 5 + [1] * 7)
    table = combine_checkpoints(
        stats,
        lr=[0.1, 0.2, 0.4],
        partition=partition,
        combine="zscore",
        num_steps=9,
        index=torch.arange(12),
    )
    expected = torch.zeros(12, dtype=torch.float64)
    for one in stats:
        for rows in ([0, 1, 2, 4], [5, 6, 7, 8, 9, 10, 11]):
            values = one["score"][rows]
            expected[rows] += (values - values.mean()) / values.std(correction=0) / 3
    expected[3] = torch.nan
    torch.testing.assert_close(table.scores, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", range(1, 13))
def test_zscore_of_equal_scores_is_zero(rows, dtype):
    """Also where the sum of ``rows`` equal numbers is rounded, so that their mean is another."""
    stats = [{name: torch.full((rows,), 0.1, dtype=dtype) for name in (*FIELDS, "score")}]
    table = combine_checkpoints(stats, lr=[1.0], combine="zscore", index=torch.arange(rows))
    assert table.scores.tolist() == [0.0] * rows
    if dtype == torch.float64 and rows == 3:
        assert float(stats[0]["score"].mean()) != 0.1  # else this would show nothing


def test_rates_of_zero_are_refused_where_they_decide_the_scores(generator):
    call = {"stats": make_stats(generator), "index": torch.arange(12)}
    with pytest.raises(ValueError) as caught:
        combine_checkpoints(**call, lr=[0.0] * K)
    assert str(caught.value) == (
        "lr is 0 for all checkpoints, which would make every score 0; give the learning rates of "
        "the steps that were taken (a schedule that ends at 0 leaves 0 in its last checkpoint)"
    )
    one = combine_checkpoints(**call, lr=[0.0, 0.5, 0.0])
    assert_equal(one.scores, 0.5 * call["stats"][1]["score"] / K)
    standardised = combine_checkpoints(**call, lr=[0.0] * K, combine="zscore")
    assert_equal(
        standardised.scores, combine_checkpoints(**call, lr=[1.0] * K, combine="zscore").scores
    )


def test_combining_keeps_the_dtype_and_takes_no_samples(generator):
    stats = make_stats(generator, dtype=torch.float32)
    table = combine_checkpoints(stats, lr=[1.0] * K, index=torch.arange(12))
    assert table.scores.dtype == torch.float32
    empty = [{name: torch.empty(0) for name in (*FIELDS, "score")}]
    for how in ("mean", "zscore"):
        table = combine_checkpoints(
            empty, lr=[1.0], combine=how, num_steps=3, index=torch.arange(0)
        )
        assert len(table) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stats": []}, "stats must hold at least one checkpoint; got none"),
        ({"lr": [1.0]}, "lr must give one learning rate a checkpoint; got 1 for 3"),
        ({"combine": "sum"}, "combine must be one of mean, zscore; got 'sum'"),
        ({"num_steps": 0}, "num_steps must be None or a whole number >= 1; got 0"),
        ({"num_steps": True}, "num_steps must be None or a whole number >= 1; got True"),
        (
            {"index": torch.arange(11)},
            "stats[0]['alignment'] must have shape (11,), as index; got (12,)",
        ),
        (
            {"partition": torch.zeros(3).long()},
            "partition must have shape (12,), one id a sample; got (3,)",
        ),
    ],
)
def test_combine_refuses(generator, change, message):
    call = {
        "stats": make_stats(generator),
        "lr": [1.0] * K,
        "index": torch.arange(12),
        **change,
    }
    with pytest.raises(ValueError) as caught:
        combine_checkpoints(call.pop("stats"), **call)
    assert str(caught.value) == message


def test_combine_names_the_missing_key(generator):
    stats = make_stats(generator)
    del stats[1]["el2n"]
    with pytest.raises(ValueError) as caught:
        combine_checkpoints(stats, lr=[1.0] * K, index=torch.arange(12))
    assert str(caught.value) == (
        "stats of checkpoint 1 lack 'el2n'; they have ['alignment', 'entropy', 'grad_sqnorm', "
        "'loss', 'margin', 'score']"
    )


def test_means_over_checkpoints_are_rounded_once(generator):
    """float32 statistics are combined in float64: the table holds the nearest float32."""
    depth, rows = 7, 300
    stats = [
        {name: torch.rand(rows, generator=generator) * 10.0**k for name in (*FIELDS, "score")}
        for k in range(depth)
    ]
    lr = [0.1 / (k + 1) for k in range(depth)]
    table = combine_checkpoints(stats, lr=lr, index=torch.arange(rows))
    wide = {name: torch.stack([one[name] for one in stats]).double() for name in stats[0]}
    rates = torch.tensor(lr, dtype=torch.float64)[:, None]
    expected = {name: wide[name].mean(0) for name in FIELDS}
    expected["grand"] = wide["grad_sqnorm"].sqrt().mean(0)
    expected["self_influence"] = (rates * wide["grad_sqnorm"]).mean(0)
    assert set(table.metrics) == set(expected)
    for name, values in expected.items():
        assert_equal(table.metrics[name], values.float())
    assert_equal(table.scores, (rates * wide["score"]).mean(0).float())
    for k, rate in enumerate(lr):
        assert_equal(table.per_checkpoint["score"][k], (rate * wide["score"][k]).float())


@pytest.mark.parametrize("name", ["features", "labels", "sample_weight"])
def test_the_budget_of_a_part_is_in_bytes(job, monkeypatch, name):
    """What is at most the budget stays in memory; one byte more, and it goes through a file."""
    features, weight, labels, bias, _ = job
    heads = head_problem(features, weight, labels, bias, sample_weight=torch.rand(N))
    taken = getattr(heads.problem, name)
    half = N // 2 * taken[0].numel() * taken.element_size()
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda path, **k: mapped.append(path) or from_file(path, **k)
    )
    for budget in (half, half - 1):
        mapped.clear()
        monkeypatch.setattr(parts_module, "GATHER_BYTES", budget)
        part_stats(heads, partition=torch.arange(N) % 2)
        names = [Path(path).stem for path in mapped]
        assert names.count(name) == (2 if budget < half else 0)
