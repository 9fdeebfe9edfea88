"""One batch taken apart by hand: its parts, its index, lists of torch's own collating, devices."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from moso_fast.sources.data.batch_parts import (
    SampleBatch,
    checked_index,
    equal,
    index_of,
    is_index,
    joined_index,
    parts_of,
    same_samples,
    split_batch,
    stacked_lists,
    to_device,
)
from moso_fast.sources.data.errors import collating_hint, hint_on

X, Y, NUMBERS = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([7, 5])


def error_of(call: Any, *arguments: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_parts_of_a_batch() -> None:
    assert parts_of((X, Y)) == (X, Y, None) and parts_of([X, Y, NUMBERS]) == (X, Y, NUMBERS)
    assert parts_of((NUMBERS, (X, Y))) == parts_of([NUMBERS, [X, Y]]) == (X, Y, NUMBERS)
    entries = {"x": X}
    assert parts_of((NUMBERS, (entries, Y))) == (entries, Y, NUMBERS)
    # A pair of labels beside numbers for inputs, and labels that are a triple.
    pair = (torch.zeros(2), Y)
    assert parts_of((NUMBERS, pair)) == (NUMBERS, pair, None)
    assert parts_of((X, (X, Y))) == (X, (X, Y), None)
    three = (X, Y, Y)
    assert parts_of((NUMBERS, three)) == (NUMBERS, three, None)
    for key in ("labels", "label"):
        assert parts_of({"x": X, key: Y, "idx": NUMBERS}) == ({"x": X, "idx": NUMBERS}, Y, None)
    inputs, labels, _ = parts_of({"label": X, "labels": Y})
    assert inputs == {"label": X} and labels is Y


def test_batches_of_another_kind_say_what_is_right() -> None:
    assert error_of(parts_of, {"y": X, "x": X}) == (
        "data: a batch that is a dict needs the key 'labels' or 'label', got ['x', 'y']"
    )
    kind = error_of(parts_of, X, kind=TypeError)
    assert kind == "data: a batch must be (input, label) or a dict, got Tensor"
    assert error_of(parts_of, [X]) == (
        "data: a batch must be (input, label) or a dict, got a list of 1"
    )
    start = (
        "data: a batch must be (input, label), (input, label, index) or a dict; got a tuple of 3 "
        "whose last entry ("
    )
    end = ") is no index, (N,) integers; several inputs go as ((a, b), label)"
    for last, said in (
        (X, "float32 (2, 3)"),
        (np.ones(2, "f8"), "float64 (2,)"),
        ("ab", "str"),
        ([1.5], "list"),
    ):
        assert error_of(parts_of, (X, Y, last)) == f"{start}{said}{end}"


def test_the_batch_for_a_model_that_takes_anything() -> None:
    for batch, args, kwargs in (
        ((X, Y), (X,), {}),
        (((X, Y), Y), (X, Y), {}),
        (([X, X], Y), (X, X), {}),
        ({"x": X, "labels": Y}, (), {"x": X}),
        ((OrderedDict(x=X), Y), (), {"x": X}),
    ):
        found = split_batch(batch)
        assert found[:2] == (args, kwargs) and type(found[1]) is dict
        assert torch.equal(found[2], Y)
    assert split_batch((X, [3, 4]))[2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("value", "samples", "expected"),
    [
        (torch.tensor([1, 2]), None, True),
        (torch.tensor([1, 2], dtype=torch.uint8), 2, True),
        (torch.tensor([1, 2]), 3, False),
        (torch.tensor([[1, 2]]), None, False),
        (torch.tensor([1.0]), None, False),
        (torch.tensor([1j]), None, False),
        (torch.tensor([True]), None, False),
        ([1, 2], 2, True),
        ((np.int32(1), torch.tensor(2)), None, True),
        ([torch.tensor([1])], None, False),
        ([1, True], None, False),
        ([1, 2.0], None, False),
        ([], None, False),
        (np.array([1, 2], "u2"), 2, True),
        (np.array([1, 2], "i8"), None, True),
        (np.array([1.0]), None, False),
        (np.array([True]), None, False),
        (np.array([[1]]), None, False),
        ("12", None, False),
        (None, None, False),
    ],
)
def test_what_is_an_index(value: Any, samples: int | None, expected: bool) -> None:
    assert is_index(value, samples) is expected
    if expected:
        found = index_of(value)
        assert found.dtype == torch.int64 and found.tolist() == [int(one) for one in value]


def test_an_index_of_a_batch() -> None:
    assert checked_index(None, 2) is None
    found = checked_index(np.array([3, 1], "i2"), 2)
    assert found is not None and found.dtype == torch.int64 and found.tolist() == [3, 1]
    of_views = checked_index([4, 4, 2, 2], 4, views=2)
    assert of_views is not None and of_views.tolist() == [4, 2]
    assert error_of(checked_index, [1, 2, 3], 2) == "data: a batch of 2 samples brings 3 indices"
    assert error_of(checked_index, [1, 2, 1], 3) == (
        "data: the index of a batch, (input, label, index) or (index, (input, label)), holds a "
        "number twice, so it is none; several inputs go as ((a, b), label)"
    )


def test_the_index_of_all_batches() -> None:
    one, other = torch.tensor([5, 0]), torch.tensor([1])
    found = joined_index([one, other], None)
    assert found is not None and found.tolist() == [5, 0, 1]
    assert joined_index([None, None], "idx") is None and joined_index([], None) is None
    empty = joined_index([torch.empty(0, dtype=torch.int64)], None)
    assert empty is not None and not len(empty)
    assert error_of(joined_index, [one, None], None) == (
        "data: some batches bring the index of their samples and some do not"
    )
    for wrong, what in (([1, 5, 3], "5 comes twice"), ([-1], "-1 is no index")):
        both = [one, torch.tensor(wrong)]
        assert error_of(joined_index, both, None) == (
            f"data: the index that samples bring must be unique and not negative, but {what}; "
            "with an IterableDataset every worker must yield a share of its own"
        )
        with pytest.warns(UserWarning) as caught:
            assert joined_index(both, "idx") is None
        assert [str(one.message) for one in caught] == [
            f"data: column 'idx' is no index of the samples ({what}); the table has their place in "
            "the data set instead"
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert joined_index([one, other], "idx") is not None


@pytest.mark.parametrize(
    "samples",
    [
        [[1, 2], [3, 4], [5, 6]],
        [[1.5, 2.0], [3.0, 4.25]],
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]],
        [[True, False]],
        [[[1, 2, 3]], [[4, 5, 6]]],
    ],
)
def test_lists_of_torchs_own_collating_go_back(samples: Any) -> None:
    found = stacked_lists(default_collate(samples))
    assert torch.equal(found, torch.tensor(samples)) and found.dtype == torch.tensor(samples).dtype


def test_what_torch_did_not_take_apart_stays() -> None:
    rows = [torch.ones(2, 2), torch.zeros(2, 2)]  # samples of tensors in a list
    for value in (
        X,
        [],
        (Y, Y),
        "ab",
        rows,
        [Y, "a"],
        [Y, Y.float()],
        [Y, torch.ones(3).long()],
        [[Y, Y], [Y]],
        [Y, [Y, Y]],
        [torch.tensor(1)],
    ):
        assert stacked_lists(value) is value


def test_equal_tensors_or_none() -> None:
    assert equal(None, None) and equal(Y, Y.clone())
    assert not equal(Y, None) and not equal(None, Y) and not equal(Y, NUMBERS)


def batch(labels: Any, *args: Any, **kwargs: Any) -> SampleBatch:
    return SampleBatch(args, kwargs, torch.tensor(labels))


def test_same_samples() -> None:
    assert same_samples(batch([0, 1], X), batch([0, 1], X + 1)), "labels that differ tell"
    assert not same_samples(batch([0, 1], X), batch([1, 0], X))
    assert same_samples(batch([1, 1], X, a=Y), batch([1, 1], X.clone(), a=Y.clone()))
    assert not same_samples(batch([1, 1], X, a=Y), batch([1, 1], X, a=NUMBERS))
    assert not same_samples(batch([1, 1], X), batch([1, 1], X, X))
    assert same_samples(batch([1, 1], "a", [X]), batch([1, 1], "b", [X])), "tensors alone count"


def test_the_number_of_samples() -> None:
    assert batch([0, 1, 1], X).samples == 3
    documents = torch.tensor([[0, 0, 1, 2, -1]])
    packed = SampleBatch((), {}, torch.zeros(1, 5), documents=documents)
    assert packed.samples == 3 and packed.index is None


def test_nested_inputs_go_to_a_device_and_dtype() -> None:
    pair = namedtuple("pair", "a b")
    given = {"x": [X, Y], "n": pair(X, "text"), "t": (X,), "k": 3}
    found = to_device(given, torch.device("cpu"), torch.float64)
    assert [one.dtype for one in found["x"]] == [torch.float64, torch.int64]
    assert type(found["x"]) is list and type(found["t"]) is tuple and type(found["n"]) is pair
    assert found["n"].a.dtype == torch.float64 and found["n"].b == "text" and found["k"] == 3
    assert found["t"][0].dtype == torch.float64
    kept = to_device(given, torch.device("meta"), None)
    assert kept["n"].a.is_meta and kept["x"][0].dtype == torch.float32 and kept["x"][1].is_meta


@pytest.mark.parametrize(
    "said",
    [
        "stack expects each tensor to be equal size, but got [3] at entry 0",
        "each element in list of batch should be of equal size",
        "Trying to resize storage that is not resizable",
    ],
)
def test_samples_of_different_shapes_are_told_to_be_padded(said: str) -> None:
    hint = collating_hint(said)
    assert type(hint) is ValueError and str(hint) == (
        "data: the samples of a batch have different shapes and cannot be stacked; pad them in the "
        "data set, or give a DataLoader whose collate_fn does (DataCollatorWithPadding of "
        "transformers, torch's pad_sequence)"
    )


def test_samples_that_make_no_batch_are_told_to_be_tensors() -> None:
    with pytest.raises(TypeError) as caught:
        default_collate([object()])
    hint = collating_hint(f"{caught.value}\nand more")
    assert type(hint) is TypeError and str(hint) == (
        "data: a sample holds <class 'object'>, which makes no batch; turn it into a tensor in the "
        "data set (ToTensor for images), or give a collate_fn"
    )
    assert collating_hint("found nothing") is None


LOST = (
    "(a .squeeze() without a dimension does that); choose a batch size that leaves no single "
    "sample, or give the data set itself instead of a loader"
)


@pytest.mark.parametrize(
    ("said", "given", "was_larger", "expected"),
    [
        (
            "mat1 and mat2 must have the same dtype, but got Double and Float",
            batch([0, 1], X.double(), Y, "text", k=X),
            False,
            "its inputs are float32, float64, int64 and its weights are of another dtype; "
            "dtype=torch.float32 brings both to that (or another dtype)",
        ),
        (
            "Input type (unsigned char) and bias type (float) should be the same",
            batch([0, 1], X.byte()),
            True,
            "its inputs are uint8 and its weights are of another dtype; convert them to floating "
            "point in the data set",
        ),
        (
            "forward() got an unexpected keyword argument 'y'",
            batch([0], X),
            True,
            "its forward does not take a column of the batch; choose what it gets by columns=",
        ),
        (
            "anything",
            batch([0], X),
            True,
            f"the forward failed in a batch of one sample, and not in larger ones {LOST}",
        ),
        (
            "must get (N, D)",
            batch([0], X),
            False,
            f"the forward lost a dimension in a batch of one sample {LOST}",
        ),
        (
            "Dimension out of range",
            batch([0], X),
            False,
            f"the forward lost a dimension in a batch of one sample {LOST}",
        ),
        ("Dimension out of range", batch([0, 1], X), False, None),
        ("anything", batch([0], X), False, None),
        ("anything", batch([0, 1], X), True, None),
    ],
)
def test_hints_on_a_forward_pass_that_failed(
    said: str, given: SampleBatch, was_larger: bool, expected: str | None
) -> None:
    assert hint_on(said, given, was_larger) == expected
