"""How many tensors of rows x classes a job of the Triton backend has in memory at a time."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from core_support import Case, assert_close, random_case, score_with
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIME_VARIABLE
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import engine
from moso_fast.core.problem import build_problem

ROWS, CLASSES = 97, 16


class LiveLogits(TorchDispatchMode):
    """Bytes of tensors with rows and classes among their axes that operators made and that live."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and {ROWS, CLASSES} <= set(value.shape):
                self._note(value)
        return result

    def _note(self, value: Tensor) -> None:
        gc.collect()  # the interpreter leaves cycles behind that hold the arguments of a launch
        storage = value.untyped_storage()
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._live.values()))


def peak(case: Case, chunk_size: int | None) -> float:
    """Most bytes of tensors of rows x classes at a time, in units of the logits in float32."""
    problem, backend = build_problem(*case.args, **case.options), TritonBackend()
    assert backend.supports(problem) is None
    with LiveLogits() as live:
        engine.run(problem, backend, chunk_size)
    return live.most / (4 * ROWS * CLASSES)


# Fewer and more than classes: both orders of a product.
@pytest.mark.parametrize(("dim", "dtype"), [(4, torch.bfloat16), (24, torch.float32)])
@pytest.mark.parametrize(
    ("regime", "chunk_size", "rounded", "wide"),  # with bfloat16 products, with float32 ones
    [
        ("row_tiles", None, 0.5, 1.0),  # the residuals
        ("row_tiles", ROWS, 0.5, 1.0),
        ("few_classes", None, 1.0, 1.0),
        ("few_classes", ROWS, 0.0, 0.0),
        ("stored", None, 1.5, 1.0),  # logits, and rounded residuals beside them
        ("stored", ROWS, 1.5, 1.0),
        ("recompute", ROWS, 1.0, 1.0),  # the logits of the first pass
        ("blas", None, 1.5, 2.0),  # of float32 ones the second pass makes another product
        ("blas", ROWS, 1.5, 2.0),
    ],
)
def test_no_second_tensor_of_rows_by_classes(
    regime: str,
    chunk_size: int | None,
    rounded: float,
    wide: float,
    dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(REGIME_VARIABLE, regime)
    case = random_case("ids", n=ROWS, c=CLASSES, d=dim, dtype=dtype)
    assert peak(case, chunk_size) == (rounded if dtype == torch.bfloat16 else wide)


@pytest.mark.parametrize("dim", [4, 24])
def test_lost_self_terms_are_summed_by_blocks(dim: int, monkeypatch) -> None:
    monkeypatch.setenv(REGIME_VARIABLE, "blas")
    # A loss whose residuals stay in float32: rounded ones bring the sums with them.
    case = random_case("mse", n=ROWS, c=CLASSES, d=dim, dtype=torch.bfloat16)
    result = score_with("triton", case)
    monkeypatch.setattr(triton_blas, "BLOCK_ELEMENTS", 7 * CLASSES)
    # Targets, residuals, and the operand of a product: bfloat16, which a CPU widens once more.
    assert peak(case, None) <= 3.5
    assert_close(score_with("triton", case).alignment, result.alignment, 1e-6)
