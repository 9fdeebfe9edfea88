"""Reading checkpoints: state dicts and files of every usual layout, with their learning rates."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._checkpoint_files import existing, read_file, read_folder, training_facts, unwrap

__all__ = [
    "Checkpoint",
    "LoadedCheckpoint",
    "check_same_presence",
    "iterate",
    "load_state_dict",
    "match_keys",
    "read",
]

_PREFIXES = ("", "model.", "net.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights at one moment of the training and the learning rate eta_t that was in force there.

    Parameters
    ----------
    source
        A state dict (name -> tensor), or a path: ``.pt``/``.pth``/``.tar``/``.bin``/``.ckpt``
        (read with ``weights_only=True``; a bare state dict, or one under ``state_dict``,
        ``model_state_dict``, ``model`` or ``net``), ``.safetensors``, or a folder that
        transformers saved.
    lr
        Learning rate of the step, >= 0; None takes what the file says: ``lr`` (the last one of a
        list), ``learning_rate``, the first parameter group of the optimiser, or the last
        ``learning_rate`` in ``trainer_state.json``.
    step
        Number of the step or epoch, for the record only; None takes what the file says.

    Raises
    ------
    TypeError, ValueError
        A source that is neither mapping nor path; ``lr`` that is no number, negative or not finite.
    """

    source: Mapping[str, Any] | str | os.PathLike[str]
    lr: float | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, (Mapping, str, os.PathLike)):
            raise TypeError(
                "Checkpoint source must be a state dict or a path, "
                f"got {type(self.source).__name__}"
            )
        if self.lr is not None:
            object.__setattr__(self, "lr", _learning_rate(self.lr, "Checkpoint lr"))
        if self.step is not None and (isinstance(self.step, bool) or not _is_integer(self.step)):
            raise TypeError(f"Checkpoint step must be an int or None, got {self.step!r}")


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """Tensors of a checkpoint as they are stored, its learning rate and step, and where from."""

    state: dict[str, Any]
    lr: float | None
    step: int | None
    description: str


def iterate(checkpoints: Any) -> Iterator[Checkpoint]:
    """Yield `Checkpoint` objects one by one from the ``checkpoints`` argument of a scorer.

    Bare state dicts and paths are taken as checkpoints without a given learning rate. What is not
    a generator is checked in full before the first one is yielded, so that a path that does not
    exist is found before the work begins.

    Raises
    ------
    TypeError, ValueError
        Not an iterable of checkpoints; none in it; a path that does not exist.
    """
    if isinstance(checkpoints, (Checkpoint, Mapping, str, os.PathLike)):
        checkpoints = [checkpoints]
    if not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"checkpoints must be an iterable of Checkpoint, got {type(checkpoints).__name__}"
        )
    if isinstance(checkpoints, (list, tuple)):
        checkpoints = [_as_checkpoint(item, k) for k, item in enumerate(checkpoints)]
        for checkpoint in checkpoints:
            if not isinstance(checkpoint.source, Mapping):
                existing(checkpoint.source)
        in_memory = {
            k: read(c).lr for k, c in enumerate(checkpoints) if isinstance(c.source, Mapping)
        }
        check_same_presence(in_memory)
    return _iterate(checkpoints)


def _iterate(checkpoints: Iterable[Any]) -> Iterator[Checkpoint]:
    empty = True
    for k, item in enumerate(checkpoints):
        empty = False
        yield _as_checkpoint(item, k)
    if empty:
        raise ValueError(
            "checkpoints is empty; give at least one Checkpoint, or None for the model as it is"
        )


def _as_checkpoint(item: Any, k: int) -> Checkpoint:
    if isinstance(item, Checkpoint):
        return item
    if isinstance(item, (Mapping, str, os.PathLike)):
        return Checkpoint(item)
    raise TypeError(
        f"checkpoints[{k}] must be a Checkpoint, a state dict or a path, got {type(item).__name__}"
    )


def check_same_presence(rates: Mapping[int, float | None]) -> None:
    """Raise ValueError where some of the checkpoints (number -> rate or None) have no rate."""
    with_rate = [k for k, rate in rates.items() if rate is not None]
    without = [k for k, rate in rates.items() if rate is None]
    if with_rate and without:
        raise ValueError(
            "checkpoints: either all have a learning rate or none, but checkpoint "
            f"{with_rate[0]} has one and checkpoint {without[0]} has none; "
            "give Checkpoint(source, lr=...) for each"
        )


def load_state_dict(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the name -> tensor mapping in ``source``, as stored, on the CPU where it was a file.

    See `Checkpoint` for the layouts; raises ValueError for a file that has none of them.
    """
    return read(Checkpoint(source)).state


def read(checkpoint: Checkpoint) -> LoadedCheckpoint:
    """Read the tensors of a checkpoint, and its learning rate and step where they are known.

    Raises
    ------
    ValueError
        Missing or unreadable file, unknown layout, a learning rate that is not a number >= 0.
    """
    source = checkpoint.source
    if isinstance(source, Mapping):
        where, content = "a state dict in memory", source
        extra: dict[str, Any] = {}
    else:
        path = existing(source)
        where = str(path)
        content, extra = read_folder(path) if path.is_dir() else (read_file(path), {})
    state = unwrap(content, where)
    found = {**training_facts(content if state is not content else {}), **extra}
    lr, step = checkpoint.lr, checkpoint.step
    if lr is None and found.get("lr") is not None:
        lr = _learning_rate(found["lr"], f"learning rate in {where}")
    if step is None and _is_integer(found.get("step")):
        step = int(found["step"])
    return LoadedCheckpoint(dict(state), lr, step, where)


def match_keys(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Rename the keys of ``state`` to ``names``, dropping what wrappers put in front of them.

    ``module.`` (DataParallel) and ``_orig_mod.`` (torch.compile) are dropped on both sides;
    ``model.`` and ``net.`` (Lightning) where that makes the keys match, and then keys without that
    prefix, such as those of a metric, belong to the wrapper and are left out.

    Parameters
    ----------
    state
        Name -> tensor.
    names
        The names that the model expects.

    Returns
    -------
    dict
        Expected name -> tensor. Names that the checkpoint lacks are absent, so that a caller may
        fill in tied weights; names that the model does not have are kept as they are.
    """
    expected = dict(zip(_canonical(names), names, strict=True))
    if len(expected) != len(names):
        expected = {name: name for name in names}
    given = dict(zip(_canonical(state), state.values(), strict=True))
    if len(given) != len(state):
        given = dict(state)
    best, fewest = given, None
    for prefix in _PREFIXES:
        stripped = {k[len(prefix) :]: v for k, v in given.items() if k.startswith(prefix)}
        missing = len(expected.keys() - stripped.keys())
        if fewest is None or missing < fewest:
            best, fewest = stripped, missing
    return {expected.get(name, name): value for name, value in best.items()}


def _canonical(names: Collection[str]) -> list[str]:
    """Names without the prefixes of wrappers, in the same order."""
    result = [name.replace("_orig_mod.", "") for name in names]
    while result and all(name.startswith("module.") for name in result):
        result = [name.removeprefix("module.") for name in result]
    return result


def _learning_rate(value: Any, what: str) -> float:
    """Return a learning rate as a float; the last one of a list."""
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        rate = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number >= 0, got {value!r}") from None
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"{what} must be a number >= 0, got {rate}")
    return rate


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
