"""Sums of results and of gradients, and the self-check that is made of them.

On a CPU they have the same bits for any number of threads, and small ones wake no thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .passes import Results
    from .problem import Problem

__all__ = ["result_sums", "self_check", "sqnorm", "thread_blocks"]

# Relative to |G| * sum_i |g_i|, the scale of the rounding in sum_i a_i = N |G|^2.
_SELF_CHECK_TOLERANCE = {"float64": 1e-10, "highest": 1e-4, "high": 2e-3, "medium": 2e-2}

# Numbers that one sum takes, fewer than PyTorch ever splits among threads.
_SUM_BLOCK = 4096
# Squares that are made at a time before they are summed; a multiple of that.
_SQUARES = 64 * _SUM_BLOCK

# Numbers that PyTorch's elementwise operations leave to one thread.
_ONE_THREAD = 2**15 - 1

# Numbers that a GPU gets temporaries for at a time; fewer would not keep it busy.
_GPU_ELEMENTS = 2**22


def result_sums(results: Results, counted: Tensor | None) -> list[Tensor]:
    """Return what the self-check compares: 3 K numbers, float64, on the device of the results.

    |G|^2 of every head, then sum_i a_i of every head, then sum_i |g_i|; over the samples that
    ``counted`` is true for or, where it is None, over all.
    """
    # Half on a CPU: what is done with both is twice as many numbers.
    most = _ONE_THREAD // 2 if results.alignment.device.type == "cpu" else _GPU_ELEMENTS
    columns = column_blocks(
        most, results.alignment, results.grad_sqnorm, *([] if counted is None else [counted])
    )
    return [results.mean_grad_sqnorm, reduce(torch.add, (_pair_sums(*block) for block in columns))]


def _pair_sums(alignment: Tensor, grad_sqnorm: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return sum_i a_i and sum_i |g_i| of every head: (2, K) float64."""
    # Both at once, and float64 as they are written: few operations, and no copies of their own.
    pair = torch.empty(2, *alignment.shape, dtype=torch.float64, device=alignment.device)
    values, norms = pair.unbind()
    values.copy_(alignment)
    torch.sqrt(grad_sqnorm, out=norms)
    if counted is not None:  # what does not count may hold anything, NaN too
        pair.masked_fill_(~counted, 0.0)
    return pair.sum(2)


def self_check(
    problem: Problem,
    results: Results,
    counted: Tensor | None,
    count: int,
    sums: Sequence[float],
) -> None:
    """Raise RuntimeError unless sum_i a_i = N |G|^2 to the precision of the job.

    ``sums`` is what :func:`result_sums` holds of these results and ``counted``. Each of the
    ``count`` samples that count must have a finite alignment and norm.
    """
    heads = len(sums) // 3
    by_head = [sums[head::heads] for head in range(heads)]
    # Finite sums say that every term is.
    if not all(math.isfinite(found + norms) for _, found, norms in by_head):
        _check_finite(results, counted, count)
    key = "float64" if problem.compute_dtype == torch.float64 else problem.precision
    for head, (mean_grad_sqnorm, found, norms) in enumerate(by_head):
        wanted = mean_grad_sqnorm * count
        bound = _SELF_CHECK_TOLERANCE[key] * math.sqrt(mean_grad_sqnorm) * norms + 1e-30
        if not abs(found - wanted) <= bound:
            raise RuntimeError(
                f"self-check failed for head {head}: the alignments sum to {found:.9g} but N |G|^2 "
                f"is {wanted:.9g} (allowed difference {bound:.3g}); please report this with the "
                "output of moso-fast doctor"
            )


def _check_finite(results: Results, counted: Tensor | None, count: int) -> None:
    """Raise RuntimeError unless all samples that count have a finite result."""
    missing = ~torch.isfinite(results.alignment + results.grad_sqnorm)
    if counted is not None:
        missing &= counted
    for head, samples in enumerate(missing.sum(1).tolist()):
        if samples:
            raise RuntimeError(
                f"self-check failed for head {head}: {samples} of the {count} samples that count "
                "have no finite result; please report this with the output of moso-fast doctor"
            )


def thread_blocks(values: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Columns at a time of (K, samples) ``values`` and of ``others``, as :func:`column_blocks`.

    All on a GPU, on a CPU one thread's share: PyTorch shares out larger operations, and for one
    addition a number waking the threads costs more than the work, on a busy machine many times
    more.
    """
    most = _ONE_THREAD if values.device.type == "cpu" else values.numel()
    return column_blocks(most, values, *others)


def column_blocks(most: int, values: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Columns at a time of (K, samples) ``values`` and of ``others``, at least once.

    ``others`` are (K, samples) or (samples,). A block has at most ``most`` numbers of ``values``,
    or one column; the tensors themselves where they have no more.
    """
    heads, samples = values.shape
    if heads * samples <= most:
        yield values, *others
        return
    step = max(1, most // heads)
    for start in range(0, samples, step):
        yield tuple(tensor[..., start : start + step] for tensor in (values, *others))


def sqnorm(values: Tensor) -> Tensor:
    """Sum of squares of every row of (K, M): (K,), the same bits for any number of threads.

    PyTorch splits one long sum among its threads on a CPU; sums of a block each it leaves whole.
    On a GPU the order depends on the shape alone, and every launch counts; float64 in any case.
    """
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
    if values.numel() <= _ONE_THREAD:
        return values.square().sum(1)
    # Piece by piece: the squares of large heads are not worth a tensor of their own.
    pieces = range(0, values.shape[1], _SQUARES)
    sums = torch.cat([_block_sums(values[:, at : at + _SQUARES].square()) for at in pieces], 1)
    while sums.shape[1] > 1:
        sums = _block_sums(sums)
    return sums[:, 0]


def _block_sums(values: Tensor) -> Tensor:
    """Return sums of blocks of (K, M), the last one shorter: (K, blocks)."""
    count = values.shape[1]
    whole = count - count % _SUM_BLOCK
    rest = values[:, whole:].sum(1, keepdim=True)
    if not whole:
        return rest
    blocks = values[:, :whole].unflatten(1, (-1, _SUM_BLOCK)).sum(2)
    return torch.cat([blocks, rest], 1) if whole < count else blocks
