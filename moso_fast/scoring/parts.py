"""Row statistics of a data set whose parts are each scored against their own mean gradient."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.formulas import check_count, score
from ..core.passes import Results
from ..core.problem import Problem
from ..core.status import sequence_offsets
from .mapped import HeadProblem

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")

# A part above this size is gathered into a temporary file instead of memory.
GATHER_BYTES = 1 << 30
_GATHER_BLOCK_ROWS = 1 << 16


class PartStats(list[dict[str, Tensor]]):
    """One dict of (N,) tensors per head; the backend that ran; N and |G|^2 (a head) by part."""

    backend: str = ""
    counts: dict[int, int]
    mean_grad_sqnorm: dict[int, list[float]]


def part_stats(
    heads: HeadProblem,
    *,
    partition: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> PartStats:
    """Row statistics of every head, those of each part against its own mean gradient.

    Parameters
    ----------
    heads
        The problem of the whole data set. Rows of a part that are not adjacent are gathered one
        part at a time, above 1 GiB into a temporary file, so that a memory-mapped array is never
        read whole.
    partition
        (N,) integer ids, one a sample (a sequence where the problem has them); None = one part.
    backend, chunk_size
        As in `last_layer_stats`.
    progress
        Called after every part.

    Returns
    -------
    PartStats
        K dicts with the keys alignment, grad_sqnorm, loss, el2n, margin and entropy, each (N,) on
        the CPU; NaN where a sample is ignored. `with_scores` makes scores of them.

    Raises
    ------
    ValueError
        Ids of the wrong shape, a part with fewer than 2 counted samples (named), and whatever the
        engine refuses, with the row numbers of the whole data set.
    TypeError
        Ids that are not integers.
    """
    problem, result = heads.problem, PartStats()
    result.counts, result.mean_grad_sqnorm = {}, {}
    if partition is None:
        found, result.backend = heads.solve(backend, chunk_size)
        fields = _note(result, 0, found)
        result.extend({n: values[k] for n, values in fields.items()} for k in range(problem.heads))
        progress()
        return result
    offsets = None if problem.cu_seqlens is None else sequence_offsets(problem)
    parts = split_parts(partition, problem.samples)
    for part, samples in parts:
        if samples.numel() < 2:
            raise ValueError(_too_small(part, samples.numel()))
    whole: dict[str, Tensor] = {}
    for part, samples in parts:
        with _part_of(problem, part, samples, offsets) as own:
            found, result.backend = heads.of(own).solve(backend, chunk_size)
        for name, values in _note(result, part, found).items():
            if name not in whole:
                shape = (problem.heads, problem.samples)
                whole[name] = torch.full(shape, torch.nan, dtype=values.dtype, device="cpu")
            whole[name][:, samples] = values
        if result.counts[part] < 2:
            raise ValueError(_too_small(part, result.counts[part]))
        progress()
    result.extend({n: values[k] for n, values in whole.items()} for k in range(problem.heads))
    return result


def with_scores(stats: PartStats, formula: str, ids: Tensor | None) -> list[dict[str, Tensor]]:
    """Statistics of each head with its ``score``, computed from the statistics alone.

    Raises
    ------
    ValueError
        One counted sample where ``formula`` divides by N - 1.
    """
    samples = stats[0]["alignment"].shape[0]
    parts: list[tuple[int, Any]] = [(0, slice(None))]
    if ids is not None:
        parts = list(split_parts(ids, samples))
    result = []
    for count in stats.counts.values():
        check_count(formula, count)
    for k, fields in enumerate(stats):
        scores = torch.empty_like(fields["alignment"])
        for part, rows in parts:
            scores[rows] = score(
                formula,
                fields["alignment"][rows],
                fields["grad_sqnorm"][rows],
                torch.tensor(
                    stats.mean_grad_sqnorm[part][k : k + 1], dtype=torch.float64, device="cpu"
                ),
                torch.tensor(stats.counts[part], device="cpu"),
            )
        result.append({**fields, "score": scores})
    return result


def split_parts(partition: Tensor, num_samples: int) -> list[tuple[int, Tensor]]:
    """List (id, ascending sample numbers) of every part, by ascending id.

    Raises
    ------
    ValueError
        ``partition`` is not of shape (num_samples,).
    TypeError
        ``partition`` does not hold integers.
    """
    if partition.dim() != 1 or partition.shape[0] != num_samples:
        raise ValueError(
            f"partition must have shape ({num_samples},), one id a sample; "
            f"got {tuple(partition.shape)}"
        )
    if partition.is_floating_point() or partition.is_complex() or partition.dtype == torch.bool:
        raise TypeError(f"partition must hold integer ids; got {partition.dtype}")
    ids, counts = partition.cpu().unique(return_counts=True)
    order = partition.cpu().argsort(stable=True)
    return list(zip(ids.tolist(), order.split(counts.tolist()), strict=True))


def _note(result: PartStats, part: int, found: Results) -> dict[str, Tensor]:
    """Keep what is known of a part as a whole; its statistics (K, samples) on the CPU."""
    result.counts[part] = int(found.count)
    result.mean_grad_sqnorm[part] = found.mean_grad_sqnorm.double().tolist()
    return {name: getattr(found, name).detach().cpu() for name in FIELDS}


@contextmanager
def _part_of(
    problem: Problem, part: int, samples: Tensor, offsets: Tensor | None
) -> Iterator[Problem]:
    """Yield the problem of some samples; errors of the block speak of the rows of the whole."""
    rows, lengths = _rows_of(samples, offsets)
    with tempfile.TemporaryDirectory(prefix="moso_fast_") as folder:
        taken: dict[str, Tensor] = {}
        for name in ("features", "labels", "sample_weight"):
            source = getattr(problem, name)
            if source is not None:
                taken[name] = _gather(source, rows, Path(folder) / f"{name}.bin")
        if lengths is not None:
            assert problem.cu_seqlens is not None
            taken["cu_seqlens"] = lengths.to(problem.cu_seqlens)
        try:
            yield replace(problem, **taken)  # type: ignore[arg-type]
        except DataError as error:
            where = f"part {part} of partition: "
            raise error.moved(int(rows[error.row]), where) from error


def _too_small(part: int, count: int) -> str:
    return (
        f"part {part} of partition has {count} counted sample{'' if count == 1 else 's'}; "
        "every part needs at least 2, so use fewer parts"
    )


def _rows_of(samples: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of some samples, and where these are sequences, the offsets among those rows."""
    if offsets is None:
        return samples, None
    lengths = offsets.diff()[samples]
    ends = lengths.cumsum(0)
    shift = (offsets[samples] - (ends - lengths)).repeat_interleave(lengths)
    own = torch.cat([ends.new_zeros(1), ends])
    return torch.arange(int(ends[-1]), device="cpu") + shift, own


def _gather(source: Tensor, rows: Tensor, path: Path) -> Tensor:
    """Rows of ``source``: a view where they are adjacent, else a copy in memory or at ``path``."""
    if rows.numel() and int(rows[-1] - rows[0]) + 1 == rows.numel():
        return source[int(rows[0]) : int(rows[-1]) + 1]
    shape = (rows.numel(), *source.shape[1:])
    size = math.prod(shape)
    if source.is_cuda or size * source.element_size() <= GATHER_BYTES:
        return source.index_select(0, rows.to(source.device))
    gathered = torch.from_file(str(path), shared=True, size=size, dtype=source.dtype).view(shape)
    for start in range(0, rows.numel(), _GATHER_BLOCK_ROWS):
        piece = rows[start : start + _GATHER_BLOCK_ROWS]
        gathered[start : start + piece.numel()] = source.index_select(0, piece)
    return gathered
