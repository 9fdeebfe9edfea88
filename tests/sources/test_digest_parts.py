"""Which inputs have the same name and which have another, kind by kind."""

from __future__ import annotations

import array
import collections
import enum
import fractions
import functools
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moso_fast.sources.data.digest import _Inputs, inputs_digest


def name(value: Any) -> str:
    return _Inputs().digest(value).hex()


class Phase(enum.Enum):
    WARM, COLD = 1, 2


class Image:
    """Pixels as Pillow has them, with one fact or another beside."""

    def __init__(self, pixels: bytes, **facts: Any) -> None:
        self.pixels, self.facts = pixels, facts
        self.__dict__.update(facts)

    def tobytes(self) -> bytes:
        return self.pixels


class Column:
    def __init__(self, *values: float) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values)


class Held:
    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)

    @functools.cached_property
    def late(self) -> int:
        return 7


class Slots:
    __slots__ = ("__weakref__", "a", "b")

    def __init__(self, **facts: Any) -> None:
        for key, value in facts.items():
            setattr(self, key, value)


class OneSlot:
    __slots__ = "__held"

    def __init__(self, value: Any) -> None:
        self.__held = value


class Derived(OneSlot):
    __slots__ = ("more",)


class Sequence(collections.abc.Sequence):
    def __init__(self, *values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, at: Any) -> Any:
        return self._values[at]


class Bare:
    pass


def deep(levels: int, value: Any) -> Any:
    return value if levels == 0 else [deep(levels - 1, value), None]


def ring(value: Any) -> list[Any]:
    found: list[Any] = [value]
    found.append(found)
    return found


def objects(*values: Any) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


DIFFERENT = {
    "numbers": (1, 2, 1.0, True, None, 1 + 0j, math.inf, np.float32(1), np.int64(1)),
    "texts": ("a", "b", b"a", bytearray(b"a"), "", ["a"], ("a",)),
    "ranges and enums": (range(3), range(4), Phase.WARM, Phase.COLD),
    "tensors": (
        torch.ones(2),
        torch.zeros(2),
        torch.ones(2).double(),
        torch.ones(1, 2),
        torch.ones(2).int(),
        torch.empty(0, 2),
        torch.empty(2, 0),
        torch.tensor(1.0),
        torch.tensor([1.0, -0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([1 + 1j]),
        torch.tensor([1 + 1j]).conj(),
        np.ones(2, "f4"),
    ),
    "arrays": (
        np.ones(2),
        np.ones((1, 2)),
        np.ones(2, "f4"),
        np.zeros(2),
        np.arange(4).reshape(2, 2),
        np.arange(4).reshape(2, 2).T,
        objects(1, 2),
        objects(1, "2"),
        objects([1], [2]),
        objects([1], [3]),
    ),
    "nested": (
        [["ab"], ["c"]],
        [["a"], ["bc"]],
        [["ab", "c"]],
        {"a": [1]},
        {"b": [1]},
        {"a": [2]},
        {"a": [1], "b": 2},
        collections.OrderedDict(a=[1]),
        collections.UserDict(a=[1]),
        collections.UserDict(a=[2]),
        [None],
        [],
        {},
    ),
    "images": (
        Image(b"12"),
        Image(b"13"),
        Image(b"12", size=(1, 2)),
        Image(b"12", size=(2, 1)),
        Image(b"12", mode="L"),
        Image(b"12", dtype="u1"),
        Image(b"12", shape=(2, 1), mode="RGB"),
        array.array("b", b"12"),
    ),
    "sets": ({1, 2}, {1, 3}, frozenset({1, 2}), {"1", 2}, set()),
    "columns and sequences": (Column(1, 2), Column(1, 3), Sequence(1, 2), Sequence(1, [3])),
    "objects": (
        Held(x=1),
        Held(x=2),
        Held(y=1),
        Held(x=1, y=2),
        SimpleNamespace(x=1),
        Slots(a=1),
        Slots(b=1),
        Slots(a=1, b=2),
        OneSlot(1),
        OneSlot(2),
        Derived(1),
        Bare(),
        fractions.Fraction(1, 2),
        fractions.Fraction(1, 3),
    ),
    "functions and modules": (math.sin, math.cos, os, math, len, Bare, Held, name, deep),
    "deep": (deep(20, 1), deep(20, 2), deep(30, 1), ring(1), ring(2)),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_has_another_name(kind: str) -> None:
    names = [name(value) for value in DIFFERENT[kind]]
    assert len(set(names)) == len(names) and all(len(one) == 32 for one in names)
    held = [name([value, None]) for value in DIFFERENT[kind]]
    assert len(set(held)) == len(held)


def with_late() -> Held:
    found = Held(x=1)
    assert found.late == 7
    return found


SAME = {
    "lists at other places": ([1, [2]], [1, [2]]),
    "sets in another order": ({1, 2, 3}, {3, 2, 1}),
    "what was computed for later": (Held(x=1), with_late()),
    "attributes in another order": (Held(x=1, y=2), Held(y=2, x=1)),
    "a parameter": (torch.ones(2), torch.nn.Parameter(torch.ones(2))),
    "a view": (torch.arange(4)[::2], torch.tensor([0, 2])),
    "an array of columns": (np.asfortranarray(np.eye(2)[:, ::-1]), np.eye(2)[:, ::-1]),
    "conjugates": (torch.tensor([1 + 1j]).conj(), torch.tensor([1 - 1j])),
    "negatives": (torch.tensor([1 + 1j, 2j]).conj().imag, torch.tensor([-1.0, -2.0])),
    "one element of a view": (torch.arange(4.0)[3::2], torch.tensor([3.0])),
    "one conjugate": (torch.tensor([1 + 1j]).conj().imag, torch.tensor([-1.0])),
    "sparse": (torch.eye(2).to_sparse(), torch.eye(2)),
    "what has no contents": (Bare(), Bare()),
    "beyond the depth": (deep(40, 1), deep(40, 2)),
    "rings": (ring(1), ring(1)),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_is_the_same_has_the_same_name(kind: str) -> None:
    one, other = SAME[kind]
    assert name(one) == name(other)


def test_facts_of_an_image_that_are_functions_do_not_count() -> None:
    assert name(Image(b"1", size=lambda: 3)) == name(Image(b"1", size=lambda: 4))


def test_what_is_held_twice_is_looked_into_once() -> None:
    looked = []

    class Watched:
        def __init__(self, value: int) -> None:
            self.value = value

        def __getattribute__(self, key: str) -> Any:
            looked.append(key == "__dict__")
            return super().__getattribute__(key)

    one = Watched(3)
    once = name([one])
    first = sum(looked)
    looked.clear()
    assert name([one, one, one]) != once and sum(looked) == first


def test_how_a_digest_reads() -> None:
    def words(data: Any) -> str | None:
        return inputs_digest(DataLoader(data, sampler=[]))

    for count in (0, 1, 3, 64, 100):
        said = words([([k], 0) for k in range(count)])
        assert said is not None
        start, _, rest = said.partition(" (another one each time if the data set draws at random) ")
        assert rest == f"of {min(count, 64)} samples"
        assert start.startswith("digest ") and len(start) == len("digest ") + 32
    assert words(Bare()) is None
    assert words(type("NoLength", (Dataset,), {"__getitem__": lambda self, k: k})()) is None


def test_samples_evenly_between_the_first_and_the_last() -> None:
    read = []

    class Data(Dataset):
        def __len__(self) -> int:
            return 127

        def __getitem__(self, place: int) -> Any:
            read.append(place)
            return "no batch at all" if place else ([1], 2, 3, 4)

    assert inputs_digest(DataLoader(Data())) is not None
    assert read == list(range(0, 127, 2))
