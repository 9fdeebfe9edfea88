"""Which samples to keep: exact counts, class quotas, no repeated and no unscored sample."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..util.array_like import as_tensor
from .table import ScoreTable

METHODS = ("top", "bottom", "random", "sample")
BALANCES = ("equal", "proportional")

# Decimals that count in a fraction: 1 - 0.9 is 0.1 although binary floats disagree in the 17th.
_DECIMALS = 12


def select(
    scores: Any,
    keep: float,
    *,
    labels: Any = None,
    balance: str | None = None,
    method: str = "top",
    seed: int = 0,
) -> Tensor:
    """Choose the samples to keep, ascending and without repetition.

    Parameters
    ----------
    scores
        (N,) scores, high = keep, NaN = never kept: a tensor, an array, a column of pandas or a
        list; or a :class:`ScoreTable`, whose direction is heeded and whose data-set indices are
        returned.
    keep
        An int is a count. A float in [0, 1] is a fraction of all N scores, read as a decimal of 12
        places and rounded half up: 0.2 of 50,000 is 10,000, and so is ``1 - 0.8``.
    labels
        (N,) integer classes; needed by ``balance``. For a table: in the order of its rows, or,
        where it lacks rows, of the whole data set (told apart by the length).
    balance
        ``None``: the whole set in one ranking. ``"equal"``: the same quota for every class; what a
        small class cannot fill goes to the others in equal shares. ``"proportional"``: quotas as
        the classes' numbers of scored samples. Left-over places go by largest remainder, then to
        the lower class.
    method
        ``"top"`` keeps the highest scores, ``"bottom"`` the lowest, ties to the lower row;
        ``"random"`` ignores the values; ``"sample"`` draws without replacement with probability
        proportional to the rank within the class (worst = 1, ties share their mean rank).
    seed
        Of ``"random"`` and ``"sample"``.

    Returns
    -------
    Tensor
        int64 on the CPU: row numbers of ``scores`` (positions, as for ``iloc`` of pandas), or
        data-set indices for a table.

    Raises
    ------
    ValueError
        A fraction outside [0, 1], a negative count, more than the samples with a score, an unknown
        word, labels that are missing or of another length.
    TypeError
        ``keep`` is a bool or no number; scores or labels of a wrong type.
    """
    if isinstance(scores, ScoreTable):
        values = scores.scores if scores.higher_is_better else -scores.scores
        if balance is not None:
            labels = _labels_of_rows(labels, scores.index)
        rows = select(values, keep, labels=labels, balance=balance, method=method, seed=seed)
        return scores.index[rows].sort().values
    values = _check_scores(scores)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if balance is not None and balance not in BALANCES:
        raise ValueError(f"balance must be None, {' or '.join(BALANCES)}; got {balance!r}")
    valid = (~values.isnan()).nonzero().flatten()
    count = keep_count(keep, values.shape[0])
    if count > valid.numel():
        raise ValueError(
            f"keep={keep!r} asks for {count} samples, but only {valid.numel()} of "
            f"{values.shape[0]} have a score"
        )
    generator = torch.Generator().manual_seed(seed)
    if balance is None:
        groups, quotas = [valid], [count]
    else:
        groups = _by_class(_check_labels(labels, values.shape[0]), valid)
        sizes = [group.numel() for group in groups]
        quotas = apportion(count, [1] * len(sizes) if balance == "equal" else sizes, sizes)
    kept = [
        rows[_pick(values[rows], quota, method, generator)]
        for rows, quota in zip(groups, quotas, strict=True)
    ]
    return torch.cat(kept).sort().values if kept else valid


def keep_count(keep: float, total: int) -> int:
    """Return the number of samples that ``keep`` (see :func:`select`) means out of ``total``.

    Raises
    ------
    ValueError
        A fraction outside [0, 1] or a negative count.
    TypeError
        A bool, or no number.
    """
    wrong = f"keep must be a count (int) or a fraction (float in [0, 1]); got {keep!r}"
    if isinstance(keep, bool) or str(getattr(keep, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError(wrong)
    try:
        count = operator.index(keep)  # type: ignore[arg-type]  # floats raise, which is the question
    except TypeError:
        pass
    else:
        if count < 0:
            raise ValueError(wrong)
        return count
    try:
        fraction = float(keep)
    except (TypeError, ValueError):
        raise TypeError(wrong) from None
    if not 0.0 <= fraction <= 1.0 or isinstance(keep, str):
        raise (TypeError if isinstance(keep, str) else ValueError)(wrong)
    decimal = round(Fraction(repr(fraction)), _DECIMALS)
    return int(decimal * total + Fraction(1, 2))


def apportion(places: int, weights: Sequence[int], capacity: Sequence[int]) -> list[int]:
    """Share ``places`` by ``weights``, largest remainder, no share above its ``capacity``.

    What a full group cannot take is shared among the others by the same weights. Exact integer
    arithmetic; equal remainders go to the earlier group.

    Raises
    ------
    ValueError
        ``places`` exceeds the summed capacity of the groups with a weight.
    """
    shares = [0] * len(weights)
    open_groups = [g for g, weight in enumerate(weights) if weight > 0 and capacity[g] > 0]
    if places > sum(capacity[g] for g in open_groups):
        raise ValueError(f"{places} places exceed the capacity {sum(capacity)} of the groups")
    rest = places
    while rest:
        total = sum(weights[g] for g in open_groups)
        full = [g for g in open_groups if rest * weights[g] >= capacity[g] * total]
        if not full:
            break
        for g in full:
            shares[g] = capacity[g]
        rest -= sum(capacity[g] for g in full)
        open_groups = [g for g in open_groups if g not in set(full)]
    if rest:
        for g in open_groups:
            shares[g] = rest * weights[g] // total
        left = rest - sum(shares[g] for g in open_groups)
        by_remainder = sorted(open_groups, key=lambda g: -(rest * weights[g] % total))
        for g in by_remainder[:left]:
            shares[g] += 1
    return shares


def _check_scores(given: Any) -> Tensor:
    scores = as_tensor("scores", given)
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape (N,); got {tuple(scores.shape)}")
    if scores.is_complex() or scores.dtype == torch.bool:
        raise TypeError(f"scores must be real numbers; got {scores.dtype}")
    return scores.detach().cpu()


def _check_labels(labels: Any, count: int) -> Tensor:
    if labels is None:
        raise ValueError("balance needs labels, (N,) integer classes; got None")
    values = as_tensor("labels", labels)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {values.dtype}")
    if values.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), as scores; got {tuple(values.shape)}")
    return values.cpu()


def _labels_of_rows(labels: Any, index: Tensor) -> Any:
    """Labels in the order of a table's rows, taken from those of the whole data set if need be."""
    if labels is None:
        return None
    values, rows = as_tensor("labels", labels), index.numel()
    if values.dim() != 1 or not rows:
        return values
    highest = int(index.max())
    if values.shape[0] != rows:
        return values[index.to(values.device)] if values.shape[0] > highest else values
    if highest == rows - 1 and not torch.equal(index, torch.arange(rows, device="cpu")):
        warnings.warn(
            "labels are taken in the order of the table's rows, which is not that of the data set; "
            "give labels[table.index] if they were in the order of the data set",
            stacklevel=3,
        )
    return values


def _by_class(labels: Tensor, valid: Tensor) -> list[Tensor]:
    """Ascending rows of every class that has a scored sample, by ascending class."""
    classes = labels[valid]
    sizes = classes.unique(return_counts=True)[1]
    return list(valid[classes.argsort(stable=True)].split(sizes.tolist()))


def _pick(scores: Tensor, count: int, method: str, generator: torch.Generator) -> Tensor:
    """``count`` positions of ``scores``, which hold no NaN."""
    if method in ("top", "bottom"):
        return scores.argsort(stable=True, descending=method == "top")[:count]
    if method == "random":
        return torch.randperm(scores.shape[0], generator=generator, device="cpu")[:count]
    _, level, sizes = scores.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    rank = (last - (sizes - 1) / 2)[level]
    # Efraimidis and Spirakis: the smallest Exp(1) / weight are a weighted draw without replacement.
    waits = torch.empty(scores.shape[0], dtype=torch.float64, device="cpu").exponential_(
        generator=generator
    )
    return (waits / rank).argsort(stable=True)[:count]
