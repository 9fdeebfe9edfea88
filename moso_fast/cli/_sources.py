"""What ``moso-fast score`` reads: features and heads in files, or Python objects by import path."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from ..core.problem import build_problem, default_precision
from ..scoring.combine import combine_checkpoints, score_parts
from ..scoring.partition import resolve_partition
from ..sources.arrays import open_array, read_labels
from ..sources.checkpoints.rates import Stated
from ..sources.checkpoints.rates_together import settle
from ..sources.heads import read_head, stack_heads
from ..tables.table import ScoreTable
from ..util.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor


def table_from_files(
    features_file: str,
    labels_file: str,
    head_files: list[str],
    rates: list[float] | None,
    options: dict[str, Any],
    how: dict[str, Any],
    *,
    device: str | None,
    progress: bool,
) -> ScoreTable:
    """Score memory-mapped features with the heads of several checkpoints."""
    import torch

    shape_options = {k: v for k, v in options.items() if k not in ("backend", "chunk_size")}
    ids = torch.zeros((0, 1) if options["loss"] in ("binary_cross_entropy", "mse") else 0)
    ids = ids if ids.dim() == 2 else ids.long()
    # An empty problem has every check of the options, before any file is opened.
    build_problem(torch.zeros(0, 1), torch.zeros(1, 1), ids, **shape_options)
    features, labels = open_array(features_file), read_labels(labels_file)
    heads = [read_head(name) for name in head_files]
    given: list[float | None] = list(rates) if rates else [None] * len(heads)
    stated = [
        (head.stated or Stated(head.source)) if rate is None else Stated(head.source, rate)
        for head, rate in zip(heads, given, strict=True)
    ]
    lrs = settle(stated, [head.scored for head in heads], how["combine"], option="--lr")
    for head in heads:  # every shape is checked before the first sweep, and named by its file
        try:
            build_problem(features, head.weight, labels, head.bias, **shape_options)
        except (ValueError, TypeError) as error:
            raise type(error)(
                f"{head.source} with {features_file}, {labels_file}: {error}"
            ) from error
    partition = resolve_partition(how["partition"], features.shape[0], how["seed"])
    where = torch.device(device or "cpu")
    stats: list[dict[str, Tensor]] = [{} for _ in heads]
    groups = stack_heads(heads)
    parts = 1 if partition is None else int(partition.unique().numel())
    backends, counts = [], {}
    with progress_bar("scoring", len(groups) * parts, progress) as advance:
        for numbers, weight, bias in groups:
            scored = score_parts(
                features.to(where),
                weight.to(where),
                labels.to(where),
                None if bias is None else bias.to(where),
                partition=partition,
                formula=how["formula"],
                progress=lambda done, total: advance(),
                **options,
            )
            backends.append(scored.backend)
            counts = scored.counts
            for number, one in zip(numbers, scored, strict=True):
                stats[number] = one
    return combine_checkpoints(
        stats,
        lr=[1.0 if lr is None else lr for lr in lrs],
        partition=partition,
        combine=how["combine"],
        num_steps=how["num_steps"],
        index=torch.arange(features.shape[0]),
        provenance={
            **_versions(),
            "backend": ", ".join(dict.fromkeys(backends)),
            "features": {
                "source": features_file,
                "shape": list(features.shape),
                "dtype": str(features.dtype).removeprefix("torch."),
            },
            "labels": labels_file,
            **{k: options[k] for k in ("loss", "label_smoothing", "ignore_index", "nonfinite")},
            "precision": options["precision"] or default_precision(features),
            **{k: how[k] for k in ("formula", "combine", "num_steps", "seed")},
            "partition": _describe(how["partition"], parts, partition is None),
            "samples": features.shape[0],
            "counted": sum(counts.values()),
            "learning_rates": "none given, 1.0 used" if lrs[0] is None else "given",
            "checkpoints": [
                {"source": head.source, "lr": lr} for head, lr in zip(heads, lrs, strict=True)
            ],
        },
    )


def table_from_model(
    model_path: str,
    data_path: str,
    checkpoints: list[str],
    entry: str | None,
    rates: list[float] | None,
    options: dict[str, Any],
    how: dict[str, Any],
    *,
    progress: bool,
) -> ScoreTable:
    """Score a data set with a network at several checkpoints, through MoSoScorer."""
    from torch import nn

    from ..scorer import MoSoScorer
    from ..sources.checkpoints.checkpoint import Checkpoint

    model = import_object(model_path, "--model", finished=nn.Module)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {model_path} must give an nn.Module; got {_kind(model)}")
    data = import_object(data_path, "--data")
    scorer = MoSoScorer(model, progress=progress, **options)
    given: list[float | None] = list(rates) if rates else [None] * len(checkpoints)
    points = [
        Checkpoint(path, lr, entry=entry) for path, lr in zip(checkpoints, given, strict=True)
    ]
    return scorer.score(data, points or None, **how)


def import_object(path: str, option: str, finished: type | None = None) -> Any:
    """Import ``package.module:name`` and call it where it is a function or a class.

    Parameters
    ----------
    path
        Import path; the current folder comes first, as for ``python -m``.
    option
        For messages.
    finished
        Instances of this type are callable and yet not called.

    Raises
    ------
    ValueError
        Not of that form, no such module, no such name in it.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"{option} must be MODULE:NAME, such as training.data:train_set; got {path!r}"
        )
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's module imports is missing: that is not about the option.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{option} {path}: there is no module {error.name!r}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            public = [word for word in vars(value) if not word.startswith("_")]
            known = ", ".join(public[:8]) or "nothing"
            raise ValueError(f"{option} {path}: no {part!r} in {module_name}; it has {known}")
        value = getattr(value, part)
    if finished is not None and isinstance(value, finished):
        return value
    return value() if callable(value) else value


def _versions() -> dict[str, str]:
    import torch

    from .. import __version__

    return {
        "moso_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _describe(given: Any, parts: int, whole: bool) -> str:
    if whole:
        return "one part"
    return f"{parts} parts, {'seeded split' if isinstance(given, int) else 'given ids'}"


def _kind(value: Any) -> str:
    return type(value).__name__
