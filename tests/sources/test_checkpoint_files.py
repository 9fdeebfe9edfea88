"""Files and folders of checkpoints: what is read of them, and in full what is said of bad ones."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_layouts import Config, stepped
from safetensors.torch import save_file
from torch import nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, read, stated_rate
from moso_fast.sources.checkpoints.distributed import INDEX, _nested, read_distributed
from moso_fast.sources.checkpoints.files import adapter_config, read_contents, read_file
from moso_fast.sources.checkpoints.trainer_schedule import SETTINGS

STATE_OF_TWO = {"a": torch.ones(2), "b": torch.zeros(3)}


def error_of(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "tar", "pyth", "th", "pkl", "PTH"])
def test_files_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    torch.save(STATE_OF_TWO, tmp_path / f"x.{suffix}")
    assert read_file(tmp_path / f"x.{suffix}").keys() == STATE_OF_TWO.keys()


@pytest.mark.filterwarnings("ignore")  # torch's own about such files
def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    known = ".pt, .pth, .ckpt, .bin, .tar, .pyth, .th, .pkl, .safetensors"
    path = tmp_path / "x.h5"
    assert error_of(read_file, path) == (
        f"checkpoint {path} must end in one of {known}, or be a folder"
    )
    path = tmp_path / "x.pt"
    assert error_of(read, Checkpoint(path)) == f"checkpoint {path} does not exist"
    for content, kind in (([STATE_OF_TWO], "list"), (3, "int"), (torch.ones(2), "Tensor")):
        torch.save(content, path)
        assert error_of(read_file, path) == (
            f"checkpoint {path} must hold a state dict, got {kind}; save model.state_dict()"
        )
    torch.save(Config(), path)
    assert error_of(read_file, path) == (
        f"checkpoint {path} must hold a state dict, got an object checkpoint_layouts.Config; save "
        "model.state_dict()"
    )
    torch.save({"model": 1}, path, pickle_protocol=4)
    assert error_of(read_file, path) == (
        f"checkpoint {path} is damaged or holds objects beside the weights that cannot be read "
        "without running code, which weights_only=True refuses (it was saved with a "
        "pickle_protocol above 2, or is no file of torch.save); save model.state_dict() alone"
    )
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    assert error_of(read_file, path) == (
        f"checkpoint {path} is a TorchScript archive, which holds code; save the state_dict() of "
        "the model instead"
    )
    for content in (b"", b"PK\x03\x04rubbish"):
        path.write_bytes(content)
        said = error_of(read_file, path)
        assert said.startswith(f"checkpoint {path} cannot be read: ") and "\n" not in said
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"rubbish rubbish")
    assert error_of(read_file, damaged).startswith(f"checkpoint {damaged} cannot be read: ")
    assert read_file(damaged, mmap=True) == {}, "it holds no rates"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(), "cannot be read: RuntimeError"),
        (ValueError("\n one\ntwo"), "cannot be read: one"),
        (KeyError("a"), "cannot be read: 'a'"),
        (pickle.UnpicklingError(), "(UnpicklingError)"),
        (pickle.UnpicklingError("cut  off. \n  more"), "(cut off)"),
        (
            pickle.UnpicklingError(
                "Weights only load failed.\nWeightsUnpickler error: Trying to call  a thing. "
                "Please use `torch.serialization`.\nCheck the documentation."
            ),
            "(Trying to call a thing)",
        ),
        *(
            (pickle.UnpicklingError(f"first\n{words} x\nUnsupported y"), f"({words} x)")
            for words in ("Can only", "must be imported", "blocked", "Only persistent")
        ),
    ],
)
def test_the_reason_that_torch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    files = importlib.import_module("moso_fast.sources.checkpoints.files")
    monkeypatch.setattr(files.pickled, "load", refuse)
    path = tmp_path / "x.pt"
    if said.startswith("("):
        said = (
            "is damaged or holds objects beside the weights that cannot be read without running "
            f"code, which weights_only=True refuses {said}; save model.state_dict() alone"
        )
    assert error_of(read_file, path) == f"checkpoint {path} {said}"


def test_a_file_of_safetensors_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.SafeTensors"
    save_file(STATE_OF_TWO, path)
    assert read_file(path).keys() == STATE_OF_TWO.keys()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert error_of(read_file, path) == (
        f"checkpoint {path} needs the safetensors package: pip install safetensors"
    )


def index_of(folder: Path, **shards: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": shards}))
    return path


def test_folders_in_pieces(tmp_path: Path) -> None:
    for name, tensor in STATE_OF_TWO.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    path = index_of(tmp_path, a="a.safetensors", b="b.safetensors")
    assert read(Checkpoint(tmp_path)).contents.tensors.keys() == STATE_OF_TWO.keys()
    index_of(tmp_path, a="a.safetensors", b="sub/b.safetensors")
    assert error_of(read, Checkpoint(tmp_path)) == (
        f"{path} names 'sub/b.safetensors', which is not in its folder"
    )
    index_of(tmp_path, a="a.safetensors", c="a.safetensors", d="b.safetensors")
    assert error_of(read, Checkpoint(tmp_path)) == (
        f"{path} names 'c' (2 in all), which is in none of its files"
    )
    for content, said in (
        ({}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ([1], "must hold a JSON object, got list"),
    ):
        path.write_text(json.dumps(content))
        assert error_of(read, Checkpoint(tmp_path)) == f"{path} {said}"
    path.write_text("{,\n")
    said = error_of(read, Checkpoint(tmp_path))
    assert said.startswith(f"{path} is not JSON: Expecting property name") and "\n" not in said


def test_the_file_of_a_folder_that_is_read(tmp_path: Path) -> None:
    """The first of those that may hold the weights; adapters are looked for last."""
    for k, name in enumerate(("adapter_model.bin", "pytorch_model.bin")):
        torch.save({"w": torch.full((1,), float(k))}, tmp_path / name)
        assert read(Checkpoint(tmp_path)).contents.tensors["w"].item() == k
    for k, name in enumerate(("adapter_model.safetensors", "model.safetensors"), 2):
        save_file({"w": torch.full((1,), float(k))}, tmp_path / name)
        expected = 1 if k == 2 else 3
        assert read(Checkpoint(tmp_path)).contents.tensors["w"].item() == expected


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    names = (
        "model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
        "pytorch_model.bin.index.json, adapter_model.safetensors, adapter_model.bin"
    )
    start = (
        f"checkpoint folder {tmp_path} has none of {names}, no .metadata of "
        "torch.distributed.checkpoint and no *_model_states.pt of DeepSpeed; it has "
    )
    assert error_of(read, Checkpoint(tmp_path)) == f"{start}nothing"
    for k in range(9):
        (tmp_path / f"f{8 - k}").write_text("")
        listed = ", ".join(f"f{n}" for n in range(8 - k, 9))
        if k == 7:
            assert error_of(read, Checkpoint(tmp_path)) == f"{start}{listed}"
    listed = ", ".join(f"f{n}" for n in range(8))
    assert error_of(read, Checkpoint(tmp_path)) == f"{start}{listed}, ..."


def test_folders_of_deepspeed(tmp_path: Path) -> None:
    for name in ("zero_pp_rank_0_mp_rank_00", "bf16_zero_pp_rank_0_mp_rank_00", "layer_01"):
        path = tmp_path / f"{name}_model_states.pt"
        torch.save({"module": STATE_OF_TWO}, path)
        assert error_of(read, Checkpoint(tmp_path)) == (
            f"checkpoint folder {tmp_path} holds the shards of 1 DeepSpeed processes; put them "
            "together with the zero_to_fp32.py that lies in it, and give the file that it writes"
        )
        path.unlink()
    (tmp_path / "latest").write_text(" step3\n")
    (tmp_path / "step3").mkdir()
    for rank in range(2):
        content = {"module": STATE_OF_TWO, "lr_scheduler": {"_last_lr": [0.5]}}
        torch.save(content, tmp_path / "step3" / f"mp_rank_0{rank}_model_states.pt")
    assert f"{tmp_path}/step3 holds the shards of 2" in error_of(read, Checkpoint(tmp_path))
    (tmp_path / "step3" / "mp_rank_01_model_states.pt").unlink()
    loaded = read(Checkpoint(tmp_path))
    assert loaded.contents.tensors.keys() == {"module.a", "module.b"}
    assert loaded.stated.where == str(tmp_path)
    assert stated_rate(Checkpoint(tmp_path)).rate(None) == loaded.lr == 0.5
    double = {"module": {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}}
    file = tmp_path / "step3" / "mp_rank_00_model_states.pt"
    torch.save(double, file)
    said = error_of(read, Checkpoint(tmp_path))
    assert said.startswith(f"checkpoint ({file}) has two tensors named 'module.a.b', in nested ")
    (tmp_path / "latest").write_text("gone")
    assert "has none of" in error_of(read, Checkpoint(tmp_path))


def test_rates_beside_the_weights_of_a_folder(tmp_path: Path) -> None:
    torch.save(STATE_OF_TWO, tmp_path / "pytorch_model.bin")
    torch.save({"_last_lr": [0.25]}, tmp_path / "scheduler.bin")
    found = read_contents(tmp_path)[1]
    assert found.where == str(tmp_path) and not found.any()
    assert found.later is not None and found.later.where == f"{tmp_path}/scheduler.bin"
    assert found.later.rate(None) == 0.25
    # The optimiser comes first, unless it says nothing.
    torch.save(stepped(0.5), tmp_path / "optimizer.bin")
    later = read_contents(tmp_path)[1].later
    assert later is not None and later.rate(None) == 0.5
    torch.save({"param_groups": []}, tmp_path / "optimizer.pt")
    later = read_contents(tmp_path, rates_only=True)[1].later
    assert later is not None and later.rate(None) == 0.25
    contents, stated = read_contents(tmp_path, with_rates=False)
    assert stated.later is None and not stated.any() and contents.tensors.keys() == {"a", "b"}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    contents, stated = read_contents(tmp_path)
    assert contents.step == 5 and stated.lr is None and stated.later is not None


def test_the_rate_that_a_trainer_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE_OF_TWO, tmp_path / "pytorch_model.bin")

    def rate(history: Any, of_schedule: float | None = None) -> Any:
        facts = {"global_step": 5, "log_history": history}
        (tmp_path / "trainer_state.json").write_text(json.dumps(facts))
        files = importlib.import_module("moso_fast.sources.checkpoints.files")
        monkeypatch.setattr(files, "rate_of_last_step", lambda *_: of_schedule)
        return read_contents(tmp_path)[1].lr

    own = {"learning_rate": 0.5, "step": 5}
    assert rate([{"learning_rate": 9.0, "step": 4}, own, {"loss": 1.0}], 0.25) == 0.5
    assert rate([{"learning_rate": 0.5}], 0.25) == 0.5, "no step is that of the folder"
    earlier = [{"learning_rate": 0.5, "step": 4}]
    assert rate(earlier) == 0.5 and rate(earlier, 0.25) == 0.25
    nought = [{"learning_rate": 0.0, "step": 5}]
    assert rate(nought) == 0.0 and rate(nought, 0.25) == 0.25
    assert rate([]) is None and rate(None, 0.25) == 0.25
    torch.save({"_last_lr": [0.75]}, tmp_path / "scheduler.pt")
    seen = []
    files = importlib.import_module("moso_fast.sources.checkpoints.files")
    monkeypatch.setattr(files, "rate_of_last_step", lambda *given: seen.append(given))
    read_contents(tmp_path)
    ((folder, facts, scheduler),) = seen
    assert folder == tmp_path and facts["global_step"] == 5 and scheduler == {"_last_lr": [0.75]}
    assert SETTINGS == "training_args.bin"


def test_the_configuration_of_an_adapter(tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.bin"
    torch.save(STATE_OF_TWO, weights)
    assert adapter_config(weights) is None and adapter_config(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    assert adapter_config(weights) == adapter_config(tmp_path) == {"r": 2}
    assert read(Checkpoint(tmp_path)).adapter == {"r": 2}
    assert adapter_config(tmp_path / "other.bin") is None
    torch.save(STATE_OF_TWO, tmp_path / "pytorch_model.bin")
    assert adapter_config(tmp_path) is None, "the weights of the whole model lie there too"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when saving
def test_folders_of_torch_distributed(tmp_path: Path) -> None:
    content = {"model": {"a": torch.ones(2)}, "optim": {"param_groups": [{"lr": 0.5}]}, "step": 3}
    dcp.save(content, checkpoint_id=tmp_path, no_dist=True)
    found = read_distributed(tmp_path)
    assert torch.equal(found["model"]["a"], torch.ones(2)) and found["step"] == 3
    assert read_contents(tmp_path)[1].where == str(tmp_path)
    without = read_distributed(tmp_path, with_tensors=False)
    assert without["model"]["a"].is_meta and without["model"]["a"].shape == (2,)
    assert without["step"] == 3
    assert stated_rate(Checkpoint(tmp_path)).rate(None) == read(Checkpoint(tmp_path)).lr == 0.5
    index = tmp_path / INDEX
    whole = index.read_bytes()
    next(tmp_path.glob("*.distcp")).unlink()
    said = error_of(read_distributed, tmp_path)
    assert said.startswith(f"checkpoint folder {tmp_path} cannot be read: FileNotFoundError")
    index.write_bytes(whole[:20])
    assert error_of(read_distributed, tmp_path).startswith(f"checkpoint {index} cannot be read: ")
    index.write_bytes(pickle.dumps({"a": 1}))
    assert error_of(read_distributed, tmp_path) == (
        f"checkpoint {index} is no index of torch.distributed.checkpoint"
    )
    index.write_bytes(pickle.dumps(Config()))
    assert error_of(read_distributed, tmp_path) == (
        f"checkpoint {index} cannot be read: checkpoint_layouts.Config is no part of an index"
    )


def test_nested_entries_go_back_to_their_places() -> None:
    paths = {"a.b": ("a", "b"), "a.0": ["a", 0], "c": (), "d": "d", "x.y": ("a", "b", "y")}
    flat = {"a.b": 1, "a.0": 2, "c": 3, "d": 4, "e": 5, "x.y": 6}
    # Below an entry that is no dictionary nothing can lie: it keeps its own name.
    assert _nested(flat, paths) == {"a": {"b": 1, "0": 2}, "c": 3, "d": 4, "e": 5, "x.y": 6}
    assert _nested({"a.b": 1}, None) == {"a.b": 1}
