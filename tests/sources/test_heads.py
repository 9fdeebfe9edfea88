"""Linear heads that callers give or files hold: what is taken, and in full what is said."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moso_fast.sources.arrays import safetensors_names
from moso_fast.sources.checkpoints.checkpoint import Checkpoint
from moso_fast.sources.checkpoints.rates import ScoredParameters
from moso_fast.sources.heads import Head, check_finite, head_of, read_head, stack_heads

WEIGHT = torch.arange(12.0).reshape(3, 4)
BIAS = torch.tensor([1.0, 2.0, 3.0])
STATE = {"fc.weight": WEIGHT, "fc.bias": BIAS}


def holds(head: Head, bias: Tensor | None = BIAS) -> bool:
    same = (head.bias is bias is None) or bool((head.bias == bias).all())
    return torch.equal(head.weight, WEIGHT) and same


def error_of(call: Any, *arguments: Any, kind: type = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def test_heads_as_callers_have_them(tmp_path: Path) -> None:
    torch.save({"model": STATE, "lr": 0.5, "ema": {"fc.weight": BIAS[:, None]}}, tmp_path / "h.pt")
    path = tmp_path / "h.pt"
    assert holds(head_of(WEIGHT, "head"), None) and holds(head_of(WEIGHT.numpy(), "head"), None)
    assert holds(head_of((WEIGHT, None), "head"), None)
    assert holds(head_of((WEIGHT.tolist(), BIAS.numpy()), "head"))
    assert holds(head_of(STATE, "head")) and head_of(STATE, "head").lr is None
    assert holds(head_of({"net": STATE, "lr": 0.25}, "head"))
    assert head_of({"net": STATE, "lr": 0.25}, "head").lr == 0.25
    for given in (path, str(path), Checkpoint(path), Checkpoint(path, entry="model")):
        assert holds(head_of(given, "head")) and head_of(given, "head").lr == 0.5
    for given in (Checkpoint(path, lr=0.125), Checkpoint(path, lr=0.125, entry="model")):
        assert holds(head_of(given, "head")) and head_of(given, "head").lr == 0.125
    assert head_of(Checkpoint(STATE, lr=2), "head").lr == 2.0
    assert not head_of((WEIGHT.clone().requires_grad_(), None), "head").weight.requires_grad


def test_where_a_head_is_from_and_what_is_scored(tmp_path: Path) -> None:
    save_file({**STATE, "other": torch.zeros(3, 4, 1)}, tmp_path / "h.safetensors")
    spec = f"{tmp_path}/h.safetensors:fc.weight,fc.bias"
    head = read_head(spec)
    assert head.source == spec and head.stated is None
    scored = head.scored
    assert scored is not None and scored.what == "the head"
    assert scored.shapes == {"fc.weight": (3, 4), "fc.bias": (3,)}
    assert scored.in_model == {(3, 4): 1, (3,): 1, (3, 4, 1): 1}
    alone = read_head(f"{tmp_path}/h.safetensors:fc.weight").scored
    assert alone is not None and alone.shapes == {"fc.weight": (3, 4)}
    given = head_of((WEIGHT, BIAS), "head")
    assert given.source == "head" and given.stated is None
    assert given.scored == ScoredParameters(
        {"weight": (3, 4), "bias": (3,)}, "the head", {(3, 4): 1, (3,): 1}
    )


def test_a_head_on_a_device_and_with_a_rate() -> None:
    head = head_of((WEIGHT, BIAS), "head")
    moved = head.on(torch.device("meta"))
    assert moved.weight.is_meta and moved.bias is not None and moved.bias.is_meta
    assert moved.source == "head" and moved.scored is head.scored
    assert head_of(WEIGHT, "head").on(torch.device("meta")).bias is None
    assert head.lr is None and head.with_rate(0.5).lr == 0.5
    assert head.with_rate(0.5).with_rate(2).lr == 2.0
    said = error_of(head.with_rate, -1.0)
    assert said == "head: lr must be a number >= 0, got -1.0"


def test_heads_that_callers_cannot_mean(tmp_path: Path) -> None:
    assert error_of(head_of, BIAS, "head") == "head: the weight 'weight' must be (C, D); got (3,)"
    assert error_of(head_of, (WEIGHT, BIAS[:2]), "head") == (
        "head: the bias 'bias' must be (3,) to go with 'weight' (3, 4); got (2,)"
    )
    whole = torch.ones(3, 4).long()
    assert error_of(head_of, whole, "h") == "h: 'weight' must be floating point; got torch.int64"
    said = error_of(head_of, (WEIGHT, "x"), "head", kind=TypeError)
    assert said.startswith("bias of head must be a torch.Tensor")
    assert error_of(head_of, "none.pt", "head", kind=FileNotFoundError) == (
        "there is no file none.pt"
    )
    two = {**STATE, "a.weight": WEIGHT}
    listed = "fc.weight (3, 4), a.weight (3, 4)"
    assert error_of(head_of, two, "head") == (
        f"head must hold one matrix, or be given as (weight, bias); matrices there: {listed}"
    )
    torch.save({"net": two}, tmp_path / "h.pt")
    assert error_of(head_of, Checkpoint(tmp_path / "h.pt", entry="net"), "head") == (
        f"{tmp_path}/h.pt must hold one matrix, or be given as (weight, bias); matrices there: "
        f"{listed}"
    )
    assert error_of(head_of, tmp_path / "h.pt", "head") == (
        f"{tmp_path}/h.pt must hold one matrix, or name the head as h.pt:WEIGHT,BIAS; matrices "
        f"there: {listed}"
    )
    named = {"fc.weight": WEIGHT, "fc.shift": BIAS}
    assert error_of(head_of, named, "head") == (
        "head: is 'fc.shift' the bias of 'fc.weight'? give the head as (weight, bias)"
    )


@pytest.mark.parametrize(
    ("tensors", "bias"),
    [
        (STATE, "fc.bias"),
        ({"weight": WEIGHT, "bias": BIAS}, "bias"),
        ({"last_weight": WEIGHT, "last_bias": BIAS}, "last_bias"),
        ({"weights.weight": WEIGHT, "weights.bias": BIAS}, "weights.bias"),
        ({"fc.weight": WEIGHT, "ids": torch.arange(3)}, None),
        ({"fc.weight": WEIGHT, "scale": torch.ones(4)}, None),
        ({"weight": WEIGHT, "fc.conv": torch.ones(3, 4, 1)}, None),
    ],
)
def test_the_bias_is_the_vector_of_the_same_name(tmp_path: Path, tensors: Any, bias: Any) -> None:
    save_file(tensors, tmp_path / "h.safetensors")
    for head in (read_head(f"{tmp_path}/h.safetensors"), head_of(tensors, "head")):
        assert holds(head, None if bias is None else BIAS)
        assert head.scored is not None
        assert list(head.scored.shapes)[1:] == ([] if bias is None else [bias])


def test_files_that_do_not_say_which_head_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    save_file({"fc.weight": WEIGHT, "shift": BIAS, "scale": BIAS + 1}, file)
    first = next(name for name in safetensors_names(file) if name != "fc.weight")
    assert error_of(read_head, str(file)) == (
        f"{file}: is '{first}' the bias of 'fc.weight'? Say so as h.safetensors:fc.weight,{first}, "
        "or h.safetensors:fc.weight for a head without a bias"
    )
    assert error_of(read_head, f"{file}:a, b,c") == (
        f"{file}:a, b,c: the names are WEIGHT or WEIGHT,BIAS; got 'a, b,c'"
    )
    assert holds(read_head(f"{file}: fc.weight , shift "))
    many = {f"w{k:02}": torch.zeros(2, 2) for k in range(10)}
    save_file(many, file)
    names = list(many)
    assert error_of(read_head, f"{file}:x") == (
        f"{file} has no tensor 'x'; there are {', '.join(names[:8])} and 2 more"
    )
    listed = ", ".join(f"{name} (2, 2)" for name in names[:8])
    assert error_of(read_head, str(file)).endswith(f"matrices there: {listed}")
    save_file({name: many[name] for name in names[:8]}, file)
    assert error_of(read_head, f"{file}:x").endswith(f"there are {', '.join(names[:8])}")
    assert error_of(read_head, f"{file}:w00,x").startswith(f"{file} has no tensor 'x'; there are")


def test_npz_files_of_numbers_alone(tmp_path: Path) -> None:
    file = tmp_path / "h.npz"
    np.savez(file, weight=np.array(["a"]))
    assert error_of(read_head, str(file)).startswith(
        f"{file} cannot be read as an .npz of numbers: can't convert np.ndarray of type numpy.str_"
    )
    for content in (b"", b"PK\x03\x04rubbish", b"rubbish"):
        file.write_bytes(content)
        said = error_of(read_head, str(file))
        assert said.startswith(f"{file} cannot be read as an .npz of numbers: ")
        assert "\n" not in said
    np.savez(file, weight=np.array([{}], dtype=object))
    assert "Object arrays cannot be loaded" in error_of(read_head, str(file))


def test_an_npy_file_holds_a_weight(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", WEIGHT.numpy())
    head = read_head(f"{tmp_path}/w.npy:weight")
    assert holds(head, None) and head.stated is None
    head.weight[0] = 7  # it is no map of the file
    assert np.load(tmp_path / "w.npy")[0, 0] == 0


def test_a_rate_that_cannot_be_told_is_no_matter_until_it_is_asked_for(tmp_path: Path) -> None:
    torch.save({"model": STATE, "lr": "cosine"}, tmp_path / "h.PT")
    for head in (read_head(f"{tmp_path}/h.PT"), head_of({"model": STATE, "lr": "cosine"}, "head")):
        assert holds(head) and head.with_rate(0.5).lr == 0.5
        with pytest.raises(TypeError, match="must be a number >= 0, got 'cosine'"):
            _ = head.lr


def test_a_matrix_of_numbers_that_are_not_known_does_not_count(tmp_path: Path) -> None:
    header = {
        "packed": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]},
        "fc": {"dtype": "F32", "shape": [3, 4], "data_offsets": [8, 56]},
    }
    text, content = json.dumps(header).encode(), bytes(8) + WEIGHT.numpy().tobytes()
    file = tmp_path / "h.SafeTensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)
    assert holds(read_head(str(file)), None)


@pytest.mark.parametrize(("what", "at"), [("weight", [1, 2]), ("bias", [2])])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_first_entry_that_is_not_finite_is_named(what: str, at: list, value: float) -> None:
    weight, bias = WEIGHT.clone(), BIAS.clone()
    bad = weight if what == "weight" else bias
    bad[tuple(at)] = value
    bad.view(-1)[-1] = value
    said = error_of(check_finite, "head 3", weight, bias)
    assert said == f"head 3: {what}{at} is {value}; heads and weights must be finite"


def test_sums_beyond_the_largest_number_are_finite_entries() -> None:
    check_finite("head", torch.full((2, 2), 3e38), None)
    check_finite("head", WEIGHT, torch.full((3,), 3e38))


def test_only_heads_of_one_kind_are_stacked() -> None:
    kinds = [
        (WEIGHT, BIAS),
        (WEIGHT, None),
        (WEIGHT.double(), BIAS.double()),
        (WEIGHT + 1, BIAS + 1),
        (WEIGHT + 2, None),
        (torch.zeros(3, 5), BIAS),
    ]
    stacked = stack_heads([head_of(pair, f"head {k}") for k, pair in enumerate(kinds)])
    assert [numbers for numbers, _, _ in stacked] == [[0, 3], [1, 4], [2], [5]]
    (_, weight, bias), (_, bare, none), (_, wide, _), _ = stacked
    assert torch.equal(weight, torch.stack([WEIGHT, WEIGHT + 1]))
    assert torch.equal(bias, torch.stack([BIAS, BIAS + 1]))
    assert torch.equal(bare, torch.stack([WEIGHT, WEIGHT + 2])) and none is None
    assert wide.dtype == torch.float64
