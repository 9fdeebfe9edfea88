"""Every layout of checkpoint is read with its learning rate, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, iterate, load_state_dict, read

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, -2.0])}


def same(state: dict[str, Any], expected: dict[str, Tensor] = STATE) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("content", "lr", "step"),
    [
        (STATE, None, None),
        ({"state_dict": STATE}, None, None),
        ({"model": STATE, "learning_rate": 0.5}, 0.5, None),
        ({"model_state_dict": STATE, "step": 7}, None, 7),
        ({"net": STATE, "acc": 93.1, "lr": [0.1, 0.02], "epoch": 3}, 0.02, 3),
        ({"net": STATE, "lr": torch.tensor(0.25), "epoch": 0}, 0.25, 0),
        ({"model": STATE, "optimizer": {"param_groups": [{"lr": 0.3}, {"lr": 0.3}]}}, 0.3, None),
        (
            {
                "state_dict": STATE,
                "epoch": 2,
                "global_step": 40,
                "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.125}]}],
                "lr_schedulers": [{"_last_lr": [9.0]}],
            },
            0.125,
            40,
        ),
        ({"state_dict": STATE, "lr_schedulers": [{"_last_lr": [0.75]}]}, 0.75, None),
        ({"state_dict": STATE, "lr": 0.0}, 0.0, None),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".pth.tar", "memory"])
def test_layouts(tmp_path: Path, content: dict, lr: float, step: int, suffix: str) -> None:
    source: Any = content
    if suffix != "memory":
        source = tmp_path / f"file{suffix}"
        torch.save(content, source)
    loaded = read(Checkpoint(source))
    assert same(loaded.state)
    assert loaded.lr == lr
    assert loaded.step == step
    assert same(load_state_dict(source))


def test_given_rate_and_step_come_before_those_of_the_file(tmp_path: Path) -> None:
    torch.save({"net": STATE, "lr": [0.1], "epoch": 3}, tmp_path / "a.pth")
    loaded = read(Checkpoint(str(tmp_path / "a.pth"), lr=2, step=np.int64(11)))
    assert (loaded.lr, loaded.step) == (2.0, 11)
    assert str(tmp_path / "a.pth") in loaded.description


def test_a_layer_called_model_is_not_a_container() -> None:
    state = {"model.weight": torch.ones(2), "net": torch.zeros(1)}
    assert same(load_state_dict(state), state)


def test_safetensors_and_transformers_folders(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(STATE, tmp_path / "x.safetensors")
    assert same(load_state_dict(tmp_path / "x.safetensors"))

    whole = tmp_path / "checkpoint-30"
    whole.mkdir()
    save_file(STATE, whole / "model.safetensors")
    history = [{"loss": 1, "learning_rate": 0.3}, {"learning_rate": 0.2}, {"eval_loss": 2.0}]
    (whole / "trainer_state.json").write_text(
        json.dumps({"global_step": 30, "log_history": history})
    )
    loaded = read(Checkpoint(whole))
    assert same(loaded.state)
    assert (loaded.lr, loaded.step) == (0.2, 30)

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"}
    for name, file in files.items():
        save_file({name: STATE[name]}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    loaded = read(Checkpoint(sharded))
    assert same(loaded.state)
    assert (loaded.lr, loaded.step) == (None, None)


def test_pytorch_model_bin_folder(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert same(load_state_dict(tmp_path))


def test_iterate_takes_paths_states_and_generators(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.pt")
    paths = sorted(tmp_path.glob("*.pt"))
    assert [c.source for c in iterate(paths)] == paths
    assert [c.source for c in iterate(str(paths[0]))] == [str(paths[0])]
    assert [c.source for c in iterate(STATE)] == [STATE]
    one = Checkpoint(STATE, lr=1.0)
    assert list(iterate(one)) == [one]
    read_ahead = []

    def states() -> Any:
        for k in range(3):
            read_ahead.append(k)
            yield Checkpoint(STATE, lr=k)

    stream = iterate(states())
    next(stream)
    assert read_ahead == [0], "a generator is read one by one"


def test_missing_path_is_found_before_the_first_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"^checkpoint .*b\.pt does not exist$"):
        iterate([tmp_path / "a.pt", tmp_path / "b.pt"])


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def half(path: Path) -> Path:
    torch.save(STATE, path)
    return write(path, path.read_bytes()[:300])


BAD_FILES = [
    (lambda p: p / "no.pt", "does not exist"),
    (lambda p: write(p / "x.txt", "a"), r"must end in one of \.pt, .*\.safetensors, or be a fold"),
    (lambda p: write(p / "x.pt", b"not a checkpoint"), "is damaged|cannot be read"),
    (lambda p: write(p / "x.pt", b""), "cannot be read"),
    (lambda p: half(p / "x.pt"), "cannot be read"),
    (lambda p: save(p / "x.pt", nn.ReLU), "must hold a state dict, got .*; save model.state_dict"),
    (lambda p: save(p / "x.pt", [nn.ReLU()]), "must hold a state dict, got list"),
    (lambda p: save(p / "x.pt", [1, 2]), "must hold a state dict, got list"),
    (lambda p: save(p / "x.pt", {}), "it is empty"),
    (
        lambda p: save(p / "x.pt", {"epoch": 3}),
        r"must be a state dict of tensors, or hold one; it holds epoch \(int\)",
    ),
    (lambda p: save(p / "x.pt", {"net": STATE, "lr": -1.0}), r"learning rate in .*>= 0, got -1"),
    (lambda p: save(p / "x.pt", {"net": STATE, "lr": float("nan")}), r">= 0, got nan"),
    (lambda p: write(p / "x.safetensors", b"12345678901234567890"), "cannot be read"),
    (lambda p: folder(p / "f"), r"has none of model\.safetensors, model\.safetensors\.index"),
    (
        lambda p: folder(p / "f", **{"model__safetensors__index__json": "{"}),
        r"index\.json is not JSON",
    ),
    (
        lambda p: folder(p / "f", **{"model__safetensors__index__json": "{}"}),
        "has no weight_map",
    ),
    (
        lambda p: folder(
            p / "f",
            **{"model__safetensors__index__json": '{"weight_map": {"a": "../x.safetensors"}}'},
        ),
        "which is not in its folder",
    ),
    (
        lambda p: folder(
            p / "f", **{"model__safetensors__index__json": '{"weight_map": {"a": "b.safetensors"}}'}
        ),
        r"b\.safetensors does not exist",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(Checkpoint(make(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(ValueError, match="weights_only=True refuses"):
        load_state_dict(save(tmp_path / "x.pt", {"a": Evil()}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Checkpoint(3), TypeError, "must be a state dict or a path, got int"),
        (lambda: Checkpoint(nn.Linear(1, 1)), TypeError, "or a path, got Linear"),
        (lambda: Checkpoint(STATE, lr="0.1"), TypeError, "Checkpoint lr must be a number >= 0"),
        (lambda: Checkpoint(STATE, lr=True), TypeError, "Checkpoint lr must be a number >= 0"),
        (lambda: Checkpoint(STATE, lr=-0.1), ValueError, "must be a number >= 0, got -0.1"),
        (lambda: Checkpoint(STATE, lr=float("inf")), ValueError, "got inf"),
        (lambda: Checkpoint(STATE, step=1.5), TypeError, "step must be an int or None, got 1.5"),
        (lambda: list(iterate([])), ValueError, "checkpoints is empty; give at least one"),
        (lambda: list(iterate(iter(()))), ValueError, "checkpoints is empty"),
        (lambda: iterate(5), TypeError, "must be an iterable of Checkpoint, got int"),
        (lambda: iterate([STATE, 5]), TypeError, r"checkpoints\[1\] must be a Checkpoint, .* int"),
        (
            lambda: iterate([STATE, Checkpoint(STATE, lr=0.1), STATE]),
            ValueError,
            "all have a learning rate or none, but checkpoint 1 has one and checkpoints 0, 2",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_reading_leaves_the_source_alone() -> None:
    before = copy.deepcopy(STATE)
    state = load_state_dict(STATE)
    state.clear()
    assert same(STATE, before)
