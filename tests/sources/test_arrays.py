"""Memory-mapped arrays and heads in files."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moso_fast.sources.arrays import open_array, read_labels
from moso_fast.sources.heads import read_head, stack_heads

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_of_every_dtype(tmp_path, dtype):
    values = (torch.randn(6, 5) * 20).to(dtype)
    other = torch.ones(3, dtype=torch.uint8)  # an odd number of bytes before the rest
    save_file(
        {"a": other, "features": values, "none": torch.empty(0, 4)}, tmp_path / "t.safetensors"
    )
    found = open_array(f"{tmp_path / 't.safetensors'}:features")
    assert found.dtype == dtype and torch.equal(found, values)
    assert open_array(f"{tmp_path / 't.safetensors'}:none").shape == (0, 4)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_every_dtype_and_order(tmp_path, dtype, order):
    values = np.asarray(np.random.default_rng(0).normal(size=(6, 5)) * 20).astype(
        dtype, order=order
    )
    np.save(tmp_path / "t.npy", values)
    assert np.array_equal(open_array(tmp_path / "t.npy").numpy(), values)
    np.save(tmp_path / "empty.npy", values[:0])
    assert open_array(tmp_path / "empty.npy").shape == (0, 5)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_files_above_the_memory_are_mapped_not_read(tmp_path, suffix):
    rows, columns = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4096, 1024
    path = tmp_path / f"big{suffix}"
    if suffix == ".npy":
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, columns), "f4"))
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, columns)})
            start = file.tell()
    else:
        entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}
        text = json.dumps({"x": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        start = 8 + len(text)
    try:
        os.truncate(path, start + rows * columns * 4)
    except OSError as error:
        pytest.skip(f"the file system takes no sparse file of this size: {error}")
    with path.open("r+b") as file:
        file.seek(start + (rows - 1) * columns * 4)
        file.write(np.float32(2.5).tobytes())
    values = open_array(path)
    assert values.shape == (rows, columns) and values[-1, :2].tolist() == [2.5, 0.0]
    path.unlink()


def test_labels_are_widened_and_writable(tmp_path):
    np.save(tmp_path / "y.npy", np.array([1, 65535], dtype=np.uint16))
    labels = read_labels(tmp_path / "y.npy")
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 65535]
    np.save(tmp_path / "y.npy", np.array([1, 2], dtype=np.int64))
    labels = read_labels(tmp_path / "y.npy")
    assert not mapped(labels, tmp_path / "y.npy")  # else the next line would end the process
    labels[0] = 9
    assert read_labels(tmp_path / "y.npy").tolist() == [1, 2]
    np.save(tmp_path / "y.npy", np.array([2**64 - 1], dtype=np.uint64))
    with pytest.raises(ValueError, match="above 2\\^63"):
        read_labels(tmp_path / "y.npy")


def write_bad_files(folder):
    np.save(folder / "ok.npy", np.zeros((3, 2), "f4"))
    np.save(folder / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "big.npy", np.zeros(3, ">f4"))
    np.save(folder / "complex.npy", np.zeros(3, "c16").view("V8"))
    (folder / "junk.npy").write_text("hello")
    (folder / "nothing.npy").write_bytes(b"")
    (folder / "cut.npy").write_bytes((folder / "ok.npy").read_bytes()[:-1])
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "two.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-1])
    (folder / "junk.safetensors").write_text("hello world, this is no header at all")
    (folder / "short.safetensors").write_bytes(b"\x01")
    text = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'
    (folder / "lie.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    text = b'{"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'
    (folder / "f8.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    text = b"[1, 2, 3]"
    (folder / "list.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("no.npy", FileNotFoundError, "there is no file"),
        ("ok.txt", ValueError, r"must be a \.npy or \.safetensors file"),
        ("ok.npy:x", ValueError, "holds one array; leave out ':x'"),
        ("object.npy", ValueError, "object.npy cannot be read: .*Python objects"),
        ("big.npy", ValueError, "big-endian"),
        ("complex.npy", ValueError, "which torch lacks; bfloat16 goes into .safetensors"),
        ("junk.npy", ValueError, "not an .npy file"),
        ("nothing.npy", ValueError, "nothing.npy cannot be read"),
        ("cut.npy", ValueError, "the file is cut off"),
        ("two.safetensors", ValueError, "holds 2 tensors: name one as two.safetensors:NAME"),
        ("two.safetensors:c", ValueError, "has no tensor 'c'; there are a, b"),
        ("cut.safetensors:b", ValueError, "cut off or damaged"),
        ("junk.safetensors", ValueError, "not a .safetensors file"),
        ("short.safetensors", ValueError, "not a .safetensors file"),
        ("lie.safetensors", ValueError, "cut off or damaged"),
        ("f8.safetensors", ValueError, "damaged or of an unknown dtype"),
        ("list.safetensors", ValueError, "header is no JSON object"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path, spec, error, message):
    write_bad_files(tmp_path)
    with pytest.raises(error, match=message) as caught:
        open_array(f"{tmp_path}/{spec}")
    assert "\n" not in str(caught.value)


@pytest.fixture
def pair():
    return torch.randn(3, 4), torch.randn(3)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("weight", "bias"), ""),
        (("model.fc.weight", "model.fc.bias"), ""),
        (("W", "b"), ":W,b"),
        (("fc.weight", "fc.bias"), ":fc.weight,fc.bias"),
    ],
)
def test_heads_with_a_bias(tmp_path, pair, suffix, names, given):
    path = tmp_path / f"head{suffix}"
    write(path, dict(zip(names, pair, strict=True)))
    head = read_head(f"{path}{given}")
    assert torch.equal(head.weight, pair[0])
    assert head.bias is not None and torch.equal(head.bias, pair[1])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".npy"])
def test_heads_without_a_bias(tmp_path, pair, suffix):
    path = tmp_path / f"head{suffix}"
    write(path, {"weight": pair[0]})
    assert read_head(str(path)).bias is None
    write(path, {"weight": pair[0], "bias": pair[1]} if suffix != ".npy" else {"weight": pair[0]})
    head = read_head(f"{path}:weight")
    assert head.bias is None and torch.equal(head.weight, pair[0])


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
    elif path.suffix == ".npy":
        np.save(path, tensors["weight"].numpy())
    else:
        torch.save(tensors, path)


def test_torch_files_bring_their_learning_rate(tmp_path, pair):
    torch.save({"net": {"fc.weight": pair[0], "fc.bias": pair[1]}, "lr": 0.25}, tmp_path / "c.pt")
    assert read_head(str(tmp_path / "c.pt")).lr == 0.25


def test_torch_files_run_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was_here"),))

    torch.save({"weight": Harmful()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="weights_only"):
        read_head(str(tmp_path / "c.pt"))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("tensors", "given", "message"),
    [
        ({"a": (3, 4), "b": (3, 4)}, "", r"must hold one matrix, .*: a \(3, 4\), b \(3, 4\)"),
        ({"a": (3,)}, "", "matrices there: none"),
        ({"weight": (3, 4), "shift": (3,)}, "", "is 'shift' the bias of 'weight'"),
        ({"weight": (3, 4), "bias": (4,)}, ":weight,bias", r"must be \(3,\) to go with"),
        ({"weight": (3, 4)}, ":weigth", "no tensor 'weigth'; there are weight"),
        ({"weight": (3, 4)}, ":a,b,c", "the names are WEIGHT or WEIGHT,BIAS"),
        ({"weight": (3, 4)}, ":weight,", "the names are WEIGHT or WEIGHT,BIAS"),
        ({"weight": (2, 3, 4)}, ":weight", r"must be \(C, D\); got \(2, 3, 4\)"),
    ],
)
def test_heads_that_are_unclear(tmp_path, tensors, given, message):
    path = tmp_path / "h.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=message):
        read_head(f"{path}{given}")


def test_integer_heads_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="must be floating point"):
        read_head(f"{tmp_path / 'h.safetensors'}:weight")


def test_heads_of_equal_shape_are_stacked(tmp_path):
    shapes = {"a": (3, 4), "b": (2, 4), "c": (3, 4)}
    for name, shape in shapes.items():
        save_file(
            {"weight": torch.randn(shape), "bias": torch.randn(shape[0])},
            tmp_path / f"{name}.safetensors",
        )
    heads = [read_head(str(tmp_path / f"{name}.safetensors")) for name in shapes]
    groups = stack_heads(heads)
    assert [numbers for numbers, _, _ in groups] == [[0, 2], [1]]
    numbers, weight, bias = groups[0]
    assert weight.shape == (2, 3, 4) and bias is not None and bias.shape == (2, 3)
    assert torch.equal(weight[1], heads[numbers[1]].weight)


def mapped(tensor, path):
    """Whether a tensor lies in a memory map of the file, to which nobody may write."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in fields[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return fields[5:] == [str(path)]
    return False


def test_what_may_be_written_to_is_no_map_of_a_file(tmp_path):
    features, head = tmp_path / "f.npy", tmp_path / "w.npy"
    np.save(features, np.zeros((3, 4), np.float32))
    np.save(head, np.zeros((2, 4), np.float32))
    assert mapped(open_array(features), features)  # so the other lines show something
    assert not mapped(read_head(str(head)).weight, head)
    for kind in (np.int64, np.uint16, np.float32):
        labels = tmp_path / f"{np.dtype(kind).name}.npy"
        np.save(labels, np.zeros(5, kind))
        assert not mapped(read_labels(labels), labels)
