"""Columns and frames of pandas where tensors are meant, by a stand-in for pandas."""

from __future__ import annotations

import sys

import library_stand_ins as stand_ins
import numpy as np
import pytest
import torch
from library_stand_ins import Column, Frame, with_room

from moso_fast.util.array_like import as_tensor


@pytest.fixture
def pandas(monkeypatch):
    module = stand_ins.pandas()
    monkeypatch.setitem(sys.modules, "pandas", module)
    return module


INT64 = with_room("i8", "Int64")
FLOAT64 = with_room("f8", "Float64")
TEXT = with_room("O", "string")


def test_a_column_shares_its_memory(pandas):
    values = np.arange(4, dtype=np.float32)
    for kind in (pandas.Series, pandas.Index):
        found = as_tensor("labels", kind(values))
        assert found.dtype == torch.float32
        assert found.data_ptr() == values.__array_interface__["data"][0]


def test_without_pandas_nothing_is_a_column(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(TypeError, match=r"a list of numbers; got library_stand_ins\.Column$"):
        as_tensor("labels", Column([1, 2]))


def test_an_array_of_pandas_is_read_as_a_column_is(pandas):
    array = type("Array", (Column, pandas.api.extensions.ExtensionArray), {})
    assert as_tensor("labels", array([3, 4])).tolist() == [3, 4]


def test_missing_values_of_floats_become_nan_and_of_others_are_refused(pandas):
    found = as_tensor("scores", Column([1.0, 7.0, 2.0], FLOAT64, missing=[1]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.tensor([1, np.nan, 2], dtype=torch.float64), equal_nan=True
    )
    whole = as_tensor("labels", Column(np.array([1, 2], dtype=object), INT64))
    assert whole.dtype == torch.int64 and whole.tolist() == [1, 2]
    with pytest.raises(ValueError) as caught:
        as_tensor("labels", Column([1, 7, 7], INT64, missing=[1, 2]))
    expected = "labels has a missing value at position 1 of Int64 numbers; drop or fill it"
    assert str(caught.value) == expected


def test_text_with_room_for_missing_values_is_named(pandas):
    with pytest.raises(TypeError, match=r"labels must hold numbers; it holds text \('cat' at \[0"):
        as_tensor("labels", Column(np.array(["cat", None], dtype=object), TEXT))


def test_a_frame_of_one_kind_is_one_block(pandas):
    block = np.arange(6.0).reshape(3, 2)
    found = as_tensor("features", Frame(block, [("a", None), ("b", None)]))
    assert found.data_ptr() == block.__array_interface__["data"][0] and found.shape == (3, 2)
    empty = as_tensor("features", Frame(np.empty((3, 0)), []))
    assert empty.shape == (3, 0)


def test_a_frame_of_several_kinds_is_read_by_column(pandas):
    joined = np.empty((2, 2), dtype=object)
    columns = [("a", Column([1, 2], INT64)), ("b", Column([0.5, 0.0], FLOAT64, missing=[1]))]
    found = as_tensor("features", Frame(joined, columns))
    expected = torch.tensor([[1, 0.5], [2, np.nan]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            [("a", Column([1, 2])), ("name", Column(np.array(["x", "y"], dtype=object)))],
            TypeError,
            "features['name'] must hold numbers; it holds text ('x' at [0]); class names become "
            "class ids by numpy.unique(names, return_inverse=True)",
        ),
        (
            [("a", Column([1, 2], INT64, missing=[0]))],
            ValueError,
            "features['a'] has a missing value at position 0 of Int64 numbers; drop or fill it",
        ),
        (
            [("a", Column([1])), ("b", Column([2])), ("b", Column([3])), ("a", Column([3]))],
            ValueError,
            "the DataFrame has the column 'a' twice",
        ),
    ],
)
def test_what_a_frame_cannot_hold_is_named_by_its_column(pandas, columns, error, message):
    with pytest.raises(error) as caught:
        as_tensor("features", Frame(np.empty((2, 2), dtype=object), columns))
    assert str(caught.value) == message


def test_a_frame_of_no_columns_of_objects_names_its_kind(pandas):
    with pytest.raises(TypeError, match="features must hold numbers; it holds Python objects"):
        as_tensor("features", Frame(np.empty((2, 0), dtype=object), []))
