"""Where the samples of a batch lie in an intermediate tensor, found by what depends on what.

A layer may see (B, D), (B, T, D), (T, B, D), (B * T, D) or (T * B, D). Which it is follows from
the gradient of single samples: that of sample i must vanish outside the entries of sample i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The samples lie along dimension ``dim``, alone, or with others inside or outside of them.

    ``kind`` is ``"alone"`` (size B), ``"outer"`` (B * m, sample by sample) or ``"inner"`` (m * B).
    """

    kind: str
    dim: int


def samples_first(
    layout: Layout | None, tensor: Tensor, lead: int, rows: int, samples: int
) -> Tensor:
    """Bring a tensor to (samples, T, ...): T gathers all other of the ``lead`` dimensions.

    ``rows`` is the size B of the batch: ``samples`` times the views of each. A batch of one row
    needs no layout.
    """
    if rows == 1 or layout is None:
        return tensor.reshape(samples, -1, *tensor.shape[lead:])
    if layout.kind != "alone":
        shape, size = list(tensor.shape), tensor.shape[layout.dim]
        pair = [rows, size // rows] if layout.kind == "outer" else [size // rows, rows]
        shape[layout.dim : layout.dim + 1] = pair
        tensor = tensor.reshape(shape)
        lead += 1
    at = layout.dim + 1 if layout.kind == "inner" else layout.dim
    return tensor.movedim(at, 0).reshape(samples, -1, *tensor.shape[lead:])


def candidates(shape: tuple[int, ...], rows: int) -> list[Layout]:
    """List the layouts that the leading dimensions ``shape`` of a tensor allow."""
    found = [Layout("alone", dim) for dim, size in enumerate(shape) if size == rows]
    for dim, size in enumerate(shape):
        if size > rows and size % rows == 0:
            found += [Layout("outer", dim), Layout("inner", dim)]
    return found


def fits(layout: Layout, shape: Sequence[int], rows: int) -> bool:
    """Tell whether a tensor of this shape can have this layout."""
    if layout.dim >= len(shape):
        return False
    size = shape[layout.dim]
    return size == rows if layout.kind == "alone" else size > 0 and size % rows == 0


def clear(left: list[Layout]) -> bool:
    """Tell whether the first of the layouts that are left can be taken.

    More than one is left where gradients vanish (a head of zeros). A dimension of just the size of
    the batch is the batch then, if there is only one; others may be right or wrong.
    """
    return len(left) == 1 or [layout.kind for layout in left].count("alone") == 1


def consistent(layout: Layout, gradient: Tensor, lead: int, rows: int, row: int) -> bool:
    """Tell whether the gradient of the loss of one row vanishes outside of that row."""
    apart = samples_first(layout, gradient, lead, rows, rows)
    outside = apart.ne(0).flatten(1).any(1)
    outside[row] = False
    return not bool(outside.any())
