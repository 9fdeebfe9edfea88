"""Tensors over .npy and .safetensors files without reading them: read-only memory maps."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".npy", ".safetensors")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a map is read as before it is viewed as bfloat16, which NumPy does not have.
_NUMPY_NAMES = {torch.bfloat16: "<i2", torch.bool: "|b1"}


def split_spec(spec: str, suffixes: tuple[str, ...]) -> tuple[Path, str | None]:
    """Split ``FILE[:NAMES]`` into the path of a file with a known suffix and the names, or None.

    Raises
    ------
    ValueError
        No such file, or a suffix that is not among ``suffixes``.
    """
    path, names = Path(spec), None
    if not path.is_file() and ":" in spec:
        before, _, after = spec.rpartition(":")
        if Path(before).suffix.lower() in suffixes:
            path, names = Path(before), after
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must be a {' or '.join(suffixes)} file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path, names


def open_array(spec: str | os.PathLike[str]) -> Tensor:
    """Map ``FILE.npy`` or ``FILE.safetensors[:NAME]`` as a tensor that must not be written to.

    Nothing is read but the header: pages come from the disk when they are used, and files larger
    than the memory are fine (a writable map of those is refused by the kernel).

    Parameters
    ----------
    spec
        Path; for .safetensors with several tensors, ``:NAME`` says which.

    Raises
    ------
    ValueError
        Unknown suffix, damaged file, a dtype that torch lacks, an unknown or missing name.
    FileNotFoundError
        No such file.
    """
    path, name = split_spec(os.fspath(spec), SUFFIXES)
    if path.suffix.lower() == ".npy":
        if name is not None:
            raise ValueError(f"{path} holds one array; leave out ':{name}'")
        return _from_numpy(path, _map_npy(path))
    return open_safetensors(path, name)


def open_safetensors(path: Path, name: str | None = None) -> Tensor:
    """Map one tensor of a .safetensors file; ``name`` may be left out where there is only one."""
    entries, start = _safetensors_entries(path)
    if name is None:
        if len(entries) != 1:
            raise ValueError(
                f"{path} holds {len(entries)} tensors: name one as {path.name}:NAME; "
                f"there are {_listed(entries)}"
            )
        name = next(iter(entries))
    if name not in entries:
        raise ValueError(f"{path} has no tensor {name!r}; there are {_listed(entries)}")
    try:
        dtype = _SAFETENSORS_DTYPES[entries[name]["dtype"]]
        shape = tuple(int(length) for length in entries[name]["shape"])
        first, last = entries[name]["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the entry {name!r} is damaged or of an unknown dtype") from error
    itemsize = torch.empty((), dtype=dtype, device="cpu").element_size()
    if last - first != math.prod(shape) * itemsize or start + last > path.stat().st_size:
        raise ValueError(f"{path} is cut off or damaged: {name!r} does not fit the file")
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device="cpu")
    kind = _NUMPY_NAMES.get(dtype) or f"<{_numpy_letter(dtype)}{itemsize}"
    values = np.memmap(path, dtype=kind, mode="r", offset=start + first, shape=shape)
    return _from_numpy(path, values).view(dtype)


def safetensors_names(path: Path) -> list[str]:
    """Names of the tensors in a .safetensors file whose dtype is known here."""
    entries = _safetensors_entries(path)[0]
    return [name for name, entry in entries.items() if entry.get("dtype") in _SAFETENSORS_DTYPES]


def read_labels(spec: str | os.PathLike[str]) -> Tensor:
    """Read labels (class ids or targets) into memory; unsigned ids become int64.

    Raises as :func:`open_array`, and ValueError for ids above 2^63.
    """
    values = open_array(spec)
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = values.to(torch.int64)
        if wide.numel() and int(wide.min()) < 0:
            raise ValueError(f"{spec} holds a number above 2^63 - 1")
        return wide
    return values.clone()


def _numpy_letter(dtype: torch.dtype) -> str:
    return "f" if dtype.is_floating_point else "u" if dtype == torch.uint8 else "i"


def _listed(entries: dict[str, Any]) -> str:
    names = list(entries)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


def _map_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        if "Object arrays" in reason or "allow_pickle" in reason:
            reason = "not an .npy file, or one of Python objects"
        if "mmap length is greater" in reason:
            reason = "the file is cut off"
        # An array without elements cannot be mapped, and need not be.
        if "empty" in reason:
            return np.load(path, allow_pickle=False)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _from_numpy(path: Path, values: np.ndarray[Any, Any]) -> Tensor:
    if not values.dtype.isnative:
        raise ValueError(f"{path} holds big-endian numbers ({values.dtype}); save native ones")
    with warnings.catch_warnings():
        # The map is read-only on purpose, and nothing here writes to features.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(values)
        except (TypeError, ValueError) as error:
            hint = {
                "V": "; bfloat16 goes into .safetensors",
                "U": "; class names become ids by numpy.unique(names, return_inverse=True)",
            }.get(values.dtype.kind, "")
            raise ValueError(f"{path} holds {values.dtype}, which torch lacks{hint}") from error


def _safetensors_entries(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of the header and the position of the first byte of data.

    Read here rather than by the safetensors package because that maps the whole file writable,
    which Linux refuses for files above the size of the memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path} is not a .safetensors file, or is cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a .safetensors file: its header is no JSON object"
        ) from error
    return entries, 8 + length
