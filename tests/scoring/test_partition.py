"""Partitions: balanced, seeded, shuffled, and refused by name when they cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moso_fast.scoring.partition import (
    check_part_sizes,
    partition_digest,
    partition_ids,
    resolve_partition,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 2**31))
def test_sizes_differ_by_at_most_one(num_samples: int, parts: int, seed: int) -> None:
    parts = min(parts, num_samples)
    sizes = torch.bincount(partition_ids(num_samples, parts, seed), minlength=parts)
    assert sizes.sum() == num_samples
    assert sizes.max() - sizes.min() <= 1


def test_seeded_shuffled_and_independent_of_the_global_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = partition_ids(1000, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(partition_ids(1000, 8, seed=3), first)
    assert not torch.equal(partition_ids(1000, 8, seed=4), first)
    # A shuffled split spreads a class-sorted data set over the parts: every part sees both halves.
    for part in range(8):
        members = torch.nonzero(first == part).flatten()
        assert members.min() < 500 <= members.max()


def test_empty() -> None:
    assert partition_ids(0, 4).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 0), ValueError, "parts must be >= 1, got 0"),
        ((10, 11), ValueError, "parts must be <= num_samples = 10, got 11"),
        ((-1, 2), ValueError, "num_samples must be >= 0, got -1"),
        ((10, 2.0), TypeError, "parts must be an int, got float"),
        ((10, True), TypeError, "parts must be an int, got a bool"),
        ((10, 2, 0.5), TypeError, "seed must be an int, got float"),
        ((10, 2, False), TypeError, "seed must be an int, got a bool"),
        (("10", 2), TypeError, "num_samples must be an int, got str"),
    ],
)
def test_partition_ids_refuses(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        partition_ids(*arguments)
    assert str(caught.value) == message


def test_resolve_accepts_every_form_of_ids() -> None:
    ids = [7, -3, 7, -3, 7]
    for given_ids in (ids, np.array(ids), torch.tensor(ids, dtype=torch.int32)):
        resolved = resolve_partition(given_ids, 5)
        assert resolved is not None
        assert resolved.dtype == torch.int64
        assert resolved.tolist() == ids
    assert resolve_partition(None, 5) is None
    for two in (2, np.int64(2), torch.tensor(2)):
        resolved = resolve_partition(two, 10, seed=5)
        assert resolved is not None
        assert torch.equal(resolved, partition_ids(10, 2, seed=5))


def test_resolve_copies() -> None:
    ids = torch.tensor([0, 0, 1, 1])
    resolved = resolve_partition(ids, 4)
    assert resolved is not None
    ids.fill_(9)
    assert resolved.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        (True, TypeError, "partition must be None, an int or (N,) integer ids, got a bool"),
        ("ab", TypeError, "partition must be None, an int or (N,) integer ids, got str"),
        (torch.zeros(4), TypeError, "partition ids must be integers, got torch.float32"),
        (
            [0, 0, 1],
            ValueError,
            "partition must have one id per sample, shape (4,), got (3,)",
        ),
        (
            [5, 5, 5, -2],
            ValueError,
            "partition: every part needs at least 2 samples to be scored against its own mean, "
            "part -2 has 1",
        ),
        (
            3,
            ValueError,
            "partition: every part needs at least 2 samples to be scored against its own mean, "
            "part 1 has 1",
        ),
    ],
)
def test_resolve_refuses(partition: object, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        resolve_partition(partition, 4)
    assert str(caught.value) == message


def test_ignored_samples_do_not_count() -> None:
    ids = torch.tensor([0, 0, 1, 1])
    assert check_part_sizes(ids, torch.ones(4, dtype=torch.bool)) is ids
    with pytest.raises(ValueError, match=r"not ignored.*part 1 has 1"):
        check_part_sizes(ids, torch.tensor([True, True, False, True]))


def test_digest_tells_partitions_apart() -> None:
    assert partition_digest(torch.tensor([0, 1])) == partition_digest(torch.tensor([0, 1]))
    assert partition_digest(torch.tensor([0, 1])) != partition_digest(torch.tensor([1, 0]))
    assert partition_digest(None) == "none"
