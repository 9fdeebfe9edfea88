"""Errors that carry the place and the value they speak of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moso_fast import moso_scores
from moso_fast.core.errors import DataError


def test_a_refused_row_is_named_by_number() -> None:
    features, labels = torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1])
    features[3, 2] = torch.nan
    with pytest.raises(DataError) as caught:
        moso_scores(features, torch.ones(2, 3), labels)
    error = caught.value
    assert (error.row, error.column) == (3, 2) and error.value != error.value
    assert str(error).startswith("features[3, 2] is nan; row 3 is the first")


def test_the_number_moves_and_the_text_follows() -> None:
    error = DataError("labels[{row}] is {value}, outside [0, 3)", row=4, value=9)
    moved = error.moved(70, "part {a} of 2: ")
    assert str(moved) == "part {a} of 2: labels[70] is 9, outside [0, 3)"
    assert (moved.row, moved.value) == (70, 9)
    assert str(moved.moved(8)) == "part {a} of 2: labels[8] is 9, outside [0, 3)"
    for same in (pickle.loads(pickle.dumps(moved)), copy.deepcopy(moved)):
        assert (str(same), same.row, same.value) == (str(moved), moved.row, moved.value)


def test_an_error_keeps_its_facts_where_it_goes() -> None:
    text = "features[{row}, {column}] is {value}; row {row} is the first"
    error = DataError(text, row=4, column=2, value=0.5)
    assert repr(error) == "DataError('features[4, 2] is 0.5; row 4 is the first')"
    assert error.text == text
    moved = error.moved(70)
    copies = (moved, pickle.loads(pickle.dumps(moved)), copy.copy(moved), copy.deepcopy(moved))
    for one in copies:
        assert type(one) is DataError and isinstance(one, ValueError)
        assert (one.text, one.row, one.column, one.value) == (text, 70, 2, 0.5)
        assert str(one) == "features[70, 2] is 0.5; row 70 is the first"
    bare = pickle.loads(pickle.dumps(DataError("row {row} overflows", row=3))).moved(5, "part 1: ")
    assert (str(bare), bare.column, bare.value) == ("part 1: row 5 overflows", None, None)
