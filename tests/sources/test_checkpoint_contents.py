"""What a checkpoint holds beside tensors: numbers of NumPy, whole networks, rates and the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_layouts import Config

from moso_fast.sources.checkpoints.contents import contents_of
from moso_fast.sources.checkpoints.pickled import StandIn, load, module_state, plain_value


def stand_in(path: str, *arguments: Any, state: Any = None) -> StandIn:
    made: StandIn = type("Made", (StandIn,), {"path": path})(*arguments)
    made.state = state
    return made


def kind(name: str, order: str = "<") -> StandIn:
    return stand_in("numpy.dtype", name, state=(3, order, None))


def array(dtype: Any, content: Any, shape: Any = (2, 2), fortran: bool = False) -> StandIn:
    return stand_in("numpy.core.multiarray._reconstruct", state=(1, shape, dtype, fortran, content))


def test_numbers_of_numpy_that_a_file_holds() -> None:
    grid = np.array([[1.5, 2.0], [3.0, 4.0]])
    rows = plain_value(array(kind("f8"), grid.tobytes()))
    assert rows.tolist() == grid.tolist() and rows.dtype == torch.float64
    columns = plain_value(array(kind("f8"), grid.T.tobytes(), fortran=True))
    assert columns.tolist() == grid.tolist()
    for name, value in (("i4", -7), ("u1", 200), ("b1", True), ("f4", 0.5)):
        number = stand_in(
            "numpy.core.multiarray.scalar", kind(name), np.array(value, f"<{name}").tobytes()
        )
        assert plain_value(number) == value
    one = np.float64(1).tobytes()
    for odd in (
        stand_in("numpy.core.multiarray.scalar", kind("f8", ">"), one),
        stand_in("numpy.core.multiarray.scalar", kind("U2"), b"a\0\0\0"),
        stand_in("numpy.core.multiarray.scalar", kind("f"), one),
        stand_in("numpy.core.multiarray.scalar", "f8", one),
        stand_in("numpy.core.multiarray.scalar", stand_in("other", "f8"), one),
        stand_in("numpy.core.multiarray.scalar", stand_in("numpy.dtype"), one),
        stand_in("numpy.core.multiarray.scalar", kind("f8"), "text"),
        stand_in("numpy.core.multiarray.scalar", kind("f8")),
        stand_in("numpy.core.multiarray._reconstruct", state=(1, 2)),
        stand_in("numpy.core.multiarray._reconstruct", state=None),
        array(kind("O8"), b""),
        array(kind("X8"), b""),
        array(kind("c16"), bytes(64)),
        stand_in("other", kind("f8"), one),
    ):
        assert plain_value(odd) is odd
    assert plain_value(3) == 3 and plain_value(None) is None
    lacking = stand_in("numpy.core.multiarray.scalar", stand_in("numpy.dtype", "f8"), one)
    assert plain_value(lacking) == 1.0


def test_a_network_that_was_pickled_whole() -> None:
    parts = {"_parameters": {"w": 1, "none": None}, "_buffers": {"b": 2, "p": 3}, "_modules": {}}
    inner = stand_in("x", state={**parts, "_non_persistent_buffers_set": {"p"}})
    assert module_state(inner) == {"w": 1, "b": 2}
    outer = {**parts, "_modules": {"n": inner, "gone": None}}
    assert module_state(stand_in("x", state=outer)) == {"w": 1, "b": 2, "p": 3, "n.w": 1, "n.b": 2}
    assert module_state(stand_in("x", state={**parts, "_modules": {"n": 3}})) is None
    for key in parts:
        lacking = {name: part for name, part in parts.items() if name != key}
        assert module_state(stand_in("x", state=lacking)) is None
    assert module_state(stand_in("x", state=3)) is None and module_state(parts) is None


def test_facts_beside_the_weights() -> None:
    def facts(content: Any) -> tuple[Any, Any]:
        found = contents_of({"m": {"w": torch.ones(2)}, **content}, "x")
        return found.lr, found.step

    assert facts({"lr": 0.5, "learning_rate": 0.25}) == (0.5, None)
    assert facts({"learning_rate": 0.25, "lr": None}) == (0.25, None)
    assert facts({"lr": {"a": 1}})[0] is None and facts({"lr": torch.ones(2)})[0] is None
    assert facts({"lr": torch.tensor(0.5)})[0].item() == 0.5
    assert facts({"lr": torch.tensor([0.5])})[0] is None, "a parameter of that name"
    bare = contents_of({"w": torch.ones(2), "lr": torch.ones(1)}, "x")
    assert bare.lr is None and bare.tensors.keys() == {"w", "lr"}
    for first, *others in (("global_step", "step"), ("step", "iteration"), ("iter", "num_updates"),
                           ("global_steps", "epoch"), ("num_updates", "epoch")):  # fmt: skip
        assert facts({**dict.fromkeys(others, 9), first: 7})[1] == 7
    assert facts({"step": True, "epoch": 3})[1] == 3 and facts({"step": 1.5})[1] is None


def test_the_old_form_is_rewound(tmp_path: Path) -> None:
    torch.save({"a": Config()}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "x.pt").open("rb") as file:
        file.read(3)
        assert load(file)["a"].path == "checkpoint_layouts.Config"
    assert load(tmp_path / "x.pt", mmap=True)["a"].state["rate"] == 0.1
