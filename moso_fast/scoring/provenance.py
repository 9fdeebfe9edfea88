"""The origin of a table of scores: what it was computed from, with what, and how."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.options import OPTION_NAMES, Options
from ..version import __version__
from .parts import PartStats
from .settings import Settings

# What a sample of several tokens is, is said with the facts: rows of files know no ``per``.
_RECORDED = tuple(name for name in OPTION_NAMES if name != "per")


def recorded(options: Options | Settings) -> dict[str, Any]:
    """Return the options that decide the statistics in every run, by name and as they are."""
    return {name: getattr(options, name) for name in _RECORDED}


def provenance(
    facts: Mapping[str, Any],
    stats: Sequence[PartStats],
    *,
    options: Options | Settings,
    precision: str,
    samples: int,
    partition: str,
    rates: Sequence[float | None],
    checkpoints: Sequence[Mapping[str, Any]],
    formula: str,
    combine: str,
    num_steps: int | None,
    seed: int,
) -> dict[str, Any]:
    """Say for the record how a table came about, whoever made it; JSON-able.

    Parameters
    ----------
    facts
        What only the maker of the table knows: of the model and its data, or of the files.
    stats
        Of all groups of checkpoints.
    options
        Loss and options of the scoring; a loss that is a callable is named.
    precision
        In which the products were computed, where ``options`` leave that open.
    samples, partition
        N, and the parts in words.
    rates, checkpoints
        Learning rate of each checkpoint, None for all where none has one, and what is said of it.
    formula, combine, num_steps, seed
        As they were given.
    """
    loss = options.loss
    return {
        "moso_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "backend": ", ".join(dict.fromkeys(group.backend for group in stats)),
        **facts,
        **recorded(options),
        "loss": getattr(loss, "__qualname__", type(loss).__name__) if callable(loss) else loss,
        "precision": options.precision or precision,
        "samples": samples,
        "counted": sum(stats[0].counts.values()),
        "formula": formula,
        "combine": combine,
        "num_steps": num_steps,
        "seed": seed,
        "partition": partition,
        "learning_rates": "none given, 1.0 used" if rates[0] is None else "given",
        "checkpoints": list(checkpoints),
    }
