"""In full, what is said of files of arrays, and headers that are at their limits."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moso_fast.sources.arrays import (
    SUFFIXES,
    open_array,
    open_safetensors,
    read_labels,
    safetensors_names,
    split_spec,
)


def error_of(call: Any, *arguments: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def with_header(path: Path, header: Any, content: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_files_with_and_without_names(tmp_path: Path) -> None:
    plain, odd = tmp_path / "a.npy", tmp_path / "a.npy:b.NPY"
    for path in (plain, odd):
        path.touch()
    assert split_spec(str(plain), SUFFIXES) == (plain, None)
    assert split_spec(f"{plain}:x,y", SUFFIXES) == (plain, "x,y")
    assert split_spec(str(odd), SUFFIXES) == (odd, None), "a file of that name is there"
    assert split_spec(f"{odd}:x", SUFFIXES) == (odd, "x")
    for spec, kind, said in (
        ("a.txt", ValueError, "a.txt must be a .npy or .safetensors file"),
        ("a.txt:x", ValueError, "a.txt:x must be a .npy or .safetensors file"),
        ("no.npy", FileNotFoundError, "there is no file no.npy"),
        ("no.npy:x", FileNotFoundError, "there is no file no.npy"),
    ):
        assert error_of(split_spec, spec, SUFFIXES, kind=kind) == said
    np.save(plain, np.ones(2))
    assert error_of(open_array, f"{plain}:x") == f"{plain} holds one array; leave out ':x'"


def test_one_tensor_of_several(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({f"t{k}": torch.full((k + 1,), float(k)) for k in range(9)}, path)
    assert open_safetensors(path, "t3").tolist() == [3.0] * 4
    names = safetensors_names(path)
    eight = ", ".join(names[:8])
    assert error_of(open_safetensors, path) == (
        f"{path} holds 9 tensors: name one as t.safetensors:NAME; there are {eight} and 1 more"
    )
    assert error_of(open_array, f"{path}:x") == (
        f"{path} has no tensor 'x'; there are {eight} and 1 more"
    )
    save_file({f"t{k}": torch.ones(1) for k in range(8)}, path)
    listed = ", ".join(safetensors_names(path))
    assert error_of(open_safetensors, path, "x") == (
        f"{path} has no tensor 'x'; there are {listed}"
    )
    save_file({}, path)
    assert error_of(open_safetensors, path) == (
        f"{path} holds 0 tensors: name one as t.safetensors:NAME; there are none"
    )
    save_file({"a": torch.arange(3)}, path, metadata={"format": "pt"})
    assert open_array(path).tolist() == [0, 1, 2] and safetensors_names(path) == ["a"]


def test_headers_that_do_not_fit_their_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    assert open_safetensors(with_header(path, entry(), bytes(8))).tolist() == [0.0, 0.0]
    assert open_safetensors(with_header(path, entry(shape=(), offsets=(4, 8)), bytes(8))).dim() == 0
    assert open_safetensors(with_header(path, entry(shape=(0, 3), offsets=(0, 0)))).shape == (0, 3)
    for header in (
        entry(offsets=(0, 4)),
        entry(offsets=(0, 12)),
        entry(offsets=(4, 12)),
        entry("F64"),
    ):
        with_header(path, header, bytes(8))
        said = f"{path} is cut off or damaged: 'a' does not fit the file"
        assert error_of(open_safetensors, path) == said
    for header in (
        entry("F8_E5M2"),
        entry(None),
        entry(shape=("x",)),
        entry(shape=3),
        entry(offsets=(0,)),
        entry(offsets=None),
        {"a": {}},
    ):
        with_header(path, header, bytes(8))
        said = f"{path}: the entry 'a' is damaged or of an unknown dtype"
        assert error_of(open_safetensors, path, "a") == said
    with_header(path, {**entry(), "b": {"dtype": "F8_E5M2"}, "c": {}})
    assert safetensors_names(path) == ["a"]
    for header in (b"[1]", b"{", b"3"):
        with_header(path, header)
        said = f"{path} is not a .safetensors file: its header is no JSON object"
        assert error_of(open_safetensors, path) == said
    cut = f"{path} is not a .safetensors file, or is cut off"
    for content in (b"", b"\2\0\0\0", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**40)):
        path.write_bytes(content)
        assert error_of(open_safetensors, path) == cut
    assert open_safetensors(with_header(path, entry(offsets=(1, 9)), bytes(9))).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "U8", "I8", "I16", "BOOL"])
def test_numbers_begin_where_the_header_says(tmp_path: Path, dtype: str) -> None:
    size = 1 if dtype in ("U8", "I8", "BOOL") else 2
    path = tmp_path / "t.safetensors"
    content = b"\x7f" * 4 + bytes([1] * 2 * size)
    found = open_safetensors(with_header(path, entry(dtype, (2,), (4, 4 + 2 * size)), content))
    assert found.view(torch.uint8).tolist() == [1] * 2 * size and found.shape == (2,)


def test_npy_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3, ">f4"))
    assert error_of(open_array, path) == f"{path} holds big-endian numbers (>f4); save native ones"
    np.save(path, np.zeros(2, "V2"))
    assert error_of(open_array, path) == (
        f"{path} holds |V2, which torch lacks; bfloat16 goes into .safetensors"
    )
    np.save(path, np.array(["cat"]))
    assert error_of(open_array, path) == (
        f"{path} holds <U3, which torch lacks; class names become ids by numpy.unique(names, "
        "return_inverse=True)"
    )
    np.save(path, np.zeros(2, "M8[D]"))
    assert error_of(open_array, path) == f"{path} holds datetime64[D], which torch lacks"
    path.write_bytes(b"hello")
    assert error_of(open_array, path) == (
        f"{path} cannot be read: not an .npy file, or one of Python objects"
    )
    np.save(path, np.zeros(5))
    path.write_bytes(path.read_bytes()[:-1])
    assert error_of(open_array, path) == f"{path} cannot be read: the file is cut off"
    path.write_bytes(b"")
    assert error_of(open_array, path).startswith(f"{path} cannot be read: No data left in file")


def test_labels_of_every_width(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    for kind in ("u1", "u2", "u4", "u8", "i2", "f4"):
        for count in (0, 2):
            np.save(path, np.full(count, 200, kind))
            found = read_labels(path)
            assert found.tolist() == [200] * count
            wide = torch.int64 if kind in ("u2", "u4", "u8") else None
            assert wide is None or found.dtype == wide
    np.save(path, np.array([2**63 - 1], "u8"))
    assert read_labels(path).tolist() == [2**63 - 1]
    np.save(path, np.array([1, 2**63], "u8"))
    assert error_of(read_labels, path) == f"{path} holds a number above 2^63 - 1"
