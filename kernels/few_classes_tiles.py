"""Tiles of the kernels for few classes, the choice among them, and how rows become slabs."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .operands import MOST_ROWS
from .tiles import Tile

# Slabs come in multiples of two for every multiprocessor of an H100 or H200. A constant: the
# result does not depend on the GPU.
_SLABS = 264


class Choice(NamedTuple):
    """A tile and what it is for: ``products`` of the operands, rows ``aligned`` to 16 bytes.

    ``prefetch`` and ``reload``: see the kernel. ``since``: the oldest Triton with which it keeps
    to its figures; older ones spill registers.
    """

    products: str  # "bf16", "tf32" or "tf32x3"
    aligned: bool
    prefetch: bool
    reload: bool
    tile: Tile
    since: tuple[int, int] = (3, 6)


_NEWER = (3, 9)

# By the compiler's figures, most of them not timed: none spills on sm_80, sm_90 and sm_100 with any
# Triton from ``since`` on, whose figures they bound. The weights and the gradient of a tile stay in
# registers, which bounds classes x D.
FIRST_TILES = (
    Choice("bf16", True, True, False, Tile(16, 16, 512, 8, 1, 240, 40_960, "HMMA")),
    Choice("bf16", True, True, True, Tile(16, 32, 512, 8, 1, 255, 65_536, "HMMA"), _NEWER),
    Choice("bf16", False, False, False, Tile(16, 16, 512, 8, 1, 255, 40_960, "HMMA")),
    Choice("tf32x3", True, True, True, Tile(16, 16, 512, 8, 1, 244, 131_072, "HMMA"), _NEWER),
    Choice("tf32x3", True, True, True, Tile(16, 32, 256, 8, 1, 244, 98_304, "HMMA")),
    Choice("tf32x3", False, False, True, Tile(16, 16, 512, 8, 1, 255, 131_072, "HMMA")),
    Choice("tf32", True, False, False, Tile(16, 32, 512, 8, 1, 255, 98_816, "HMMA"), _NEWER),
    Choice("tf32", True, False, False, Tile(16, 16, 1024, 8, 1, 255, 132_096, "HMMA"), _NEWER),
    Choice("tf32", False, False, False, Tile(16, 16, 512, 8, 1, 232, 66_560, "HMMA"), _NEWER),
)

SECOND_TILES = (
    Choice("bf16", True, False, False, Tile(128, 16, 128, 4, 3, 216, 143_360, "HGMMA")),
    Choice("bf16", True, False, False, Tile(64, 32, 64, 4, 3, 184, 69_632, "HGMMA")),
    Choice("bf16", False, False, False, Tile(64, 16, 64, 4, 3, 255, 40_960, "HGMMA")),
    Choice("tf32x3", True, False, False, Tile(64, 16, 64, 4, 3, 216, 61_440, "HGMMA")),
    Choice("tf32x3", True, False, False, Tile(64, 32, 32, 8, 3, 184, 45_056, "HGMMA"), _NEWER),
    Choice("tf32x3", False, False, False, Tile(64, 16, 32, 4, 3, 200, 32_768, "HGMMA")),
    Choice("tf32", True, False, False, Tile(64, 32, 32, 8, 3, 160, 53_248, "HGMMA")),
    Choice("tf32", False, False, False, Tile(64, 16, 32, 4, 3, 152, 40_960, "HGMMA")),
)


def choose_first_tile(
    classes: int,
    heads: int,
    dim: int,
    products: str,
    aligned: bool = True,
    shared_bytes: int = 232_448,
    version: tuple[int, ...] = _NEWER,
) -> Choice | None:
    """Return the tile of the first pass, or None where no shipped tile holds C and D.

    Of the tiles for these products that hold a row of features, a row of logits, and fit
    ``shared_bytes`` a block (what the GPU offers; 227 KiB on compute capability 9.0) with a
    Triton of this ``version``, the one that takes all heads in the fewest groups; then the
    narrowest, then the smallest.
    """
    fitting = [
        c
        for c in FIRST_TILES
        if (c.products, c.aligned) == (products, aligned)
        and classes <= c.tile.classes
        and dim <= c.tile.dim
        and c.tile.shared_bytes <= shared_bytes
        and version >= c.since
    ]
    return min(
        fitting,
        key=lambda c: (groups_of(classes, heads, c.tile)[2], c.tile.dim, c.tile.classes),
        default=None,
    )


def choose_second_tile(
    classes: int,
    heads: int,
    products: str,
    aligned: bool = True,
    shared_bytes: int = 232_448,
    version: tuple[int, ...] = _NEWER,
) -> Choice | None:
    """Return the tile of the second pass, or None where no shipped tile holds C classes.

    Of the tiles for these products that hold a row of logits and fit ``shared_bytes`` a block
    with a Triton of this ``version``, the one that takes all heads in the fewest groups; then the
    narrowest.
    """
    fitting = [
        c
        for c in SECOND_TILES
        if (c.products, c.aligned) == (products, aligned)
        and classes <= c.tile.classes
        and c.tile.shared_bytes <= shared_bytes
        and version >= c.since
    ]
    return min(
        fitting,
        key=lambda c: (groups_of(classes, heads, c.tile)[2], c.tile.classes),
        default=None,
    )


def slab_rows(rows: int, step: int, precision: str) -> int:
    """Rows of a slab: a multiple of ``step``, so many that rounding and balance allow it."""
    slabs = _SLABS * max(1, triton.cdiv(rows, _SLABS * MOST_ROWS[precision]))
    return step * max(1, triton.cdiv(rows, slabs * step))


def groups_of(classes: int, heads: int, tile: Tile) -> tuple[int, int, int]:
    """Heads side by side in a tile, lanes of each, and groups of heads."""
    if heads == 1:
        return 1, tile.classes, 1
    together = tile.classes // triton.next_power_of_2(classes)
    together = min(together, triton.next_power_of_2(heads))
    return together, tile.classes // together, triton.cdiv(heads, together)
