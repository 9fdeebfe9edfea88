"""The layouts in which training scripts, Lightning and transformers save weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where training scripts put the weights inside the dictionary that they save.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
_OPTIMIZERS = ("optimizer_states", "optimizer", "optimizer_state_dict")


def existing(source: Any) -> Path:
    """Return the path, or raise ValueError where nothing is there."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    return path


def read_file(path: Path) -> Mapping[str, Any]:
    """Read what a file holds, without running code from it; ValueError where that is no mapping."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix not in TORCH_SUFFIXES:
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"checkpoint {path} must end in one of {known}, or be a folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line), "")
        raise ValueError(
            f"checkpoint {path} is damaged or holds more than tensors, numbers and containers, "
            f"which weights_only=True refuses; save its state dict alone. {reason.strip()}".rstrip()
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path} must hold a state dict, got {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"checkpoint {path} needs the safetensors package: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {_one_line(error)}") from error


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return state dict and training facts of a folder that transformers saved."""
    name = next((name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"checkpoint folder {folder} has none of {', '.join(FOLDER_FILES)}")
    if name.endswith(".index.json"):
        shards = _read_json(folder / name).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / name} has no weight_map")
        state: dict[str, Any] = {}
        for shard in dict.fromkeys(shards.values()):
            if Path(shard).name != shard:
                raise ValueError(f"{folder / name} names {shard!r}, which is not in its folder")
            state.update(read_file(existing(folder / shard)))
    else:
        state = dict(read_file(folder / name))
    facts: dict[str, Any] = {}
    if (folder / "trainer_state.json").is_file():
        trainer = _read_json(folder / "trainer_state.json")
        rates = [e["learning_rate"] for e in trainer.get("log_history", ()) if "learning_rate" in e]
        facts = {"lr": rates[-1] if rates else None, "step": trainer.get("global_step")}
    return state, facts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def unwrap(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Find the state dict in what a training script saved."""
    for name in _CONTAINERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return _check_state(inner, where)
    return _check_state(content, where)


def _check_state(state: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    strange = [
        name
        for name, value in state.items()
        if not isinstance(value, Tensor) and not str(name).endswith("_extra_state")
    ]
    if strange or not state:
        what = f"{strange[0]!r} holds no tensor" if strange else "it is empty"
        raise ValueError(
            f"checkpoint ({where}) must be a state dict of tensors, or hold one under one of "
            f"{', '.join(_CONTAINERS)}; {what}"
        )
    return state


def training_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Find learning rate and step beside the weights in a saved dictionary; None if unknown."""
    rate = content.get("lr", content.get("learning_rate"))
    for name in _OPTIMIZERS:
        if rate is None:
            rate = _optimizer_rate(content.get(name))
    if rate is None:
        for scheduler in _sequence(content.get("lr_schedulers")):
            if rate is None and isinstance(scheduler, Mapping):
                rate = (_sequence(scheduler.get("_last_lr")) or [None])[0]
    steps = (content.get(name) for name in ("global_step", "step", "epoch"))
    return {"lr": rate, "step": next((step for step in steps if step is not None), None)}


def _optimizer_rate(saved: Any) -> Any:
    for optimizer in _sequence(saved) or [saved]:
        groups = _sequence(optimizer.get("param_groups")) if isinstance(optimizer, Mapping) else []
        if groups and isinstance(groups[0], Mapping) and "lr" in groups[0]:
            return groups[0]["lr"]
    return None


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
