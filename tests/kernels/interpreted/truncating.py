"""Matrix sums as tensor cores make them: cut off, where the interpreter rounds.

A tensor core adds the products of one step, eight numbers along K for tf32, to its float32 sum and
cuts the result off at 24 digits. Where rows are equal all cuts point the same way, and a long sum
loses digits that numpy's does not. What goes through such steps is read in the code that Triton
3.6 and 3.9 compile for sm_80, sm_90 and sm_100:

    tf32     the last 13 bits of both operands are ignored; the accumulator enters the first step
    tf32x3   x = big + small, big = x rounded to tf32: small big, big small and big big, one after
             the other in one sum that starts from 0; the accumulator is added behind them, rounded

so that a tf32x3 sum is cut off within a block of K alone, however long it is. Were the accumulator
to enter it (``carried``), 2048 equal rows would cost 1.6e-5: test_triton_aot_products.py looks
whether it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import TensorHandle, interpreter_builder

STEP = 8


def cut(sums: Any) -> Any:
    """Bring float64 ``sums`` to float32, toward zero."""
    near = sums.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(sums)
    return np.where(beyond, np.nextafter(near, np.float32(0.0)), near)


def tf32(x: Any, *, rounded: bool) -> Any:
    """Clear the last 13 bits of float32 numbers, which are rounded, ties away from 0, or cut."""
    bits = np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000 if rounded else 0)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def chain(a: Any, b: Any, sums: Any) -> Any:
    """Add tf32 ``a`` (.., M, K) times ``b`` (.., K, N) to ``sums``, step by step."""
    a, b = (tf32(x, rounded=False).astype(np.float64) for x in (a, b))
    for k in range(0, a.shape[-1], STEP):
        sums = cut(a[..., k : k + STEP] @ b[..., k : k + STEP, :] + sums)
    return sums


def three_products(a: Any, b: Any, sums: Any, *, carried: bool = False) -> Any:
    """Add float32 ``a`` (.., M, K) times ``b`` (.., K, N) to ``sums`` as tf32x3."""
    big_a, big_b = tf32(a, rounded=True), tf32(b, rounded=True)
    part = chain(a - big_a, big_b, sums if carried else np.zeros_like(sums))
    part = chain(big_a, big_b, chain(big_a, b - big_b, part))
    return part if carried else part + sums


@contextmanager
def tensor_cores() -> Iterator[Counter[str]]:
    """Have tl.dot of the interpreter cut its sums off; yields how many there were of each kind."""
    given, seen = interpreter_builder.create_dot, Counter[str]()

    def dot(a: Any, b: Any, sums: Any, input_precision: Any, *rest: Any) -> Any:
        kind = input_precision.name
        seen[kind] += 1
        assert a.data.dtype == b.data.dtype == sums.data.dtype == np.float32
        if kind == "TF32x3":
            return TensorHandle(three_products(a.data, b.data, sums.data), sums.dtype.scalar)
        if kind == "TF32":
            return TensorHandle(chain(a.data, b.data, sums.data), sums.dtype.scalar)
        return given(a, b, sums, input_precision, *rest)

    interpreter_builder.create_dot = dot
    try:
        yield seen
    finally:
        interpreter_builder.create_dot = given
