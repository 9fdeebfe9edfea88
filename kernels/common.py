"""Pieces that several Triton kernels share: accurate scalar functions, what is finite, the status.

Everything here also runs in Triton's interpreter, which knows no libdevice: what libdevice
offers (log1p) is written in plain arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compares the globals of a kernel with what they were at every launch, and refuses one that
# is unequal to itself: a kernel writes float("nan") where it needs NaN.
INF = tl.constexpr(float("inf"))
_NO_ROW = tl.constexpr(2**63 - 1)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to a few ulp also where 1 + x rounds to 1 (Kahan's correction).

    The rounding of ``u = 1 + x`` is undone by the factor x / (u - 1), so only the *relative*
    error of tl.log counts, which is why the tests look for an accurate log in the PTX.
    """
    u = 1.0 + x
    rounded = u - 1.0
    tiny = rounded == 0.0
    return tl.where(tiny, x, tl.log(u) * (x / tl.where(tiny, 1.0, rounded)))


@triton.jit
def is_finite(x):
    """Elementwise: neither infinite nor NaN (a comparison with NaN is false)."""
    return tl.abs(x) < INF


@triton.jit
def note_first_row(report, SLOT: tl.constexpr, bad, row):
    """Lower ``status[SLOT]`` to the smallest ``row`` (int64) marked ``bad``, plus ``first_row``.

    ``report`` is a row_tuples.Report; nothing is done where its status is None. The minimum does
    not depend on the order of the programs, so the outcome is deterministic; programs without a
    bad row touch no memory.
    """
    if report.status is not None:
        first = tl.min(tl.where(bad, row + report.first_row, _NO_ROW), axis=0)
        tl.atomic_min(report.status + SLOT, first, mask=first != _NO_ROW, sem="relaxed")


@triton.jit
def finite_elements(at, exists, d, DIM: tl.constexpr):
    """1 where all DIM elements of a row are finite, else 0: int32 (rows,), read in one walk.

    ``at`` (rows, lanes) points to the first elements, numbered ``d`` (lanes,), of every row. A norm
    may overflow although a row is finite: kernels look here where one did.
    """
    sound = tl.full([at.shape[0]], 1, tl.int32)
    for start in range(0, DIM, at.shape[1]):
        inside = exists[:, None] & (start + d < DIM)[None, :]
        h = tl.load(at + start, mask=inside, other=0.0).to(tl.float32)
        sound = tl.minimum(sound, tl.min(is_finite(h).to(tl.int32), axis=1))
    return sound
