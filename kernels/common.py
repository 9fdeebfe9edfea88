"""Pieces that several Triton kernels share: accurate scalar functions and the status word.

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
def note_first_row(status, SLOT: tl.constexpr, bad, row):
    """Lower ``status[SLOT]`` to the smallest ``row`` (int64) marked ``bad``.

    The minimum does not depend on the order of the programs, so the outcome is deterministic;
    programs without a bad row touch no memory.
    """
    first = tl.min(tl.where(bad, row, _NO_ROW), axis=0)
    tl.atomic_min(status + SLOT, first, mask=first != _NO_ROW, sem="relaxed")
