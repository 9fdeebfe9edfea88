"""Arrays, pandas columns and lists where a tensor is meant, without a copy where none is needed.

The tensor shares the memory of what was given unless its numbers must be converted (pieces of a
list, another byte order, negative strides, unsigned integers that torch hardly knows). It may then
lie over memory that must not be written to, such as a column of pandas or a read-only file map:
whoever keeps one, or writes to it, takes a copy first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# DLPack's numbers for memory that the CPU can read: plain, and page-locked by CUDA.
_DLPACK_CPU = (1, 3)


class RaggedRows(ValueError):
    """Rows of nested lists that differ in length, so that they are no array."""


def as_tensors(**given: Any) -> list[Any]:
    """Return the named arguments in their order: tensors and None as they are, others converted.

    Raises as :func:`as_tensor`, with the name of the argument.
    """
    return [
        value if value is None or isinstance(value, Tensor) else as_tensor(name, value)
        for name, value in given.items()
    ]


def as_tensor(name: str, value: Any) -> Tensor:
    """Turn what holds numbers into a tensor; a tensor is returned as it is.

    Parameters
    ----------
    name
        Of the argument, for the messages.
    value
        NumPy array, pandas Series, DataFrame, Index or array, anything with ``__dlpack__``,
        ``__cuda_array_interface__``, ``__array__`` or ``__array_interface__`` (JAX, CuPy, polars,
        Arrow), a buffer, or a sequence of numbers, rows or tensors. Python's floats become
        float64, its integers int64; unsigned integers above 8 bits become int64; every other
        dtype is kept, bfloat16 of ml_dtypes too. Missing values of a floating-point column of
        pandas become NaN.

    Raises
    ------
    TypeError
        Text, dates, Python objects, structured or extended-precision numbers, something that is no
        array at all.
    ValueError
        Masked or missing values that no number can stand for, rows of different lengths, integers
        above 2^63 - 1.
    """
    if isinstance(value, Tensor):
        return value
    if _is_pandas(value):
        return _from_numpy(name, _of_pandas(name, value))
    if isinstance(value, np.ndarray):
        return _from_numpy(name, value)
    if hasattr(value, "__cuda_array_interface__") and not hasattr(value, "__dlpack__"):
        return torch.as_tensor(value, device="cuda")
    readable = hasattr(value, "__array__") or hasattr(value, "__array_interface__")
    if hasattr(value, "__dlpack__"):
        device = int(value.__dlpack_device__()[0])
        # On the CPU NumPy reads more: what is read-only, missing values, bfloat16 of ml_dtypes.
        if not (readable and device in _DLPACK_CPU):
            return _from_dlpack(name, value)
    if readable:
        return _from_numpy(name, np.asanyarray(value))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return _from_sequence(name, value)
    raise TypeError(
        f"{name} must be a torch.Tensor, an array, a pandas column or a list of numbers; "
        f"got {_kind(value)}"
    )


def _kind(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _is_pandas(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # not imported: then nothing can come from it
    if pandas is None:
        return False
    kinds = (
        pandas.Series,
        pandas.DataFrame,
        pandas.Index,
        pandas.api.extensions.ExtensionArray,
    )
    return isinstance(value, kinds)


def _of_pandas(name: str, value: Any) -> npt.NDArray[Any]:
    """Numbers of a column or frame; a view where pandas has them in one block."""
    if hasattr(value, "columns"):
        whole = value.to_numpy()
        if whole.dtype.kind in "biufc":
            return whole
        # Columns of kinds that pandas joins as objects, such as those with room for missing values.
        blocks = [_of_pandas(f"{name}[{column!r}]", value[column]) for column in _columns(value)]
        for column, block in zip(value.columns, blocks, strict=True):
            _check_kind(f"{name}[{column!r}]", block)
        return np.stack(blocks, axis=1) if blocks else whole
    kind = value.dtype
    own = getattr(kind, "numpy_dtype", None)  # of the dtypes that have room for missing values
    if own is None or own.kind not in "biuf":
        return value.to_numpy()  # _from_numpy names what it holds, if that is no number
    missing = value.isna()
    if own.kind != "f" and missing.any():
        raise ValueError(
            f"{name} has a missing value at position {int(np.argmax(missing))} of {kind} numbers; "
            "drop or fill it"
        )
    return value.to_numpy(dtype=own, **({"na_value": np.nan} if own.kind == "f" else {}))


def _columns(frame: Any) -> list[Any]:
    names = list(frame.columns)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the DataFrame has the column {twice!r} twice")
    return names


def _from_dlpack(name: str, value: Any) -> Tensor:
    try:
        return torch.from_dlpack(value)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TypeError(f"{name} ({_kind(value)}) cannot become a tensor: {reason}") from error


def _from_sequence(name: str, value: Sequence[Any]) -> Tensor:
    if isinstance(value, (list, tuple)) and any(isinstance(entry, Tensor) for entry in value):
        try:
            return torch.stack([as_tensor(f"{name}[{i}]", v) for i, v in enumerate(value)])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{name} is a list of tensors that do not stack to one: {reason}"
            ) from error
    known = isinstance(value, (list, tuple, range, memoryview)) or type(value).__name__ == "array"
    try:
        array = np.asarray(value if known else list(value))
    except ValueError as error:
        raise RaggedRows(f"{name} must be one array, but its rows differ in length") from error
    return _from_numpy(name, array)


def _from_numpy(name: str, array: npt.NDArray[Any]) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        masked = int(np.ma.count_masked(array))
        if masked:
            raise ValueError(
                f"{name} has {masked} masked value{'s' * (masked != 1)}, which a tensor cannot "
                "have; drop them, or fill them with .filled(...)"
            )
        array = array.data
    array = np.asarray(array)  # not as np.matrix or another subclass
    _check_kind(name, array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.dtype.itemsize == 8 and array.size and int(array.max()) > 2**63 - 1:
            raise ValueError(f"{name} holds {int(array.max())}, above 2^63 - 1")
        array = array.astype(np.int64)
    brain = array.dtype.name == "bfloat16"
    if brain:
        array = array.view(np.int16)
    # torch knows no negative strides, and none that end within a number.
    if any(step < 0 or step % array.itemsize for step in array.strides):
        array = array.copy()
    if not array.flags.writeable:
        array = np.asarray(_Lent(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if brain else tensor


class _Lent:
    """The memory of a read-only array, offered as if it could be written to.

    torch has no read-only tensors and warns about every array that is one; nothing here writes.
    Catching the warning instead would change a setting that other threads see.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array  # keeps the memory alive
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _check_kind(name: str, array: npt.NDArray[Any]) -> None:
    """Raise TypeError, with what to do, unless torch has numbers like these."""
    kind, dtype = array.dtype.kind, array.dtype
    if dtype.name == "bfloat16":
        return
    if kind in "biu" or (kind in "fc" and np.dtype(dtype).itemsize <= (8 if kind == "f" else 16)):
        return
    if kind == "O" and not isinstance(next(iter(array.flat), None), str):
        raise TypeError(f"{name} must hold numbers; it holds Python objects{_example(array)}")
    if kind in "OUST":
        raise TypeError(
            f"{name} must hold numbers; it holds text{_example(array)}; class names become "
            "class ids by numpy.unique(names, return_inverse=True)"
        )
    if kind in "mM":
        raise TypeError(f"{name} must hold numbers; it holds dates or times ({dtype})")
    if kind in "fc":
        raise TypeError(f"{name} holds {dtype}, which torch lacks; convert it with .astype(...)")
    raise TypeError(f"{name} must hold numbers of one kind; it holds {dtype}")


def _example(array: npt.NDArray[Any]) -> str:
    """Say which entry is no number, or, where all are, how to convert them."""
    for at, entry in zip(np.ndindex(array.shape), array.flat, strict=True):
        if not isinstance(entry, (bool, int, float, np.number)):
            where = f"[{', '.join(map(str, at))}]" if at else ""
            shown = repr(entry.item() if isinstance(entry, np.generic) else entry)
            if len(shown) > 40 or "\n" in shown:
                shown = f"a {_kind(entry)}"
            return f" ({shown} at {where})" if where else f" ({shown})"
    return " (dtype object); convert it with .astype(float) or .astype(int)"


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the elements of a tensor in main memory, in their order, as bytes."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    # A single element is contiguous whatever its stride says; a view as bytes asks for 1.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
