"""Row statistics of a data set whose parts are each scored against their own mean gradient."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..functional import LastLayerStats

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")

# A part above this size is gathered into a temporary file instead of memory.
GATHER_BYTES = 1 << 30
_GATHER_BLOCK_ROWS = 1 << 16

# What says how a problem is computed, and is not checked with its data.
_NOT_OF_A_PROBLEM = ("backend", "chunk_size", "logit_map", "logit_scale", "per")


class PartStats(list[dict[str, Tensor]]):
    """One dict of (N,) tensors per head; the backend that ran; N and |G|^2 (a head) by part."""

    backend: str = ""
    counts: dict[int, int]
    mean_grad_sqnorm: dict[int, list[float]]


def score_parts(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    partition: Tensor | None = None,
    formula: str = "moso",
    progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> PartStats:
    """Row statistics and formula scores of every head, each part against its own mean gradient.

    Parameters
    ----------
    features
        (N, D); rows of a part that are not adjacent are gathered one part at a time, above 1 GiB
        into a temporary file, so that a memory-mapped array is never read whole.
    weight, bias
        (C, D) and (C,), or (K, C, D) and (K, C) for K heads.
    labels
        (N,) class ids or (N, C) targets.
    partition
        (N,) integer ids, one a sample (a sequence where ``cu_seqlens`` is given); None = one part.
    formula
        One of ``moso_fast.core.formulas.FORMULAS``.
    progress
        Called with (parts done, parts) after every part.
    **kwargs
        Further arguments of ``last_layer_stats``, and of ``mapped.head_stats``.

    Returns
    -------
    PartStats
        K dicts with the keys alignment, grad_sqnorm, loss, el2n, margin, entropy and score (the
        formula before the learning rate), each (N,) on the CPU; NaN where a sample is ignored.

    Raises
    ------
    ValueError
        Ids of the wrong shape, a part with fewer than 2 counted samples (named), and whatever
        ``last_layer_stats`` refuses, with the row numbers of the whole data set.
    TypeError
        Ids that are not integers.
    """
    from ..core.formulas import check_formula
    from ..core.problem import build_problem, sequence_offsets

    check_formula(formula)
    parts: list[tuple[int | None, Tensor | None]] = [(None, None)]
    if partition is not None:
        # Shapes are checked on the whole, where the message shows the shapes that the caller knows.
        options = {k: v for k, v in kwargs.items() if k not in _NOT_OF_A_PROBLEM}
        problem = build_problem(features, weight, labels, bias, **options)
        if problem.cu_seqlens is not None:
            sequence_offsets(problem)
        parts = list(split_parts(partition, problem.samples))
        for part, samples in parts:
            if samples is not None and samples.numel() < 2:
                raise ValueError(_too_small(part, samples.numel()))
    heads = weight.shape[0] if weight.dim() == 3 else 1
    result = PartStats()
    result.counts, result.mean_grad_sqnorm = {}, {}
    out: dict[str, Tensor] = {}
    for done, (part, samples) in enumerate(parts):
        stats = _part_stats(part, samples, features, weight, labels, bias, kwargs)
        if part is not None and stats.count < 2:
            raise ValueError(_too_small(part, stats.count))
        values = {name: getattr(stats, name) for name in FIELDS}
        values["score"] = stats.scores(formula=formula)
        for name, tensor in values.items():
            block = tensor.detach().cpu().reshape(heads, -1)
            if samples is None:
                out[name] = block
                continue
            assert partition is not None
            if name not in out:
                shape = (heads, partition.shape[0])
                out[name] = torch.full(shape, torch.nan, dtype=block.dtype)
            out[name][:, samples] = block
        result.backend = stats.backend
        result.counts[part or 0] = stats.count
        squared = torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64)
        result.mean_grad_sqnorm[part or 0] = squared.reshape(-1).tolist()
        if progress is not None:
            progress(done + 1, len(parts))
    result.extend({name: out[name][k] for name in out} for k in range(heads))
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


def _part_stats(
    part: int | None,
    samples: Tensor | None,
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
) -> LastLayerStats:
    """Statistics of some samples (None = all) against their own mean."""
    from .mapped import head_stats

    if samples is None:
        return head_stats(features, weight, labels, bias, **options)
    rows, options = _rows_of(samples, options)
    with tempfile.TemporaryDirectory(prefix="moso_fast_") as folder:
        taken = [
            _gather(source, rows, Path(folder) / f"{number}.bin")
            for number, source in enumerate((features, labels))
        ]
        if options.get("sample_weight") is not None:
            weights = options["sample_weight"]
            options["sample_weight"] = _gather(weights, rows, Path(folder) / "weight.bin")
        try:
            return head_stats(taken[0], weight, taken[1], bias, **options)
        except ValueError as error:
            raise ValueError(f"part {part} of partition: {_renumber(str(error), rows)}") from error


def _renumber(message: str, rows: Tensor) -> str:
    """Replace row numbers within a part by those of the whole data set."""

    def whole(match: re.Match[str]) -> str:
        row = int(match[2])
        return match[1] + str(int(rows[row]) if row < rows.numel() else row)

    return re.sub(r"(\b(?:labels\[|features\[|row ))(\d+)", whole, message)


def _too_small(part: int | None, count: int) -> str:
    return (
        f"part {part} of partition has {count} counted sample{'' if count == 1 else 's'}; "
        "every part needs at least 2, so use fewer parts"
    )


def _rows_of(samples: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Rows of some samples, which are sequences with ``cu_seqlens``, and a copy of the options."""
    options = dict(options)
    if options.get("cu_seqlens") is None:
        return samples, options
    given = options["cu_seqlens"]
    offsets = given.cpu().long()
    lengths = offsets.diff()[samples]
    ends = lengths.cumsum(0)
    shift = (offsets[samples] - (ends - lengths)).repeat_interleave(lengths)
    options["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends]).to(given)
    return torch.arange(int(ends[-1])) + shift, options


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
