"""In full, what is said of values that are no numbers for a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moso_fast.util.array_like import RaggedRows, as_tensor

LONG, COMPLEX = np.dtype(np.longdouble), np.dtype(np.clongdouble)  # other names elsewhere
NAMES = "class names become class ids by numpy.unique(names, return_inverse=True)"
NONE = "labels must be a torch.Tensor, an array, a pandas column or a list of numbers; got "


class Long:
    def __repr__(self) -> str:
        return "x" * 41


class Lines:
    def __repr__(self) -> str:
        return "a\nb"


class Limit:
    def __repr__(self) -> str:
        return "x" * 40


def objects(*entries):
    found = np.empty(len(entries), dtype=object)
    found[:] = entries
    return found


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({1}, TypeError, f"{NONE}set"),
        (bytearray(b"1"), TypeError, f"{NONE}bytearray"),
        (Long(), TypeError, f"{NONE}test_array_like_errors.Long"),
        (
            np.ma.array([1, 2, 3], mask=[1, 0, 0]),
            ValueError,
            "labels has 1 masked value, which a tensor cannot have; drop them, or fill them with "
            ".filled(...)",
        ),
        (
            np.ma.array([1, 2, 3], mask=[1, 0, 1]),
            ValueError,
            "labels has 2 masked values, which a tensor cannot have; drop them, or fill them with "
            ".filled(...)",
        ),
        (
            np.array([0, 2**63], "u8"),
            ValueError,
            "labels holds 9223372036854775808, above 2^63 - 1",
        ),
        (
            [[1, 2], [3]],
            RaggedRows,
            "labels must be one array, but its rows differ in length",
        ),
        (["a", "b"], TypeError, f"labels must hold numbers; it holds text ('a' at [0]); {NAMES}"),
        (
            np.array(["ab"], "S2"),
            TypeError,
            f"labels must hold numbers; it holds text (b'ab' at [0]); {NAMES}",
        ),
        (
            np.array("ab"),
            TypeError,
            f"labels must hold numbers; it holds text ('ab'); {NAMES}",
        ),
        (
            [["x" * 39]],
            TypeError,
            f"labels must hold numbers; it holds text (a numpy.str_ at [0, 0]); {NAMES}",
        ),
        (
            objects(1, None),
            TypeError,
            "labels must hold numbers; it holds Python objects (None at [1])",
        ),
        (
            objects(1.5, Limit()),
            TypeError,
            f"labels must hold numbers; it holds Python objects ({'x' * 40} at [1])",
        ),
        (
            objects(np.float32(2), Long()),
            TypeError,
            "labels must hold numbers; it holds Python objects (a test_array_like_errors.Long at "
            "[1])",
        ),
        (
            objects(True, Lines()),
            TypeError,
            "labels must hold numbers; it holds Python objects (a test_array_like_errors.Lines at "
            "[1])",
        ),
        (
            objects(1, 2),
            TypeError,
            "labels must hold numbers; it holds Python objects (dtype object); convert it with "
            ".astype(float) or .astype(int)",
        ),
        (
            np.array(["2020-01-01"], "M8[D]"),
            TypeError,
            "labels must hold numbers; it holds dates or times (datetime64[D])",
        ),
        (
            np.array([1], "m8[s]"),
            TypeError,
            "labels must hold numbers; it holds dates or times (timedelta64[s])",
        ),
        (
            np.zeros(1, np.longdouble),
            TypeError,
            f"labels holds {LONG}, which torch lacks; convert it with .astype(...)",
        ),
        (
            np.zeros(1, np.clongdouble),
            TypeError,
            f"labels holds {COMPLEX}, which torch lacks; convert it with .astype(...)",
        ),
        (
            np.zeros(1, "V3"),
            TypeError,
            "labels must hold numbers of one kind; it holds |V3",
        ),
    ],
)
def test_what_is_said(value, kind, said):
    with pytest.raises(kind) as caught:
        as_tensor("labels", value)
    assert str(caught.value) == said


def test_pieces_that_do_not_stack():
    with pytest.raises(ValueError) as caught:
        as_tensor("labels", [torch.ones(2), torch.ones(3)])
    assert str(caught.value) == (
        "labels is a list of tensors that do not stack to one: stack expects each tensor to be "
        "equal size, but got [2] at entry 0 and [3] at entry 1"
    )
    with pytest.raises(TypeError, match=r"^labels\[1\] must hold numbers; it holds text \('a' at"):
        as_tensor("labels", [torch.ones(1), ["a"]])
    mixed = as_tensor("labels", [torch.ones(2), [3.0, 4.0]])
    assert mixed.tolist() == [[1.0, 1.0], [3.0, 4.0]]


def test_numbers_of_every_kind_that_torch_has():
    for kind in ("f2", "f4", "f8", "c8", "c16", "i1", "i2", "i4", "i8", "u1", "?"):
        found = as_tensor("labels", np.ones(2, kind))
        assert found.tolist() == [1, 1] and str(found.numpy().dtype) == str(np.dtype(kind))
    for kind in ("u2", "u4", "u8", ">u2"):
        found = as_tensor("labels", np.array([1, 3], kind))
        assert found.dtype == torch.int64 and found.tolist() == [1, 3]
    assert as_tensor("labels", np.empty(0, "u8")).shape == (0,)
    assert as_tensor("labels", np.array([2**63 - 1], "u8")).tolist() == [2**63 - 1]
    assert as_tensor("labels", np.ma.array([1, 2], mask=[0, 0])).tolist() == [1, 2]
