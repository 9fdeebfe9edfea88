"""Reading checkpoints: state dicts and files of every usual layout, with their learning rates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .contents import USUAL, Contents, contents_of
from .files import adapter_config, existing, read_contents, stated_in
from .rates import Stated, learning_rate
from .rates_together import check_presence

__all__ = ["Checkpoint", "LoadedCheckpoint", "iterate", "load_state_dict", "read", "stated_rate"]

_IN_MEMORY = "a state dict in memory"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights at one moment of the training and the learning rate eta_t that was in force there.

    Parameters
    ----------
    source
        A state dict (name -> tensor), or a dictionary or path that holds one:

        - ``.pt``, ``.pth``, ``.tar``, ``.bin``, ``.ckpt``: read with ``weights_only=True``, so
          that no code of the file runs; objects beside the weights (``argparse.Namespace``, numpy
          numbers, paths) do not matter. The weights may lie in any dictionary of the file, under
          prefixes of wrappers (``module.``, ``model.``, ``_orig_mod.``, any attribute), nested in
          any order: those are taken whose names and shapes are the model's.
        - ``.safetensors``.
        - a folder of transformers, accelerate (also sharded), DeepSpeed (``*_model_states.pt``),
          torch.distributed.checkpoint, or one with a peft adapter alone, whose base model is then
          the one that is scored.
    lr
        Learning rate of the step, >= 0; None takes what the file says: ``lr`` (the last one of a
        list), ``learning_rate``, that of the optimiser's parameter group with the parameters that
        are scored, the scheduler's ``_last_lr``; in a folder of transformers' Trainer the rate
        logged at this step, else that of its schedule (by the library, where ``scheduler.pt`` and
        the log agree with it), else the last one logged.
    step
        Number of the step or epoch, for the record only; None takes what the file says.
    entry
        Dotted path in the file below which the weights lie, such as ``"state_dict_ema"`` or
        ``"state_dict.teacher"``. Needed where several different weights fit the model; of running
        weights and averages of them (``ema``, ``swa``, ``best``), the running ones are taken, with
        a warning.

    Raises
    ------
    TypeError, ValueError
        A source that is neither mapping nor path; ``lr`` that is no number, negative or not finite.
    """

    source: Mapping[str, Any] | str | os.PathLike[str]
    lr: float | None = None
    step: int | None = None
    entry: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, (Mapping, str, os.PathLike)):
            raise TypeError(
                "Checkpoint source must be a state dict or a path, "
                f"got {type(self.source).__name__}"
            )
        if self.lr is not None:
            object.__setattr__(self, "lr", learning_rate(self.lr, "Checkpoint lr"))
        if self.step is not None and (isinstance(self.step, bool) or not _is_integer(self.step)):
            raise TypeError(f"Checkpoint step must be an int or None, got {self.step!r}")
        if self.entry is not None and not (isinstance(self.entry, str) and self.entry.strip(".")):
            raise TypeError(
                f"Checkpoint entry must be a dotted name in the file or None, got {self.entry!r}"
            )


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """What a checkpoint holds, as it is stored, and where it is from.

    ``contents``: all its tensors; ``stated``: what it says about its learning rate; ``adapter``:
    the configuration where it is a peft adapter alone.
    """

    contents: Contents
    stated: Stated
    step: int | None
    description: str
    entry: str | None = None
    adapter: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def lr(self) -> float | None:
        """The learning rate, where one is stated.

        Raises
        ------
        TypeError, ValueError
            It is no number >= 0, or several different ones are stated.
        """
        return self.stated.rate(None)

    @property
    def state(self) -> dict[str, Tensor]:
        """The state dict, as its container has it, for callers that know of no model.

        Raises
        ------
        ValueError
            No tensors, or several dictionaries of tensors of which none has a usual name.
        """
        weights = self.contents.weights()
        containers = list(dict.fromkeys(self.contents.containers[name] for name in weights))
        if self.entry is not None:
            inside = self.entry.rstrip(".") + "."
            containers = [name for name in containers if name == inside] or [inside]
            weights = self.contents.tensors
        chosen = containers[:1] if len(containers) == 1 else []
        chosen = chosen or [f"{name}." for name in USUAL if f"{name}." in containers][:1]
        if not chosen:
            raise ValueError(
                f"checkpoint ({self.description}) must be a state dict of tensors, or hold one; "
                f"choose with Checkpoint(source, entry=...) from "
                f"{', '.join(repr(name.rstrip('.')) for name in containers) or 'nothing'}"
            )
        where = chosen[0]
        return {
            name.removeprefix(where): tensor
            for name, tensor in weights.items()
            if (name.startswith(where) if self.entry else self.contents.containers[name] == where)
        }


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
        # Of files it may show only when the optimiser's, beside them, have been read.
        in_memory = {
            k: 1.0 if stated_rate(c).any() else None
            for k, c in enumerate(checkpoints)
            if isinstance(c.source, Mapping)
        }
        check_presence(in_memory, dict.fromkeys(in_memory, _IN_MEMORY))
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


def load_state_dict(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the name -> tensor mapping in ``source``, as stored, on the CPU where it was a file.

    See `Checkpoint` for the layouts; raises ValueError for a file that has none of them.
    """
    return read(Checkpoint(source), check_rate=False).state


def read(checkpoint: Checkpoint, check_rate: bool = True) -> LoadedCheckpoint:
    """Read the tensors of a checkpoint, and what it says about learning rate and step.

    Parameters
    ----------
    checkpoint
        Where ``checkpoint.lr`` is given, what the file says of the rate is not looked at.
    check_rate
        False leaves that also until the rate is asked for.

    Raises
    ------
    TypeError, ValueError
        Missing or unreadable file, no tensors in it, a learning rate that is not a number >= 0.
    """
    source = checkpoint.source
    adapter = None
    if isinstance(source, Mapping):
        where = _IN_MEMORY
        contents = contents_of(source, where)
        stated = stated_in(contents, where)
    else:
        path = existing(source)
        where = str(path)
        contents, stated = read_contents(path, with_rates=checkpoint.lr is None)
        adapter = adapter_config(path)
    if not contents.tensors:
        holds = f"it holds {contents.keys}" if contents.keys else "it is empty"
        raise ValueError(
            f"checkpoint ({where}) must be a state dict of tensors, or hold one; {holds}"
        )
    stated = _given(checkpoint, stated)
    if check_rate and stated.lr is not None:
        learning_rate(stated.lr, f"learning rate in {where}")
    step = contents.step if checkpoint.step is None else checkpoint.step
    step = int(step) if _is_integer(step) else None
    return LoadedCheckpoint(contents, stated, step, where, checkpoint.entry, adapter)


def stated_rate(checkpoint: Checkpoint) -> Stated:
    """Return what a checkpoint says about its learning rate, without reading its tensors.

    Raises
    ------
    ValueError
        Missing or unreadable file.
    """
    source = checkpoint.source
    where = _IN_MEMORY if isinstance(source, Mapping) else str(source)
    if checkpoint.lr is not None:
        return Stated(where, checkpoint.lr)
    if isinstance(source, Mapping):
        return stated_in(contents_of(source, where), where)
    return read_contents(Path(source), rates_only=True)[1]


def _given(checkpoint: Checkpoint, stated: Stated) -> Stated:
    """Let the caller's rate come before what the file says."""
    return stated if checkpoint.lr is None else replace(stated, lr=checkpoint.lr)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
