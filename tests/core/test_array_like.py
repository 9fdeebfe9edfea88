"""Arrays and lists where tensors are meant: the numbers, the memory and the errors."""

from __future__ import annotations

import array
import warnings

import numpy as np
import pytest
import torch

from moso_fast.util.array_like import as_tensor, as_tensors


class ByDlpack:
    """What CuPy and other libraries offer: DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class ByInterface:
    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self.values = values


class ByArray:
    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values


def read_only(values):
    values.flags.writeable = False
    return values


GRID = np.arange(12, dtype=np.float32).reshape(3, 4)

SHARED = {
    "float32": GRID,
    "float64 transposed": GRID.astype(np.float64).T,
    "float16 sliced": GRID.astype(np.float16)[::2, 1:],
    "int64": np.arange(5),
    "uint8": np.arange(5, dtype=np.uint8),
    "bool": np.array([True, False]),
    "one row repeated": np.broadcast_to(GRID[0], (6, 4)),
    "read-only": read_only(GRID.copy()),
    "without rows": np.empty((0, 4), dtype=np.float32),
}


@pytest.mark.parametrize("name", SHARED)
def test_arrays_share_their_memory_without_a_warning(name):
    values = SHARED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = as_tensor("features", values)
    assert tensor.shape == values.shape and np.array_equal(tensor.numpy(), values)
    assert tensor.data_ptr() == values.__array_interface__["data"][0] or not values.size
    assert tuple(s * tensor.element_size() for s in tensor.stride()) == values.strides


def test_a_shared_tensor_keeps_the_memory_alive():
    tensor = as_tensor("features", read_only(np.full(1 << 20, 7.0)))
    others = [np.full(1 << 20, 1.0) for _ in range(4)]
    assert tensor.eq(7).all() and len(others) == 4


CONVERTED = {
    "big-endian": (GRID.astype(">f4"), torch.float32, GRID),
    "big-endian ids": (np.arange(3).astype(">i8"), torch.int64, [0, 1, 2]),
    "reversed": (GRID[::-1, ::-1], torch.float32, GRID[::-1, ::-1].copy()),
    "field of records": (
        np.array([(1, 2.5), (2, 3.5)], dtype=[("a", "i1"), ("b", "<f4")])["b"],
        torch.float32,
        [2.5, 3.5],
    ),
    "uint16": (np.array([65535], dtype=np.uint16), torch.int64, [65535]),
    "uint64": (np.array([2**63 - 1], dtype=np.uint64), torch.int64, [2**63 - 1]),
    "masked nowhere": (np.ma.array([1.0, 2.0], mask=[False, False]), torch.float64, [1.0, 2.0]),
    "floats": ([1, 2.5], torch.float64, [1.0, 2.5]),
    "close floats": ([1.0, 1.0 + 1e-15], torch.float64, [1.0, 1.0 + 1e-15]),
    "ids": ((3, 1, 2), torch.int64, [3, 1, 2]),
    "range": (range(2, 5), torch.int64, [2, 3, 4]),
    "rows": ([[1.0, 2.0], (3.0, 4.0)], torch.float64, [[1.0, 2.0], [3.0, 4.0]]),
    "tensors": ([torch.tensor(3), torch.tensor(4)], torch.int64, [3, 4]),
    "rows of tensors": ([torch.ones(2), torch.zeros(2)], torch.float32, [[1.0, 1.0], [0.0, 0.0]]),
    "array": (array.array("d", [1.5, 2.5]), torch.float64, [1.5, 2.5]),
    "memoryview": (memoryview(np.array([1, 2])), torch.int64, [1, 2]),
    "dlpack": (ByDlpack(torch.arange(3)), torch.int64, [0, 1, 2]),
    "interface": (ByInterface(GRID), torch.float32, GRID),
    "__array__": (ByArray(GRID), torch.float32, GRID),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_other_forms_give_their_numbers(name):
    value, dtype, expected = CONVERTED[name]
    tensor = as_tensor("labels", value)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, torch.tensor(np.array(expected)).to(dtype))


TEXT = (
    r"labels must hold numbers; it holds text \('cat' at \[0\]\); class names become class ids by"
)
REFUSED = {
    "text": (["cat", "dog"], TypeError, TEXT),
    "text array": (np.array(["cat", "dog"]), TypeError, TEXT),
    "text among numbers": ([1, "dog"], TypeError, r"it holds text \('1' at \[0\]\)"),
    "one text": ("cat", TypeError, "labels must be a torch.Tensor, an array, a pandas "),
    "bytes": (b"123", TypeError, "a list of numbers; got bytes"),
    "set": ({1, 2}, TypeError, "a list of numbers; got set"),
    "dict": ({0: 1}, TypeError, "a list of numbers; got dict"),
    "generator": ((i for i in range(2)), TypeError, "a list of numbers; got generator"),
    "number": (3, TypeError, "a list of numbers; got int"),
    "missing entry": ([1, None], TypeError, r"it holds Python objects \(None at \[1\]\)"),
    "objects": (np.array([1, 2], dtype=object), TypeError, r"\(dtype object\); convert it with"),
    "text objects": (np.array(["cat", None], dtype=object), TypeError, TEXT),
    "dates": (np.array(["2020-01-01"], dtype="M8[D]"), TypeError, "it holds dates or times"),
    "records": (np.zeros(2, dtype="f4,f4"), TypeError, "must hold numbers of one kind; it holds"),
    "long double": (np.zeros(2, dtype=np.longdouble), TypeError, "which torch lacks; convert it"),
    "ragged": ([[1, 2], [3]], ValueError, "labels must be one array, but its rows differ"),
    "ragged tensors": ([torch.ones(2), torch.ones(3)], ValueError, "do not stack to one"),
    "masked": (np.ma.array([1, 2], mask=[True, False]), ValueError, "labels has 1 masked value, "),
    "large uint64": (np.array([2**63], dtype=np.uint64), ValueError, "9223372036854775808, above"),
    "sparse of dlpack": (ByDlpack(torch.ones(2).to_sparse()), TypeError, "labels .* cannot become"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_of_numbers_is_refused_in_one_line(name):
    value, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        as_tensor("labels", value)
    assert "\n" not in str(caught.value)


def test_tensors_and_none_pass_as_they_are():
    tensor = torch.nn.Parameter(torch.ones(2))
    found = as_tensors(features=tensor, labels=[1, 2], bias=None)
    assert found[0] is tensor and found[2] is None and found[1].tolist() == [1, 2]
    assert as_tensor("features", tensor) is tensor


def test_a_compiled_function_sees_through_it():
    compiled = torch.compile(
        lambda x, y: as_tensors(features=x, labels=y, bias=None)[0] * 2,
        backend="eager",
        fullgraph=True,
    )
    assert compiled(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
