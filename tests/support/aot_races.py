"""Finds shared memory that a copy may overwrite while the tensor cores still read it.

From compute capability 9.0 on ``warp_group_dot`` reads its operands in shared memory while the
program goes on; Triton lets one of them be unfinished when the copies for a later turn of the loop
are started. With P copies asked for before the loop, turn i starts the one for turn i + P, into a
ring of B buffers: buffer (i + P) mod B must not be the one of turn i, so B is P + 1 at least. For
what goes to registers too, Triton (3.6 and 3.9) takes P.
"""

from __future__ import annotations

import re

_INDEX = re.compile(r"(%[\w#]+) = ttg\.memdesc_index (%\w+)\[[^\]]*\] : !ttg\.memdesc<(\d+)x")
_TRANSPOSED = re.compile(r"(%[\w#]+) = ttg\.memdesc_trans (%[\w#]+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local [^,]+, (%[\w#]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true")


def overwritten_operands(ttgir: str) -> list[str]:
    """Return the rings that are too short, "NAME: B buffers, P copies ahead" each."""
    ring: dict[str, tuple[str, int]] = {}
    for name, of, buffers in _INDEX.findall(ttgir):
        ring[name] = of, int(buffers)
    for name, of in _TRANSPOSED.findall(ttgir):
        if of in ring:
            ring[name] = ring[of]
    copies: dict[str, int] = {}
    for name in _COPY.findall(ttgir):
        if name in ring:
            copies[ring[name][0]] = copies.get(ring[name][0], 0) + 1
    read = {ring[name] for pair in _PRODUCT.findall(ttgir) for name in pair if name in ring}
    # One of a ring's copies is that of the loop itself.
    return [
        f"{of}: {buffers} buffers, {copies[of] - 1} copies ahead"
        for of, buffers in sorted(read)
        if copies.get(of, 0) > 1 and buffers < copies[of]
    ]
