"""Scoring of each part by its own surrogate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from surrogate_cases import QUICK, N, Net, Watched, samples
from torch.utils.data import TensorDataset

from moso_fast.surrogate.training import (
    Surrogate,
    sample_positions,
    score_surrogates,
    train_surrogates,
)


@pytest.fixture
def data():
    return samples()


def brute_force(surrogates, positions, data):
    """Paper's equation by autograd of every sample's head gradient, one part at a time."""
    inputs, labels = data.tensors
    scores = torch.full((N,), math.nan, dtype=torch.float64)
    for s in surrogates:
        total = torch.zeros(len(s.index), dtype=torch.float64)
        for position in positions:
            net = Net().eval()
            net.load_state_dict(s.checkpoints[position].source)
            net.double()
            rows = []
            for i in s.index.tolist():
                loss = F.cross_entropy(net(inputs[i : i + 1].double()), labels[i : i + 1])
                grads = torch.autograd.grad(loss, list(net.head.parameters()))
                rows.append(torch.cat([g.flatten() for g in grads]))
            g = torch.stack(rows)
            for i in range(len(g)):
                others = torch.cat([g[:i], g[i + 1 :]]).mean(dim=0)
                total[i] += s.checkpoints[position].lr * (others @ g[i])
        scores[s.index] = total / len(positions)
    return scores


def test_scores_are_those_of_each_parts_own_surrogate(data):
    surrogates = train_surrogates(Net, data, **QUICK, lr=0.05)
    table = score_surrogates(surrogates, Net, data, samples=3, seed=4, progress=False)
    expected = brute_force(surrogates, sample_positions(4, 3, 4), data)
    assert torch.equal(table.index, torch.arange(N))
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-4, atol=1e-6)
    assert table.per_checkpoint["alignment"].shape == (3, N)


@pytest.mark.exhaustive
def test_scorer_arguments_are_passed_on(data):
    surrogates = train_surrogates(Net, data, **QUICK)
    plain = score_surrogates(surrogates, Net, data, samples=None, progress=False)
    aligned = score_surrogates(
        surrogates, Net, data, samples=None, formula="alignment", head="head", progress=False
    )
    assert torch.equal(plain.per_checkpoint["alignment"], aligned.per_checkpoint["alignment"])
    assert not torch.equal(plain.scores, aligned.scores)
    zscore = score_surrogates(surrogates, Net, data, samples=2, combine="zscore", progress=False)
    for surrogate in surrogates:
        assert abs(zscore.scores[surrogate.index].mean()) < 1e-5


@pytest.mark.exhaustive
def test_scoring_continues_from_its_folder(data, tmp_path):
    surrogates = train_surrogates(Net, data, **QUICK)
    once = score_surrogates(surrogates, Net, data, samples=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        watched = Watched(data, stop_after=50)
        score_surrogates(surrogates, Net, watched, samples=2, resume=tmp_path, progress=False)
    watched = Watched(data)
    again = score_surrogates(surrogates, Net, watched, samples=2, resume=tmp_path, progress=False)
    assert torch.equal(once.scores, again.scores)
    # Each part also compares its samples with those of the folder: N more than a run anew.
    assert len(watched.reads) < N + 2 * N


def test_sample_positions():
    drawn = [sample_positions(50, 10, seed) for seed in range(20)]
    assert all(d == sorted(set(d)) and len(d) == 10 and d[0] >= 0 and d[-1] < 50 for d in drawn)
    assert len({tuple(d) for d in drawn}) == 20
    assert sample_positions(50, 10, 3) == drawn[3]
    assert sample_positions(4, None) == sample_positions(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (5, ValueError, "samples: expected 1 to 4, .* got 5"),
        (0, ValueError, "samples: expected 1 to 4"),
        (2.0, TypeError, "samples: expected an int or None, got 2.0"),
    ],
)
def test_bad_samples_are_named(data, samples, error, message):
    surrogates = train_surrogates(Net, data, **QUICK)
    with pytest.raises(error, match=message):
        score_surrogates(surrogates, Net, data, samples=samples)


def test_surrogates_that_do_not_fit_are_refused(data):
    surrogates = train_surrogates(Net, data, **QUICK)
    first, *others = surrogates
    short = Surrogate(first.part, first.index, first.checkpoints[:2], first.num_steps)
    small = TensorDataset(*(t[:20] for t in data.tensors))
    with pytest.raises(ValueError, match="surrogates: expected at least one"):
        score_surrogates([], Net, data)
    with pytest.raises(ValueError, match="same number of checkpoints for every part"):
        score_surrogates([short, *others], Net, data)
    with pytest.raises(ValueError, match="dataset: has 20 samples, but part 0 holds index"):
        score_surrogates(surrogates, Net, small)


def test_an_index_just_outside_the_data_set(data):
    """The first index that is not there, and the last that is."""
    surrogates = train_surrogates(Net, data, **QUICK)
    last = next(s for s in surrogates if N - 1 in s.index)
    short = TensorDataset(*(t[: N - 1] for t in data.tensors))
    message = f"dataset: has {N - 1} samples, but part {last.part} holds index {N - 1}"
    with pytest.raises(ValueError, match=message):
        score_surrogates(surrogates, Net, short)
    table = score_surrogates(surrogates, Net, data, samples=None)
    assert table.index.tolist() == list(range(N))
