"""Labels by themselves: which are read as what, in whole sentences, and rows of tokens."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from moso_fast.core.labels import as_labels, counts, document_rows, fit_labels, token_rows

IDS = "map them to ids: {name: i for i, name in enumerate(sorted(set(labels)))}"


class Series:
    """What pandas offers of a column."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def to_numpy(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values)

    __array__ = to_numpy


@pytest.mark.parametrize("make", [list, tuple, np.array, Series, lambda v: [v, v]])
def test_text_is_shown_with_the_way_out(make) -> None:
    with pytest.raises(TypeError) as caught:
        as_labels(make(["cat", "dog"]))
    assert str(caught.value) == f"data: labels are text ('cat'); {IDS}"


def test_text_of_every_kind() -> None:
    for labels, shown in (
        ("dog", "'dog'"), (b"dog", "\"b'dog'\""), (np.array([b"ox"]), "\"b'ox'\""),
        (np.array(["a", 1], dtype=object), "'a'"), (np.array([["x"], ["y"]]), "'x'"),
    ):  # fmt: skip
        with pytest.raises(TypeError) as caught:
            as_labels(labels)
        assert str(caught.value) == f"data: labels are text ({shown}); {IDS}"


def refused(error: type[Exception], message: str, labels: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        as_labels(labels)


def test_what_makes_no_labels_in_whole_sentences() -> None:
    none = "data: a label is None; a sample without one gets ignore_index (-100) instead"
    refused(TypeError, none, [0, None])
    refused(TypeError, none, (None, 1))
    for kind in (list, tuple):
        tensors = kind([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
        refused(TypeError, f"data: labels are a {kind.__name__} of 3 tensors; they must be one "
                "tensor, (N,) or (N, C), which a collate_fn can stack", tensors)  # fmt: skip
    ragged = ("data: labels of one batch differ in length; pad them with ignore_index (-100) in "
              "collate_fn")  # fmt: skip
    refused(ValueError, ragged, [[1, 2], [3]])
    single = "data: labels must have one entry per sample, got a single number"
    for labels in (3, 2.5, True, torch.tensor(1), np.int64(4)):
        refused(ValueError, single, labels)
    refused(TypeError, "data: labels must be real numbers, got torch.complex64",
            torch.zeros(2, dtype=torch.complex64))  # fmt: skip


@pytest.mark.parametrize(
    "given, dtype",
    [
        ([1, 0], torch.int64), ((1, 0), torch.int64), ([[1], [0]], torch.int64),
        (np.array([1, 0], dtype=np.uint8), torch.int64), (Series([1, 0]), torch.int64),
        ([torch.tensor(1), torch.tensor(0)], torch.int64), (np.array([True, False]), torch.bool),
        (torch.tensor([1, 0]).short(), torch.int64), (np.array([1.0, 0.0]), torch.float64),
        (torch.tensor([1.0, 0.0], dtype=torch.float16), torch.float16),
    ],
)  # fmt: skip
def test_integers_become_wide_and_all_else_stays(given, dtype) -> None:
    found = as_labels(given)
    assert found.dtype == dtype and found.flatten().tolist() == [1, 0]


def test_labels_take_no_part_in_a_graph() -> None:
    labels = torch.ones(3, requires_grad=True)
    found = as_labels(labels)
    assert not found.requires_grad and found.data_ptr() == labels.data_ptr()
    assert as_labels([]).numel() == 0 and as_labels(np.zeros(0)).numel() == 0


def test_ignored_labels_in_any_dtype() -> None:
    wide = torch.tensor([156, -100, 3])
    assert counts(wide, -100).tolist() == [True, False, True]
    assert counts(wide.to(torch.uint8), -100).tolist() == [True, True, True]
    assert counts(wide.to(torch.uint8), 156).tolist() == [False, False, True]
    assert counts(torch.tensor([1.0, -100.0]), -100).tolist() == [True, False]
    assert counts(torch.tensor([True, False]), 1).tolist() == [False, True]


SINGLE = torch.tensor([[1], [0], [1]])


def test_which_shapes_are_read_as_ids() -> None:
    ids = [1, 0, 1]
    for classes in (2, 3, 7):
        for dtype in (torch.int64, torch.uint8, torch.int32):
            found = fit_labels(SINGLE.to(dtype), classes, "cross_entropy")
            assert found.shape == (3,) and found.tolist() == ids
    for labels in (SINGLE.bool(), SINGLE[:, 0].bool()):
        found = fit_labels(labels, 2, "cross_entropy")
        assert found.dtype == torch.int64 and found.tolist() == ids
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        for loss in ("cross_entropy", "mse", "binary_cross_entropy"):
            found = fit_labels(torch.tensor(ids).to(dtype), 3, loss)
            assert found.dtype == torch.int64 and found.tolist() == ids
    # Of one class a column is a distribution, and one-hot rows of two are no ids.
    column = fit_labels(SINGLE, 1, "cross_entropy")
    assert (column.shape, column.dtype) == ((3, 1), torch.float32)
    for hot in (torch.tensor([[0, 1], [1, 0]]), torch.tensor([[False, True], [True, False]])):
        found = fit_labels(hot, 2, "cross_entropy")
        assert found.dtype == torch.float32 and found.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    for loss in ("mse", "binary_cross_entropy"):
        labels = torch.tensor([0.5, 1.5])
        assert fit_labels(labels, 1, loss).tolist() == [[0.5], [1.5]]
        assert fit_labels(labels, 2, loss) is labels
        assert fit_labels(SINGLE, 1, loss) is SINGLE and fit_labels(SINGLE, 2, loss) is SINGLE


@pytest.mark.parametrize("classes", [2, 3])
def test_numbers_that_are_no_ids_and_what_they_could_be(classes) -> None:
    way = (
        f"probabilities have shape (N, C) = (3, {classes}), ids are labels.long(), and the target "
        "of a regression goes with loss='mse'"
    )
    for labels, shape in ((SINGLE.float(), "(N, 1)"), (SINGLE[:, 0].double(), "(N,)")):
        kind = str(labels.dtype).removeprefix("torch.")
        message = f"labels of shape {shape} must be integer class ids, got {kind}; {way}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            fit_labels(labels, classes, "cross_entropy")
    with pytest.raises(TypeError) as caught:
        fit_labels(SINGLE[:, 0].float(), 1, "cross_entropy")
    assert str(caught.value) == (
        "labels of shape (N,) must be integer class ids, got float32; one output goes with "
        "loss='mse' (regression) or 'binary_cross_entropy'"
    )
    for kept in (SINGLE.float(), torch.zeros(3, 1, dtype=torch.complex64), torch.zeros(3, 5)):
        assert fit_labels(kept, 1, "cross_entropy") is kept


def test_tokens_that_count() -> None:
    labels = torch.tensor([[7, 7, 5], [7, 7, 7], [7, 3, 4]], dtype=torch.uint8)
    places, chosen, lengths = token_rows(labels, 7)
    assert (places.tolist(), chosen.tolist()) == ([2, 3, 7, 8], [5, 7, 3, 4])
    assert lengths.tolist() == [1, 1, 2]
    everything = token_rows(torch.tensor([[1, 2], [3, 4]]), -100)
    assert [one.tolist() for one in everything] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 2]]


def by_hand(labels: list[int], documents: list[int], shift: bool) -> tuple[list[int], ...]:
    """Places, labels and lengths, a document at a time; -1 is ignored."""
    places, chosen, lengths = [], [], []
    for document in range(max(documents) + 1):
        mine = [at for at, owner in enumerate(documents) if owner == document]
        found = []
        for at in mine:
            following = at + 1 if shift else at
            inside = following < len(documents) and documents[following] == document
            if inside and labels[following] != -1:
                found.append((at, labels[following]))
        lengths.append(max(1, len(found)))
        for at, label in found or [(mine[0], -1)]:
            places.append(at)
            chosen.append(label)
    return places, chosen, lengths


@pytest.mark.parametrize(
    "labels, documents",
    [
        ([-1, -1, 4, 5], [0, 0, 1, 1]),
        ([3, -1, -1, 5], [0, 1, 1, 2]),
        ([3, 4, 9, 9], [0, 0, -1, -1]),
        ([9, -1, -1, 8], [-1, 0, 0, 1]),
        ([-1, -1, -1, -1], [0, 0, 0, 0]),
        ([1, 2, 3, 4], [0, 1, 2, 3]),
        ([1, 2, 3, 4], [0, 0, 0, 0]),
    ],
)
def test_documents_in_rows(labels, documents) -> None:
    """In two rows of two tokens: a document may go on in the next row."""
    given = torch.tensor(labels).view(2, 2), torch.tensor(documents).view(2, 2)
    before = [one.clone() for one in given]
    for shift in (False, True):
        found = document_rows(*given, -1, shift)
        assert tuple(one.tolist() for one in found) == by_hand(labels, documents, shift)
    assert all(torch.equal(one, copy) for one, copy in zip(given, before, strict=True))
