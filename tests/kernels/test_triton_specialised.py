"""Kernels as Triton compiles them where a number is 1: it becomes a constant, in no interpreter.

One row, one item, a stride of 1: Triton makes such an argument part of the code, so that tensor
operations meet plain numbers. One tile of every kernel, every integer argument 1 at once.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import aot
import aot_few_classes
import aot_products
import aot_row_tiles

# Multiples of a tile's rows: never 1.
_LARGE = ("slab_rows",)


def specialised(case: Any) -> Any:
    """Return the case with the constant 1 for every integer that may be 1."""
    ones = [n for n, kind in case.types.items() if kind in ("i32", "i64") and n not in _LARGE]
    return dataclasses.replace(
        case,
        types={name: kind for name, kind in case.types.items() if name not in ones},
        constants={**case.constants, **dict.fromkeys(ones, 1)},
        divisible=tuple(name for name in case.divisible if name not in ones),
    )


def sample() -> dict[str, Any]:
    """First case of every kernel; of the residual kernels in all variants, others narrow too.

    Row dots with a shift, and with columns to add.
    """
    found: dict[str, Any] = {}
    for case in (
        *aot.residual_cases(),
        *aot_products.product_cases(),
        *aot_few_classes.cases(),
        *aot_row_tiles.row_tiles_cases(),
        *aot_row_tiles.column_cases(),
    ):
        kind = "narrow" if case.name.endswith("narrow") else case.constants.get("SOFT")
        kind = "extra" if "extra" in case.types else kind
        found.setdefault(f"{case.kernel.__name__}-{kind}", case)
    return found


@pytest.mark.parametrize("name", sample())
def test_compiles_where_integers_are_one(name: str) -> None:
    case = specialised(sample()[name])
    assert "i32" not in case.types.values() or set(_LARGE) & set(case.types)
    assert case.compile(90).stack == 0
