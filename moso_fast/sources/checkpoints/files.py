"""Reading files and folders in which training leaves its weights, without running their code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import pickled
from .contents import Contents, contents_of
from .distributed import INDEX, read_distributed
from .pickled import StandIn, module_state
from .rates import Stated
from .trainer_schedule import rate_of_last_step

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pyth", ".th", ".pkl")
ADAPTER_CONFIG = "adapter_config.json"
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Beside the weights, as the Trainer of transformers and accelerate call them.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
_SCHEDULER_FILES = ("scheduler.pt", "scheduler.bin")


def existing(source: Any) -> Path:
    """Return the path, or raise ValueError where nothing is there."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    return path


def read_file(path: Path, mmap: bool = False) -> Mapping[str, Any]:
    """Read what a file holds, without running code from it; ValueError where that is no mapping.

    With ``mmap``, tensors stay in the file until they are used, where its form allows that.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return {} if mmap else _read_safetensors(path)
    if suffix not in TORCH_SUFFIXES:
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"checkpoint {path} must end in one of {known}, or be a folder")
    try:
        content = pickled.load(path, mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} is damaged or holds objects beside the weights that cannot be read "
            f"without running code, which weights_only=True refuses ({_reason(error)}); save "
            "model.state_dict() alone"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"checkpoint {path} is a TorchScript archive, which holds code; save the "
                "state_dict() of the model instead"
            ) from error
        raise ValueError(f"checkpoint {path} cannot be read: {_one_line(error)}") from error
    if isinstance(content, StandIn):
        state = module_state(content)
        if state is None:
            raise ValueError(
                f"checkpoint {path} must hold a state dict, got an object {content.path}; save "
                "model.state_dict()"
            )
        return state
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint {path} must hold a state dict, got {type(content).__name__}; save "
            "model.state_dict()"
        )
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


def read_contents(
    path: Path, rates_only: bool = False, with_rates: bool = True
) -> tuple[Contents, Stated]:
    """Return what a file or folder holds, and what it says about its learning rate.

    With ``rates_only`` tensors are not read (or left in the file): the call is cheap, and only its
    second result is whole. Without ``with_rates`` the files of optimiser and scheduler that lie
    beside the weights are left alone.
    """
    where = str(path)
    if not path.is_dir():
        contents = contents_of(read_file(path, mmap=rates_only), where)
        return contents, stated_in(contents, where)
    if (path / INDEX).is_file():
        contents = contents_of(read_distributed(path, with_tensors=not rates_only), where)
        return contents, stated_in(contents, where)
    deepspeed = _deepspeed_file(path)
    if deepspeed is not None:
        contents = contents_of(read_file(deepspeed, mmap=rates_only), str(deepspeed))
        return contents, stated_in(contents, where)
    state = {} if rates_only else _folder_state(path)
    contents = contents_of(state, where) if state or not rates_only else Contents()
    return contents, _stated_in_folder(path, contents, with_rates)


def stated_in(contents: Contents, where: str) -> Stated:
    """Return what the contents say about the learning rate."""
    return Stated(where, contents.lr, tuple(contents.groups), tuple(contents.last_rates))


def _folder_state(folder: Path) -> dict[str, Any]:
    """Return the state dict in a folder of transformers, accelerate or peft."""
    names = (*FOLDER_FILES, *_ADAPTER_FILES)
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        # FSDP under the Trainer of transformers or accelerate.
        inner = [p for p in folder.glob("pytorch_model_fsdp_*") if (p / INDEX).is_file()]
        if len(inner) == 1:
            return read_distributed(inner[0])
        raise ValueError(
            f"checkpoint folder {folder} has none of {', '.join(names)}, no {INDEX} of "
            f"torch.distributed.checkpoint and no *_model_states.pt of DeepSpeed; it has "
            f"{_entries(folder)}"
        )
    # accelerate numbers the models of one training; which one is meant shows by names and shapes.
    more = sorted(folder.glob(f"{Path(name).stem}_[0-9]*{Path(name).suffix}"))
    if not name.endswith(".index.json"):
        if more and name in FOLDER_FILES:
            first = {f"{Path(name).stem}_0": read_file(folder / name)}
            return {**first, **{p.stem: read_file(p) for p in more}}
        return dict(read_file(folder / name))
    shards = _read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / name} has no weight_map")
    state: dict[str, Any] = {}
    for shard in dict.fromkeys(shards.values()):
        if Path(shard).name != shard:
            raise ValueError(f"{folder / name} names {shard!r}, which is not in its folder")
        state.update(read_file(existing(folder / shard)))
    lost = [tensor for tensor in shards if tensor not in state]
    if lost:
        raise ValueError(
            f"{folder / name} names {lost[0]!r} ({len(lost)} in all), which is in none of its files"
        )
    return state


def _deepspeed_file(folder: Path) -> Path | None:
    """Return the file with the weights in a folder of DeepSpeed; None where it is none.

    Raises
    ------
    ValueError
        The weights are spread over processes (ZeRO-3, tensor or pipeline parallel).
    """
    if any((folder / name).is_file() for name in FOLDER_FILES):
        return None  # weights that were put together lie beside the shards
    places = [folder]
    if (folder / "latest").is_file():
        places.append(folder / (folder / "latest").read_text(encoding="utf-8").strip())
    for place in places:
        files = sorted(place.glob("*model_states.pt")) if place.is_dir() else []
        if len(files) == 1 and not files[0].name.startswith(("zero_pp", "bf16_zero_pp", "layer_")):
            return files[0]
        if files:
            raise ValueError(
                f"checkpoint folder {place} holds the shards of {len(files)} DeepSpeed processes; "
                "put them together with the zero_to_fp32.py that lies in it, and give the file "
                "that it writes"
            )
    return None


def _stated_in_folder(folder: Path, contents: Contents, with_rates: bool) -> Stated:
    where = str(folder)
    state_file = folder / "trainer_state.json"
    trainer = _read_json(state_file) if state_file.is_file() else None
    if trainer is not None:
        contents.step = trainer.get("global_step")
    if not with_rates:
        return Stated(where)
    later = None
    beside: dict[str, Mapping[str, Any]] = {}
    for names, key in ((_OPTIMIZER_FILES, "optimizer"), (_SCHEDULER_FILES, "scheduler")):
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is not None:
            beside[key] = read_file(file, mmap=True)
            if later is None or not later.any():
                later = stated_in(contents_of({key: beside[key]}, str(file)), str(file))
    if trainer is None:
        return Stated(where, later=later)
    logged = [e for e in trainer.get("log_history") or () if "learning_rate" in e]
    rate = logged[-1]["learning_rate"] if logged else None
    if not rate or logged[-1].get("step", contents.step) != contents.step:
        # Not logged at this very step, or the rate of the next one at the end of the schedule.
        of_step = rate_of_last_step(folder, trainer, beside.get("scheduler"))
        rate = rate if of_step is None else of_step
    return Stated(where, rate, later=later)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def adapter_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of the peft adapter at a file or folder; None where it is none."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and any((path / name).is_file() for name in FOLDER_FILES):
        return None
    if not path.is_dir() and path.name not in _ADAPTER_FILES:
        return None
    file = folder / ADAPTER_CONFIG
    return _read_json(file) if file.is_file() else None


def _entries(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "nothing"


def _reason(error: BaseException) -> str:
    """Return the sentence of torch's message that says what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Unsupported operand" in line for line in lines):
        return "it was saved with a pickle_protocol above 2, or is no file of torch.save"
    known = (
        "Unsupported",
        "Trying to",
        "Can only",
        "must be imported",
        "blocked",
        "Only persistent",
    )
    told = [line for line in lines if any(word in line for word in known)]
    reason = (told or lines or [type(error).__name__])[0]
    reason = reason.split("Please use")[0].removeprefix("WeightsUnpickler error:")
    return " ".join(reason.split()).rstrip(". ")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
