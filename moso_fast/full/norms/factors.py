"""Gradients of matrix-shaped parameters as sums of outer products, one sum a sample.

The gradient of sample i is sum_t rows[i, t] (outer) cols[i, t]. Its squared norm comes from the
cheaper of two exact forms: the two Gram matrices (T x T, "ghost"), or the gradient itself, built
for a few samples at a time. Both are bounded in memory however large the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Building one gradient entry and reading it again costs about as much as this many operations of
# a matrix product: the ratio of arithmetic to memory speed of current CPUs and GPUs.
_OPERATIONS_PER_ENTRY = 150

# Bytes of gradients or Gram matrices at a time: they should stay in the cache of a CPU.
_CPU_BYTES, _GPU_BYTES = 1 << 22, 1 << 28


@dataclass
class Factors:
    """One use of a (G blocks of) R x C parameter by n samples.

    ``rows`` (n, G, T, R) and ``cols`` (n, G, T, C); where ``rows`` holds integers (n, T), they are
    row numbers: the row factor is one-hot (an embedding), and G = 1.
    """

    rows: Tensor
    cols: Tensor

    @property
    def indexed(self) -> bool:
        """Whether ``rows`` holds row numbers."""
        return not self.rows.is_floating_point()

    @property
    def positions(self) -> int:
        """T."""
        return self.cols.shape[2]

    def part(self, samples: slice) -> Factors:
        """Those of some samples."""
        return Factors(self.rows[samples], self.cols[samples])


def squared_norms(uses: Sequence[Factors], height: int) -> tuple[Tensor, Tensor | None]:
    """|sum over uses of the gradient|^2 of every sample.

    Parameters
    ----------
    uses
        All uses of one parameter in the forward pass.
    height
        R, rows of the parameter (of one block).

    Returns
    -------
    tuple
        (n,) squared norms in float64, and where the gradients were built anyway their sum over
        the samples (G, R, C), else None.
    """
    uses = _joined(uses)
    first = uses[0]
    samples, blocks, _, width = first.cols.shape
    positions = sum(use.positions for use in uses)
    if positions == 1 and not first.indexed:
        row_norms = first.rows.square().sum(-1)[..., 0]
        return (row_norms * first.cols.square().sum(-1)[..., 0]).double().sum(1), None
    norms = torch.empty(samples, dtype=torch.float64, device=first.cols.device)
    limit = _CPU_BYTES if norms.device.type == "cpu" else _GPU_BYTES
    if ghost_is_cheaper(positions, 1 if first.indexed else height, width, height):
        size = 3 * blocks * positions**2 * first.cols.element_size()
        for some in _slices(samples, size, limit):
            norms[some] = _ghost([use.part(some) for use in uses])
        return norms, None
    total = first.cols.new_zeros(blocks, height, width)
    size = blocks * height * width * first.cols.element_size()
    for some in _slices(samples, size, limit):
        gradients = sum(_gradients(use.part(some), height) for use in uses)
        assert isinstance(gradients, Tensor)
        flat = gradients.flatten(1)
        norms[some] = torch.linalg.vecdot(flat, flat).double()
        total += gradients.sum(0)
    return norms, total


def ghost_is_cheaper(positions: int, rows: int, cols: int, height: int) -> bool:
    """Tell whether T x T Gram matrices of factors of these widths cost less than the gradient."""
    ghost = positions**2 * (rows + cols)
    return ghost <= height * cols * (positions + _OPERATIONS_PER_ENTRY)


def summed(use: Factors, height: int) -> Tensor:
    """Sum of the gradients over the samples: (G, R, C)."""
    width = use.cols.shape[-1]
    if use.indexed:
        result = use.cols.new_zeros(height, width)
        result.index_add_(0, use.rows.flatten(), use.cols.reshape(-1, width))
        return result[None]
    rows = use.rows.transpose(0, 1).reshape(use.rows.shape[1], -1, height)
    cols = use.cols.transpose(0, 1).reshape(use.cols.shape[1], -1, width)
    if len(rows) == 1:
        return (rows[0].t() @ cols[0])[None]
    return rows.transpose(1, 2) @ cols


def _joined(uses: Sequence[Factors]) -> list[Factors]:
    """Join uses of the same kind along T: the cross terms of a shared layer come by themselves."""
    joined = []
    for indexed in (False, True):
        same = [use for use in uses if use.indexed is indexed]
        if len(same) > 1:
            rows = torch.cat([use.rows for use in same], 1 if indexed else 2)
            joined.append(Factors(rows, torch.cat([use.cols for use in same], 2)))
        else:
            joined += same
    return joined


def _slices(samples: int, size: int, limit: int) -> Iterator[slice]:
    step = max(1, limit // max(size, 1))
    for start in range(0, samples, step):
        yield slice(start, start + step)


def _ghost(uses: Sequence[Factors]) -> Tensor:
    result = torch.zeros((), dtype=torch.float64, device=uses[0].cols.device)
    for number, one in enumerate(uses):
        result = result + _inner(one, one)
        for other in uses[number + 1 :]:
            result = result + 2 * _inner(one, other)
    return result


def _inner(one: Factors, other: Factors) -> Tensor:
    """<gradient, gradient'> of every sample, by Gram matrices over the positions."""
    gram = one.cols @ other.cols.transpose(-1, -2)
    if one.indexed and other.indexed:
        gram = gram * (one.rows[:, None, :, None] == other.rows[:, None, None, :])
    elif one.indexed:
        return _inner(other, one)
    elif other.indexed:
        index = other.rows[:, None, None, :].expand(gram.shape)
        gram = gram * one.rows.gather(3, index)
    else:
        gram = gram * (one.rows @ other.rows.transpose(-1, -2))
    return gram.flatten(1).sum(1).double()


def _gradients(use: Factors, height: int) -> Tensor:
    if not use.indexed:
        return use.rows.transpose(-1, -2) @ use.cols
    samples, _, _, width = use.cols.shape
    result = use.cols.new_zeros(samples, height, width)
    index = use.rows[..., None].expand(use.cols.shape[0], -1, width)
    return result.scatter_add_(1, index, use.cols[:, 0])[:, None]
