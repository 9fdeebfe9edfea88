"""Scores of features that lie in files or in memory, with the heads of several checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_features, check_head
from ..core.formulas import check_formula
from ..core.options import Options
from ..sources.arrays import open_array, read_labels
from ..sources.checkpoints.rates import Stated
from ..sources.checkpoints.rates_together import settle
from ..sources.heads import Head, check_finite, head_of, stack_heads
from ..tables.files import SUFFIXES
from ..tables.table import ScoreTable
from ..util.array_like import as_tensor
from ..util.files import check_folder
from ..util.progress import progress_bar
from .combine import check_combine, combine_checkpoints
from .mapped import HeadProblem, head_problem
from .partition import describe_partition, resolve_partition
from .parts import PartStats, part_stats, with_scores
from .provenance import provenance


def score_files(
    features: Any,
    labels: Any,
    heads: Any,
    *,
    lr: Sequence[float | None] | None = None,
    formula: str = "moso",
    combine: str = "mean",
    num_steps: int | None = None,
    partition: Any = None,
    seed: int = 0,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    precision: str | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    nonfinite: str = "raise",
    device: torch.device | str | None = None,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    lr_option: str = "lr=",
) -> ScoreTable:
    """Score stored features with the linear heads of one or several checkpoints.

    What ``moso-fast score --features --labels --head`` does. Each head is a checkpoint: its scores
    are those of :func:`moso_fast.moso_scores`, which are then combined as by
    :meth:`moso_fast.MoSoScorer.score`.

    Parameters
    ----------
    features
        (N, D) inputs of the last layer: a tensor or array, or the path of an .npy file or of
        ``FILE.safetensors[:NAME]``, which is memory-mapped and never read whole.
    labels
        (N,) class ids, or (N, C) targets: a tensor or array, or a path as for ``features``.
    heads
        One head or a list of them: the path of a .safetensors, .npz, .npy or torch file, as
        ``FILE[:WEIGHT[,BIAS]]`` where it holds several tensors; a `Checkpoint` of such a file or
        of a state dict with one matrix; a weight (C, D); or a tuple (weight, bias) of (C, D) and
        (C,). Heads may differ in C.
    lr
        Learning rate of each head, >= 0; None takes what the files say, and 1 for all of them where
        none says anything.
    formula
        One of :data:`moso_fast.FORMULAS`.
    combine, num_steps
        ``"mean"`` (weighted by learning rate, times T / N with T = ``num_steps``) or ``"zscore"``.
    partition
        None, (N,) integer ids, or a number of parts I (see `partition_ids`): each part is scored
        against its own mean gradient and needs two counted samples.
    seed
        Seed of the split for an integer ``partition``.
    loss, label_smoothing, ignore_index, precision, backend, chunk_size, nonfinite
        As in :func:`moso_fast.moso_scores`.
    device
        Where to compute; None = where the features are, which for files is the CPU.
    progress
        Show progress on stderr when it is a terminal.
    out
        A .parquet, .csv or .npz file to which the table is written as well, whole or not at all.
    lr_option
        What messages call ``lr``, for programs that take it under another name.

    Returns
    -------
    ScoreTable
        In the order of the rows, with index 0..N-1.

    Raises
    ------
    TypeError, ValueError
        Input that cannot be scored, in one line, before the first sweep over the features where
        shapes, dtypes and files show it; learning rates that some heads have and others lack.
    FileNotFoundError
        No such file, or no such folder for ``out``.

    Examples
    --------
    >>> table = score_files("features.npy", "labels.npy", ["step1.pt", "step2.pt"], partition=8)
    >>> kept = select(table.scores, keep=0.5)
    """
    check_formula(formula)
    check_combine(combine, num_steps)
    if out is not None:
        _check_out(out)
    options = Options(
        loss=loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        precision=precision,
        nonfinite=nonfinite,
    )
    rows, targets = _array("features", features, open_array), _array("labels", labels, read_labels)
    read = _read_heads(heads, lr, lr_option)
    stated = [head.stated or Stated(head.source) for head in read]
    rates = settle(stated, [head.scored for head in read], combine, option=lr_option)
    where = rows.device if device is None else torch.device(device)
    names = [_name("features", features), _name("labels", labels)]
    groups = _problems(rows, targets, read, names, options, where)
    ids = resolve_partition(partition, rows.shape[0], seed)
    parts = 1 if ids is None else int(ids.unique().numel())
    stats: list[dict[str, Tensor]] = [{} for _ in read]
    found: list[PartStats] = []
    with progress_bar("scoring", len(groups) * parts, progress) as advance:
        for numbers, job in groups:
            one = part_stats(
                job, partition=ids, backend=backend, chunk_size=chunk_size, progress=advance
            )
            found.append(one)
            for number, fields in zip(numbers, with_scores(one, formula, ids), strict=True):
                stats[number] = fields
    source, kind = names[0], str(rows.dtype).removeprefix("torch.")
    table = combine_checkpoints(
        stats,
        lr=[1.0 if rate is None else rate for rate in rates],
        partition=ids,
        combine=combine,
        num_steps=num_steps,
        index=torch.arange(rows.shape[0], device="cpu"),
        provenance=provenance(
            {
                "features": {"source": source, "shape": list(rows.shape), "dtype": kind},
                "labels": names[1],
            },
            found,
            options=options,
            precision=groups[0][1].problem.precision,
            samples=rows.shape[0],
            partition=describe_partition(ids, partition, seed),
            rates=rates,
            checkpoints=[
                {"source": head.source, "lr": rate} for head, rate in zip(read, rates, strict=True)
            ],
            formula=formula,
            combine=combine,
            num_steps=num_steps,
            seed=seed,
        ),
    )
    if out is not None:
        table.save(out)
    return table


def _check_out(out: str | os.PathLike[str]) -> None:
    if Path(out).suffix not in SUFFIXES:
        raise ValueError(f"out must end in {', '.join(SUFFIXES)}; got {Path(out).name!r}")
    check_folder(out)


def _array(name: str, value: Any, read: Any) -> Tensor:
    """Return what an argument names or holds, without a copy where its memory can be shared."""
    if isinstance(value, (str, os.PathLike)):
        return read(value)
    # Numbers of a view whose signs are still to be changed are not those that lie in its memory.
    return as_tensor(name, value).detach().resolve_neg()


def _name(name: str, value: Any) -> str:
    """Return what messages and the record call an argument: its file, or itself."""
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else name


def _read_heads(heads: Any, lr: Sequence[float | None] | None, lr_option: str) -> list[Head]:
    """Heads in their order, with the learning rates that were given."""
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads]
    if not heads:
        raise ValueError("heads is empty; give at least one")
    rates = [None] * len(heads) if lr is None else list(lr)
    if len(rates) != len(heads):
        raise ValueError(
            f"{lr_option} must give one learning rate a head; got {len(rates)} for {len(heads)}"
        )
    read = []
    for number, (value, rate) in enumerate(zip(heads, rates, strict=True)):
        head = head_of(value, f"heads[{number}]")
        check_finite(head.source, head.weight, head.bias)
        read.append(head if rate is None else head.with_rate(rate))
    return read


def _problems(
    features: Tensor,
    labels: Tensor,
    heads: list[Head],
    names: list[str],
    options: Options,
    device: torch.device,
) -> list[tuple[list[int], HeadProblem]]:
    """Heads that are scored together, by their numbers, as checked problems.

    All are checked before the first sweep, and what does not fit is named by its file.
    """
    with_files = f"with {', '.join(names)}"
    heads = [head.on(features.device) for head in heads]
    for head in heads:  # before they are stacked: messages show the shapes of each
        with _about(f"{head.source} {with_files}"):
            check_features(features)
            check_head(features, head.weight, head.bias)
    features, labels = features.to(device), labels.to(device)
    problems = []
    for numbers, weight, bias in stack_heads(heads):
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
        with _about(f"{heads[numbers[0]].source} {with_files}"):
            problem = head_problem(features, weight, labels, bias, options=options)
        problems.append((numbers, problem))
    return problems


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Have the errors of the block, which are not about a row, begin with what they are about."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
