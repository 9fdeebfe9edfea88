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
