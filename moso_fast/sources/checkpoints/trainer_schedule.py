"""The learning rate of the last step before a checkpoint of the Trainer of transformers.

What its folder states outright is the rate of the step that comes next (0 at the end of a
schedule), or the one that was logged some steps before. Its settings name the schedule, so the
library can say what the rate of the last step was.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .pickled import StandIn, load

SETTINGS = "training_args.bin"
_TOLERANCE = 1e-6


def rate_of_last_step(
    folder: Path, trainer: Mapping[str, Any], scheduler: Mapping[str, Any] | None
) -> float | None:
    """Return the rate of the optimiser step that led to the weights in ``folder``.

    None where it cannot be told: no settings, no transformers, parameter groups of several rates,
    or a schedule that is not the one in the settings, by the rates that were saved and logged.

    Parameters
    ----------
    folder
        With ``training_args.bin``, whose code is not run.
    trainer
        Its ``trainer_state.json``.
    scheduler
        State of the scheduler saved beside the weights.
    """
    step, total = trainer.get("global_step"), trainer.get("max_steps")
    known = scheduler is not None and "lr_lambdas" in scheduler and (folder / SETTINGS).is_file()
    if not known or not isinstance(step, int) or not isinstance(total, int) or step < 1:
        return None
    assert scheduler is not None
    base, saved = (_numbers(scheduler.get(key)) for key in ("base_lrs", "_last_lr"))
    if scheduler.get("last_epoch") != step or len(set(base)) != 1 or len(set(saved)) != 1:
        return None
    factor = _schedule(folder / SETTINGS, total, base[0])
    if factor is None:
        return None

    def at(number: int) -> float:
        return base[0] * factor(number)

    logged = [e for e in trainer.get("log_history") or () if {"learning_rate", "step"} <= e.keys()]
    # The log has the rate of the step or, in older versions, that of the next one.
    fits = all(
        any(_close(e["learning_rate"], at(e["step"] - late)) for late in (0, 1)) for e in logged
    )
    return at(step - 1) if fits and _close(saved[0], at(step)) else None


def _schedule(file: Path, total: int, base: float) -> Callable[[int], float] | None:
    """Return the factor on ``base`` by the step, of the schedule that the settings name."""
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        settings = load(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        return None  # settings that cannot be read without running code name no schedule
    state = settings.state if isinstance(settings, StandIn) else None
    if not isinstance(state, Mapping):
        return None
    kind = state.get("lr_scheduler_type")
    kind = kind.arguments[0] if isinstance(kind, StandIn) and kind.arguments else kind
    warmup, ratio = state.get("warmup_steps") or 0, state.get("warmup_ratio") or 0
    options = state.get("lr_scheduler_kwargs") or {}
    if not isinstance(kind, str) or not isinstance(options, Mapping):
        return None
    if 0 < warmup < 1 or (not warmup and ratio):  # a share of all steps
        warmup = math.ceil(total * (warmup or ratio))
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, device="cpu")], lr=base)
    try:
        schedule = get_scheduler(kind, optimizer, int(warmup), total, dict(options))
    except (ValueError, TypeError):
        return None  # a schedule that depends on more than the number of the step
    factors = getattr(schedule, "lr_lambdas", None)
    return factors[0] if factors else None


def _numbers(values: Any) -> Sequence[float]:
    values = values if isinstance(values, (list, tuple)) else ()
    return [float(value) for value in values if isinstance(value, (int, float))]


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other)) + 1e-15
