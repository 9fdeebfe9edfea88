"""From row statistics per checkpoint and part to one ScoreTable; the algebra every scorer shares.

The paper's score is ``T / (N K) sum_k eta_k s_k``: each sample is scored against the mean
gradient of its own part of N samples, at K sampled checkpoints with learning rates eta_k.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .table import ScoreTable

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")
COMBINE = ("mean", "zscore")

# A part above this size is gathered into a temporary file instead of memory.
GATHER_BYTES = 1 << 30
_GATHER_BLOCK_ROWS = 1 << 16


class PartStats(list[dict[str, Tensor]]):
    """One dict of (N,) tensors per head, with the backend that ran and the counts per part."""

    backend: str = ""
    counts: dict[int, int]


def score_parts(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    partition: Tensor | None = None,
    formula: str = "moso",
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
        One of ``moso_fast.formulas.FORMULAS``.
    **kwargs
        Further arguments of ``last_layer_stats``.

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
    if partition is None:
        return _assemble([(None, None)], features, weight, labels, bias, formula, kwargs)
    cu_seqlens = kwargs.get("cu_seqlens")
    num_samples = features.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    parts = split_parts(partition, num_samples)
    for part, rows in parts:
        if rows.numel() < 2:
            raise ValueError(_too_small(part, rows.numel()))
    return _assemble(list(parts), features, weight, labels, bias, formula, kwargs)


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


def combine_checkpoints(
    stats: Sequence[Mapping[str, Tensor]],
    *,
    lr: Sequence[float],
    partition: Tensor | None = None,
    combine: str = "mean",
    num_steps: int | None = None,
    index: Tensor,
    provenance: Mapping[str, Any] | None = None,
) -> ScoreTable:
    """Combine the statistics of K checkpoints into one table.

    Parameters
    ----------
    stats
        K mappings as returned by :func:`score_parts`: alignment, grad_sqnorm, loss, el2n, margin,
        entropy, score, each (N,).
    lr
        K learning rates eta_k, in units of the optimiser's step.
    partition
        (N,) ids of the parts the statistics were computed in; None = one part.
    combine
        ``"mean"``: score = T / (N K) sum_k eta_k s_k with N the counted samples of the part (the
        paper). ``"zscore"``: s_k less its mean over the population standard deviation within its
        part (all zero where that is 0), averaged over k; eta_k and T / N cancel.
    num_steps
        T, the number of training steps; None leaves the factor T / N out.
    index
        (N,) data-set indices of the rows.
    provenance
        JSON-able facts to keep with the table.

    Returns
    -------
    ScoreTable
        ``metrics``: means over checkpoints of the six statistics, ``grand`` = mean of
        sqrt(grad_sqnorm), ``self_influence`` = (1/K) sum_k eta_k grad_sqnorm_k.
        ``per_checkpoint``: the six (K, N), and ``score`` = eta_k s_k.

    Raises
    ------
    ValueError
        No checkpoint, unequal lengths, a missing key, an unknown ``combine``, a bad ``num_steps``.
    """
    num_checkpoints = len(stats)
    if num_checkpoints == 0:
        raise ValueError("stats must hold at least one checkpoint; got none")
    if len(lr) != num_checkpoints:
        raise ValueError(
            f"lr must give one learning rate a checkpoint; got {len(lr)} for {num_checkpoints}"
        )
    check_combine(combine, num_steps)
    stacked = {name: _stack(stats, name, index) for name in (*FIELDS, "score")}
    dtype = stacked["score"].dtype
    wide = {name: values.double() for name, values in stacked.items()}
    rates = torch.tensor([float(rate) for rate in lr], dtype=torch.float64)[:, None]
    parts = [slice(None)] if partition is None else [r for _, r in _parts_of(partition, index)]
    raw, weighted = wide["score"], wide["score"] * rates
    if combine == "zscore":
        scores = _standardise(raw, parts).mean(0)
    elif num_steps is None:
        scores = weighted.mean(0)
    else:
        scaled = torch.empty_like(weighted)
        for rows in parts:
            counted = (~wide["alignment"][:, rows].isnan()).sum(1, keepdim=True)
            scaled[:, rows] = weighted[:, rows] * (num_steps / counted)
        scores = scaled.mean(0)
    metrics = {name: wide[name].mean(0) for name in FIELDS}
    metrics["grand"] = wide["grad_sqnorm"].sqrt().mean(0)
    metrics["self_influence"] = (wide["grad_sqnorm"] * rates).mean(0)
    return ScoreTable(
        scores=scores.to(dtype),
        metrics={name: values.to(dtype) for name, values in metrics.items()},
        per_checkpoint={
            **{name: stacked[name] for name in FIELDS},
            "score": weighted.to(dtype),
        },
        index=index.cpu().long(),
        higher_is_better=True,
        provenance=dict(provenance or {}),
    )


def check_combine(combine: str, num_steps: int | None = None) -> None:
    """Raise ValueError for an unknown ``combine`` or a ``num_steps`` that is no count."""
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}; got {combine!r}")
    if num_steps is not None and (isinstance(num_steps, bool) or num_steps < 1):
        raise ValueError(f"num_steps must be None or a whole number >= 1; got {num_steps!r}")


def _parts_of(partition: Tensor, index: Tensor) -> list[tuple[int, Tensor]]:
    return split_parts(partition, index.shape[0])


def _stack(stats: Sequence[Mapping[str, Tensor]], name: str, index: Tensor) -> Tensor:
    """Stack one statistic of all checkpoints to (K, N) on the CPU."""
    for k, one in enumerate(stats):
        if name not in one:
            raise ValueError(f"stats of checkpoint {k} lack {name!r}; they have {sorted(one)}")
        if one[name].shape != index.shape:
            raise ValueError(
                f"stats[{k}][{name!r}] must have shape {tuple(index.shape)}, as index; "
                f"got {tuple(one[name].shape)}"
            )
    return torch.stack([one[name].detach().cpu() for one in stats])


def _standardise(scores: Tensor, parts: Sequence[Any]) -> Tensor:
    """Zero mean and unit population deviation per checkpoint and part; NaN stays NaN."""
    result = torch.empty_like(scores)
    for rows in parts:
        values = scores[:, rows]
        if not values.numel():
            continue
        centred = values - values.nanmean(1, keepdim=True)
        deviation = centred.square().nanmean(1, keepdim=True).sqrt()
        # Equal scores leave rounding noise of the mean behind: that is no spread either.
        noise = 1e-14 * values.abs().nan_to_num(0.0).amax(1, keepdim=True)
        flat = deviation <= noise
        result[:, rows] = torch.where(flat, centred * 0.0, centred / deviation)
    return result


def _assemble(
    parts: Sequence[tuple[int | None, Tensor | None]],
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    formula: str,
    kwargs: dict[str, Any],
) -> PartStats:
    """Run last_layer_stats for each part and write its results into place."""
    from .formulas import check_formula
    from .functional import last_layer_stats

    check_formula(formula)
    heads = weight.shape[0] if weight.dim() == 3 else 1
    num_samples = sum(0 if rows is None else rows.numel() for _, rows in parts)
    out: dict[str, Tensor] = {}
    result = PartStats()
    result.counts = {}
    with tempfile.TemporaryDirectory(prefix="moso_fast_") as folder:
        for part, rows in parts:
            inputs = (features, labels, kwargs)
            if rows is not None:
                inputs = _take(features, labels, kwargs, rows, Path(folder))
            try:
                stats = last_layer_stats(inputs[0], weight, inputs[1], bias, **inputs[2])
            except ValueError as error:
                if rows is None:
                    raise
                raise ValueError(f"part {part} of partition: {error}") from error
            if part is not None and stats.count < 2:
                raise ValueError(_too_small(part, stats.count))
            values = {name: getattr(stats, name) for name in FIELDS}
            values["score"] = stats.scores(formula=formula)
            for name, tensor in values.items():
                block = tensor.detach().cpu().reshape(heads, -1)
                if rows is None:
                    out[name] = block
                    continue
                if name not in out:
                    out[name] = torch.full((heads, num_samples), torch.nan, dtype=block.dtype)
                out[name][:, rows] = block
            result.backend = stats.backend
            result.counts[0 if part is None else part] = stats.count
    result.extend({name: out[name][k] for name in out} for k in range(heads))
    return result


def _too_small(part: int | None, count: int) -> str:
    return (
        f"part {part} of partition has {count} counted sample{'' if count == 1 else 's'}; "
        "every part needs at least 2, so use fewer parts"
    )


def _take(
    features: Tensor, labels: Tensor, kwargs: dict[str, Any], samples: Tensor, folder: Path
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features, labels and keyword arguments of some samples (sequences with cu_seqlens)."""
    kwargs = dict(kwargs)
    rows = samples
    if kwargs.get("cu_seqlens") is not None:
        offsets = torch.as_tensor(kwargs["cu_seqlens"])
        starts = offsets.cpu().long()
        lengths = (starts[1:] - starts[:-1])[samples]
        ends = lengths.cumsum(0)
        shift = (starts[samples] - (ends - lengths)).repeat_interleave(lengths)
        rows = torch.arange(int(ends[-1])) + shift
        kwargs["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends]).to(offsets)
    if kwargs.get("sample_weight") is not None:
        kwargs["sample_weight"] = _gather(kwargs["sample_weight"], rows, folder)
    return _gather(features, rows, folder), _gather(labels, rows, folder), kwargs


def _gather(source: Tensor, rows: Tensor, folder: Path) -> Tensor:
    """Rows of ``source``: a view where they are adjacent, else a copy in memory or in a file."""
    if rows.numel() and int(rows[-1] - rows[0]) + 1 == rows.numel():
        return source[int(rows[0]) : int(rows[-1]) + 1]
    width = source[:1].numel()
    if source.is_cuda or rows.numel() * width * source.element_size() <= GATHER_BYTES:
        return source.index_select(0, rows.to(source.device))
    path = folder / "part.bin"
    path.unlink(missing_ok=True)  # the previous part's map dies with its tensor
    flat = torch.from_file(str(path), shared=True, size=rows.numel() * width, dtype=source.dtype)
    gathered = flat.view(rows.numel(), *source.shape[1:])
    for block in range(0, rows.numel(), _GATHER_BLOCK_ROWS):
        piece = rows[block : block + _GATHER_BLOCK_ROWS]
        gathered[block : block + piece.numel()] = source.index_select(0, piece)
    return gathered
