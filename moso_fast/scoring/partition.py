"""Splitting a data set into parts, each of which is scored against its own mean gradient."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch
from torch import Tensor

from ..util.array_like import as_tensor

__all__ = [
    "check_part_sizes",
    "describe_partition",
    "partition_digest",
    "partition_ids",
    "resolve_partition",
]


def partition_ids(num_samples: int, parts: int, seed: int = 0) -> Tensor:
    """Assign every sample to one of ``parts`` random parts whose sizes differ by at most one.

    The authors' code cuts the data set into contiguous ranges, which on a data set stored class by
    class leaves each part with a few classes only; here the order is shuffled first.

    Parameters
    ----------
    num_samples
        Number of samples, >= 0.
    parts
        Number of parts I, 1 <= I; with samples present, I <= ``num_samples``.
    seed
        Seed of the shuffle; the global random state is neither read nor changed.

    Returns
    -------
    Tensor
        (``num_samples``,) int64 ids in ``range(parts)``, on the CPU.

    Raises
    ------
    TypeError
        An argument is not an integer.
    ValueError
        ``parts`` < 1, more parts than samples, or a negative number of samples.
    """
    num_samples = _integer("num_samples", num_samples)
    parts = _integer("parts", parts)
    seed = _integer("seed", seed)
    if num_samples < 0:
        raise ValueError(f"num_samples must be >= 0, got {num_samples}")
    if parts < 1:
        raise ValueError(f"parts must be >= 1, got {parts}")
    if num_samples and parts > num_samples:
        raise ValueError(f"parts must be <= num_samples = {num_samples}, got {parts}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_samples, generator=generator, device="cpu")
    ids = torch.empty(num_samples, dtype=torch.int64, device="cpu")
    ids[order] = torch.arange(num_samples, device="cpu") % parts
    return ids


def resolve_partition(partition: Any, num_samples: int, seed: int = 0) -> Tensor | None:
    """Turn the ``partition`` argument of a scorer into (N,) int64 ids on the CPU, or None.

    Parameters
    ----------
    partition
        None (one part), an int I (see `partition_ids`), or (N,) integer ids of any values as a
        tensor, an array or a sequence.
    num_samples
        N, the number of samples.
    seed
        Seed for an int ``partition``.

    Raises
    ------
    TypeError
        Ids that are not integers.
    ValueError
        Wrong length, or a part with fewer than two samples.
    """
    if partition is None:
        return None
    if isinstance(partition, bool):
        raise TypeError("partition must be None, an int or (N,) integer ids, got a bool")
    if isinstance(partition, int):
        return check_part_sizes(partition_ids(num_samples, partition, seed))
    try:
        if isinstance(partition, (float, complex)):
            partition = torch.tensor(partition, device="cpu")
        ids = as_tensor("partition", partition).detach().cpu()
    except TypeError as error:
        reason = str(error).partition("; it holds ")[2]  # of an array that holds something else
        raise TypeError(
            "partition must be None, an int or (N,) integer ids, got "
            f"{type(partition).__name__}{reason and f' of {reason}'}"
        ) from error
    if ids.dim() == 0 and not ids.is_floating_point() and ids.dtype != torch.bool:
        return check_part_sizes(partition_ids(num_samples, int(ids), seed))
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"partition ids must be integers, got {ids.dtype}")
    if tuple(ids.shape) != (num_samples,):
        raise ValueError(
            f"partition must have one id per sample, shape ({num_samples},), got {tuple(ids.shape)}"
        )
    return check_part_sizes(ids.to(torch.int64).clone())


def check_part_sizes(ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return ``ids`` if every part has at least two counted samples.

    Parameters
    ----------
    ids
        (N,) int64 part ids.
    counted
        (N,) bool, False where a sample is ignored; None counts all.

    Raises
    ------
    ValueError
        A part has fewer than two counted samples; the message names the first such part.
    """
    parts, inverse = torch.unique(ids, return_inverse=True)
    weights = None if counted is None else counted.to(torch.float64)
    sizes = torch.bincount(inverse, weights=weights, minlength=len(parts))
    small = torch.nonzero(sizes < 2).flatten()
    if len(small):
        part, size = int(parts[small[0]]), int(sizes[small[0]])
        what = "samples" if counted is None else "samples that are not ignored"
        raise ValueError(
            f"partition: every part needs at least 2 {what} to be scored against its own mean, "
            f"part {part} has {size}"
        )
    return ids


def partition_digest(ids: Tensor | None) -> str:
    """Return a short name of a partition: equal ids give equal digests."""
    if ids is None:
        return "none"
    return hashlib.blake2b(ids.contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def describe_partition(ids: Tensor | None, given: Any, seed: int) -> str:
    """Return a partition in words: number of parts, where it is from, the digest of its ids.

    ``given`` is the argument that `resolve_partition` made ``ids`` of, with ``seed``.
    """
    if ids is None:
        return "one part"
    how = f"split by seed {seed}" if isinstance(given, int) else "given ids"
    return f"{len(torch.unique(ids))} parts, {how}, digest {partition_digest(ids)}"


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got a bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
