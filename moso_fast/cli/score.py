"""``moso-fast score``: features and heads from files, or a model and its data by import path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import Json, Quiet, describe, emit

if TYPE_CHECKING:
    from ..tables.table import ScoreTable


def score(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Score table: .parquet, .csv or .npz.")
    ],
    features: Annotated[
        str | None,
        typer.Option(help="(N, D): .npy or .safetensors[:NAME], memory-mapped.", metavar="FILE"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="(N,) ids or (N, C): .npy or .safetensors[:NAME].", metavar="FILE"),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear head: .safetensors, .npz, .npy or .pt; each one is a checkpoint.",
            metavar="FILE[:WEIGHT[,BIAS]]",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Network, or a function that returns it.", metavar="MODULE:NAME"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Dataset or loader, or what returns it.", metavar="MODULE:NAME"),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights of the network at one step; several are allowed.", metavar="PATH"
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            help="Dotted name in each --checkpoint file below which its weights lie, where "
            "several fit the model, such as state_dict_ema.",
            metavar="NAME",
        ),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            help="Learning rate of each --head or --checkpoint, in the same order.", metavar="RATE"
        ),
    ] = None,
    formula: Annotated[
        str,
        typer.Option(help="moso, one_step, official, official_exact, alignment or cosine."),
    ] = "moso",
    combine: Annotated[str, typer.Option(help="Over checkpoints: mean or zscore.")] = "mean",
    num_steps: Annotated[
        int | None, typer.Option(help="T, training steps; without it the factor T/N is left out.")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="Number of random parts, or (N,) part ids as .npy.", metavar="INT|FILE"),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, binary_cross_entropy or mse.")
    ] = "cross_entropy",
    gradient: Annotated[
        str, typer.Option(help="Of the --model: last_layer, or full (all parameters).")
    ] = "last_layer",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="With --gradient full: parameters or modules that count, or a pattern.",
            metavar="NAME",
        ),
    ] = None,
    views: Annotated[
        int, typer.Option(help="With --gradient full: augmented readings of every sample.")
    ] = 1,
    autocast: Annotated[
        str | None, typer.Option(help="With --gradient full: bfloat16 or float16.")
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="In [0, 1).")] = 0.0,
    ignore_index: Annotated[int, typer.Option(help="Label of samples to leave out.")] = -100,
    precision: Annotated[
        str | None, typer.Option(help="highest, high or medium; default by the features' dtype.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or a name from moso-fast doctor.")] = "auto",
    chunk_size: Annotated[int | None, typer.Option(help="Rows at a time.")] = None,
    nonfinite: Annotated[
        str, typer.Option(help="Rows with NaN or infinity: raise or exclude.")
    ] = "raise",
    seed: Annotated[int, typer.Option(help="Of the random parts.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Where --data is a Dataset.")] = 256,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cuda; default cpu.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every sample; high = informative = keep.

    Either --features, --labels and one or more --head (files), or --model, --data and any number
    of --checkpoint (Python import paths; the current folder is searched first).
    """
    from ..core.formulas import check_formula
    from ..scoring.combine import check_combine
    from ..tables.files import SUFFIXES
    from ..util.devices import usable_device
    from ..util.files import check_folder

    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output must end in {', '.join(SUFFIXES)}; got {output.name!r}")
    check_folder(output)
    check_formula(formula)
    check_combine(combine, num_steps)
    by_file = {"--features": features, "--labels": labels, "--head": head}
    by_path = {"--model": model, "--data": data}
    given = {**by_path, "--checkpoint": checkpoint, "--entry": entry}
    _check_mode(by_file, given, needed=(by_file, by_path))
    if entry and not checkpoint:
        raise ValueError(f"--entry {entry} goes with --checkpoint, in whose files it is looked up")
    sources, option = (head, "--head") if features is not None else (checkpoint, "--checkpoint")
    rates = _check_rates(lr, sources or [], option)
    full = _full_options(gradient, scope, views, autocast, from_files=features is not None)
    options: dict[str, Any] = {
        "device": None if device is None else usable_device(device, "--device"),
        "loss": loss,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "precision": precision,
        "backend": backend,
        "chunk_size": chunk_size,
        "nonfinite": nonfinite,
        "progress": not quiet,
    }
    how: dict[str, Any] = {
        "formula": formula,
        "combine": combine,
        "num_steps": num_steps,
        "partition": _partition(partition),
        "seed": seed,
    }
    start = time.perf_counter()
    if features is not None and labels is not None and head is not None:
        from ..scoring.from_files import score_files

        table = score_files(features, labels, head, lr=rates, lr_option="--lr", **options, **how)
    else:
        assert model is not None and data is not None
        options |= {**full, "batch_size": batch_size}
        table = _score_model(model, data, checkpoint or [], entry, rates, options, how)
    seconds = time.perf_counter() - start
    table.save(output)
    facts = table.provenance
    result = {
        "output": str(output),
        "samples": len(table),
        **describe(table.scores),
        "checkpoints": len(facts["checkpoints"]),
        "formula": formula,
        "combine": combine,
        "partition": facts["partition"],
        "backend": facts["backend"],
        "seconds": round(seconds, 3),
    }
    emit(result, as_json=json, quiet=quiet)


def _check_mode(
    by_file: dict[str, Any], by_path: dict[str, Any], needed: tuple[dict[str, Any], ...]
) -> None:
    """Raise ValueError unless exactly one complete set of sources is given."""
    given = [[name for name, value in group.items() if value] for group in (by_file, by_path)]
    if all(given):
        raise ValueError(f"{given[0][0]} and {given[1][0]} exclude each other: files or a model")
    if not any(given):
        raise ValueError(
            "nothing to score: give --features, --labels and --head, or --model and --data"
        )
    wanted = needed[0] if given[0] else needed[1]
    missing = [name for name, value in wanted.items() if not value]
    if missing:
        raise ValueError(f"{', '.join(missing)} must go with {(given[0] or given[1])[0]}")


def _check_rates(rates: list[float] | None, sources: list[str], option: str) -> list[float] | None:
    if not rates:
        return None
    if len(rates) != len(sources):
        raise ValueError(f"give one --lr for each {option}: got {len(rates)} for {len(sources)}")
    for rate in rates:
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"--lr must be a number >= 0; got {rate}")
    return rates


def _full_options(
    gradient: str, scope: list[str] | None, views: int, autocast: str | None, from_files: bool
) -> dict[str, Any]:
    """Return the arguments of the scorer that go with ``--gradient full``."""
    if from_files:
        if gradient != "last_layer":
            raise ValueError(f"--gradient {gradient} goes with --model and --data, not with files")
        given = {"--scope": bool(scope), "--views": views != 1, "--autocast": autocast is not None}
        for option, is_given in given.items():
            if is_given:
                raise ValueError(f"{option} goes with --gradient full, --model and --data")
        return {}
    import torch

    dtypes = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if autocast not in dtypes:
        raise ValueError(f"--autocast must be bfloat16 or float16; got {autocast!r}")
    return {
        "gradient": gradient,
        "scope": scope or None,
        "views": views,
        "autocast": dtypes[autocast],
    }


def _score_model(
    model_path: str,
    data_path: str,
    checkpoints: list[str],
    entry: str | None,
    rates: list[float] | None,
    options: dict[str, Any],
    how: dict[str, Any],
) -> ScoreTable:
    """Hand a network and a data set to MoSoScorer, which are given by their import paths."""
    from torch import nn

    from ..scorer import MoSoScorer
    from ..sources.checkpoints.checkpoint import Checkpoint
    from ..sources.import_path import import_object

    model = import_object(model_path, "--model", finished=nn.Module)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"--model {model_path} must give an nn.Module; got {kind}")
    data = import_object(data_path, "--data")
    scorer = MoSoScorer(model, **options)
    given: list[float | None] = list(rates) if rates else [None] * len(checkpoints)
    points = [
        Checkpoint(path, lr, entry=entry) for path, lr in zip(checkpoints, given, strict=True)
    ]
    return scorer.score(data, points or None, **how)


def _partition(text: str | None) -> Any:
    """Return a number of parts, ids from a file, or None."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    from ..sources.arrays import read_labels

    if not text.endswith(".npy"):
        raise ValueError(f"--partition must be a number of parts or an .npy file; got {text!r}")
    return read_labels(text)
