"""The name that a run's inputs have in its folder of results."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import functools
import random
import threading
import types
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from moso_fast.sources.data.digest import SAMPLES, inputs_digest


def of(data: Any, **options: Any) -> str | None:
    return inputs_digest(DataLoader(data, **options))


def rows(count: int, **changed: float) -> TensorDataset:
    x = torch.arange(3.0 * count).reshape(count, 3)
    for place, value in changed.items():
        x[int(place.removeprefix("at"))] = value
    return TensorDataset(x, torch.arange(count))


def test_every_sample_of_a_small_set_counts() -> None:
    names = {of(rows(10, **{f"at{place}": -1.0})) for place in range(10)}
    assert len(names) == 10 and of(rows(10)) not in names
    assert of(rows(10)) == of(rows(10), batch_size=5)


def test_of_a_large_set_the_first_the_last_and_some_between() -> None:
    class Counted(Dataset):
        read: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
            self.read.append(place)
            return torch.tensor(float(place)), 0

    of(Counted())
    assert len(Counted.read) == SAMPLES and {0, 9_999} <= set(Counted.read)
    assert max(b - a for a, b in zip(Counted.read, Counted.read[1:], strict=False)) < 200


def test_labels_are_left_to_the_job() -> None:
    x = torch.ones(4, 2)
    assert of(TensorDataset(x, torch.zeros(4))) == of(TensorDataset(x, torch.ones(4)))
    dicts = [[{"input_ids": [1, 2], "labels": label} for _ in range(3)] for label in (0, 1)]
    assert of(dicts[0]) == of(dicts[1])


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse()),
        (np.ones(2), np.zeros(2)),
        ("a text", "another"),
        ({"ids": [1, 2]}, {"ids": [1, 3]}),
        ((torch.ones(1), 3), (torch.ones(1), 4)),
    ],
)
def test_what_differs_has_another_name(one, other) -> None:
    assert of([(one, 0)]) == of([(one, 1)])
    assert of([(one, 0)]) != of([(other, 0)])


def test_nobody_is_given_other_random_numbers() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
            return torch.rand(2) + np.random.rand() + random.random(), 0

    def drawn() -> tuple[Any, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = drawn()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    of(Noisy())
    assert drawn() == expected


def test_streams_have_none() -> None:
    class Stream(IterableDataset):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([(torch.ones(2), 0)])

    assert of(Stream()) is None


@dataclasses.dataclass
class Pair:
    x: Any
    more: Any = None


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.lock = threading.Lock()

    @functools.cached_property
    def double(self) -> Any:
        return 2 * self.x


class Slotted:
    __slots__ = ("__hidden",)

    def __init__(self, x: Any) -> None:
        self.__hidden = x


class Items(collections.UserList):
    pass


class Subclass(list):
    pass


def objects(items: list[Any]) -> np.ndarray:
    result = np.empty(len(items), dtype=object)
    result[:] = items
    return result


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: collections.UserDict(x=x),
        lambda x: types.MappingProxyType({"x": [x]}),
        lambda x: Pair(0, Pair(x)),
        lambda x: {"a": [Plain(x)]},
        Slotted,
        lambda x: Items([x]),
        lambda x: Subclass([x]),
        lambda x: {int(x), 5, 6},
        lambda x: types.SimpleNamespace(x=x),
        lambda x: objects([[x], 3]),
        lambda x: torch.nested.nested_tensor([torch.ones(2), x * torch.ones(3)]),
        lambda x: torch.nested.nested_tensor(
            [torch.ones(2), x * torch.ones(3)], layout=torch.jagged
        ),
        lambda x: (x * torch.ones(2) * 1j).conj(),
        lambda x: datetime.timedelta(int(x)),
        lambda x: array.array("d", [x]),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_kind_of_input_counts_by_what_it_holds(hold: Any) -> None:
    names = [of([(hold(torch.tensor(value)), 0)]) for value in (1.0, 1.0, 2.0)]
    assert names[0] == names[1] != names[2]
    kept = [hold(torch.tensor(1.0)) for _ in range(3)]  # at other addresses
    assert of([(kept[2], 0)]) == names[0]


def test_tokens_of_transformers_count() -> None:
    transformers = pytest.importorskip("transformers")
    one, same, other = (transformers.BatchEncoding({"ids": ids}) for ids in ([1], [1], [2]))
    assert of([(one, 0)]) == of([(same, 0)]) != of([(other, 0)])


def test_what_an_object_computed_for_later_use_does_not_count() -> None:
    sample = Plain(torch.ones(2))
    before = of([(sample, 0)])
    assert sample.double.sum() == 4 and of([(sample, 0)]) == before


def test_one_object_that_is_filled_anew_for_every_sample() -> None:
    class Reused(Dataset):
        def __init__(self, last: float) -> None:
            self.values, self.out = [0.0, 1.0, last], Pair(None)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> tuple[Any, int]:
            self.out.x = self.values[place]
            return self.out, 0

    assert of(Reused(2.0)) == of(Reused(2.0)) != of(Reused(3.0))


def test_what_holds_itself_and_what_is_very_deep_come_to_an_end() -> None:
    def turned(value: float) -> list[Any]:
        ring: list[Any] = [value]
        pair = Pair(ring)
        ring += [ring, pair]
        pair.more = {"back": pair}
        deep: Any = Pair(value)
        for _ in range(5000):
            deep = Pair(value, deep)
        return [(ring, 0), (deep, 0)]

    assert of(turned(1.0)) == of(turned(1.0)) != of(turned(2.0))
    for place in range(2):
        assert of([turned(1.0)[place]]) != of([turned(2.0)[place]])


def test_what_is_shared_is_looked_into_once() -> None:
    pair = Pair(1.0)
    for _ in range(20):
        pair = Pair(pair, pair)  # a million ways to the innermost one
    assert of([(pair, 0)]) is not None
