"""Folders that training leaves: transformers, accelerate, DeepSpeed, torch.distributed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_layouts import OTHER_STATE, STATE, network, stepped
from checkpoint_reading import HEAD, assert_holds, into, trainer
from torch.distributed.checkpoint.state_dict import get_state_dict

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, read, stated_rate

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when saving


def saved(folder: Path, content: Any) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def test_torch_distributed_folders(tmp_path: Path) -> None:
    model = network(1)
    folder = saved(
        tmp_path / "whole",
        {"model": model.state_dict(), "optimizer": stepped(1e-4, 0.5), "step": 7},
    )
    assert_holds(into(network(), folder))
    loaded = read(Checkpoint(folder))
    assert (loaded.stated.rate(HEAD), loaded.step) == (0.5, 7)
    assert stated_rate(Checkpoint(folder)).rate(HEAD) == 0.5
    assert_holds(into(network(), saved(tmp_path / "bare", model.state_dict())))


def test_torch_distributed_optimiser_with_names(tmp_path: Path) -> None:
    model = network(1)
    groups = [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    weights, of_optimizer = get_state_dict(model, optimizer)
    folder = saved(tmp_path / "x", {"app": {"model": weights, "optim": of_optimizer}})
    assert_holds(into(network(), folder))
    assert read(Checkpoint(folder)).stated.rate(HEAD) == 0.5
    assert stated_rate(Checkpoint(folder)).rate(HEAD) == 0.5


def test_torch_distributed_folder_inside_that_of_the_trainer(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model_fsdp_0", {"model": network(1).state_dict()})
    saved(tmp_path / "optimizer_0", {"optimizer": {"x": torch.ones(1)}})
    assert_holds(into(network(), tmp_path))


def test_a_lost_shard_or_an_index_with_code_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x", network(1).state_dict())
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"cannot be read: FileNotFoundError.*distcp") as caught:
        read(Checkpoint(folder))
    assert "\n" not in str(caught.value)

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for content in (pickle.dumps(Evil()), pickle.dumps({"a": 1}), b"nothing"):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata (cannot be read|is no index)"):
            read(Checkpoint(folder))
    assert not (tmp_path / "ran").exists()


def test_code_in_an_entry_of_a_distributed_folder_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    folder = saved(tmp_path / "x", {"model": network(1).state_dict(), "hook": Evil()})
    assert_holds(into(network(), folder))
    assert not (tmp_path / "ran").exists()


def test_deepspeed_folders(tmp_path: Path) -> None:
    step = tmp_path / "global_step5"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step5")
    content = {"module": STATE, "global_steps": 5, "lr_scheduler": {"_last_lr": [0.5]}}
    torch.save(content, step / "mp_rank_00_model_states.pt")
    for folder in (tmp_path, step):
        loaded = read(Checkpoint(folder))
        assert_holds(into(network(), folder))
        assert (loaded.stated.rate(HEAD), loaded.step) == (0.5, 5)
    (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_model_states.pt")
    with pytest.raises(ValueError, match=r"shards of 1 DeepSpeed processes; .*zero_to_fp32\.py"):
        read(Checkpoint(tmp_path))
    torch.save(STATE, tmp_path / "pytorch_model.bin")  # what zero_to_fp32.py writes
    assert_holds(into(network(), tmp_path))


def test_a_trainer_folder_states_its_rate_beside_the_log(tmp_path: Path) -> None:
    logged = trainer(tmp_path / "a", 3, [{"learning_rate": 0.25}], optimizer=stepped(0.125))
    stated = read(Checkpoint(logged)).stated
    assert stated.rate(HEAD) == 0.25
    assert stated.later is not None and stated.later.rate(HEAD) == 0.125
    silent = trainer(tmp_path / "b", 3, [{"loss": 1.0}], scheduler={"_last_lr": [0.5, 0.5]})
    stated = stated_rate(Checkpoint(silent))
    assert stated.rate(HEAD) is None
    assert stated.later is not None and stated.later.rate(HEAD) == 0.5


def test_accelerate_folders_with_one_and_two_models(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(stepped(1e-4, 0.5), tmp_path / "optimizer.bin")
    loaded = read(Checkpoint(tmp_path))
    assert_holds(into(network(), tmp_path))
    assert loaded.stated.later is not None and loaded.stated.later.rate(HEAD) == 0.5
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model_1.safetensors")
    assert_holds(into(network(), tmp_path))
    save_file(OTHER_STATE, tmp_path / "model_2.safetensors")
    with pytest.raises(ValueError, match="fit the model under 'model_0' and 'model_2'"):
        into(network(), tmp_path)
    assert_holds(into(network(), tmp_path, "model_0"))
    assert_holds(into(network(), tmp_path, "model_2"), OTHER_STATE)


def test_a_sharded_folder_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"3.weight": STATE["3.weight"]}, tmp_path / "a.bin")
    index = {"weight_map": {name: "a.bin" for name in STATE}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '0.weight' \(8 in all\), which is in none of"):
        read(Checkpoint(tmp_path))


def test_a_folder_of_something_else_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "weights.h5").write_text("")
    with pytest.raises(ValueError, match=r"has none of model\.safetensors, .*; it has weights\.h5"):
        read(Checkpoint(tmp_path))
