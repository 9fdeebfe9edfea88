"""The backend of plain PyTorch: rows of a chunk and of a partial sum, whatever the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_support import prepared
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.backends import get
from moso_fast.backends import torch as torch_backend
from moso_fast.core import memory
from moso_fast.core.engine import _allocate
from moso_fast.core.problem import build_problem


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "residual_budget", lambda device: 2**50)


def job(classes: int, dim: int, heads: int, dtype: torch.dtype, device: str) -> Any:
    with FakeTensorMode():
        features = torch.empty(4, dim, dtype=dtype, device=device)
        labels = torch.zeros(4, dtype=torch.long, device=device)
        weight = torch.empty(heads, classes, dim, device=device)
        return prepared("torch", build_problem(features, weight, labels))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_rows_of_a_chunk_by_what_a_row_takes(device) -> None:
    """Four numbers a class and head, and a copy of the features that are not in their dtype."""
    most, least, budget = (2**20, 64, 2**29) if device == "cuda" else (8192, 64, 2**24)
    for classes, dim, heads, dtype, a_row in (
        (10, 512, 1, torch.float32, 4 * 4 * 10),
        (1000, 512, 1, torch.float32, 4 * 4 * 1000),
        (1000, 512, 3, torch.float32, 4 * 4 * 3000),
        (1000, 512, 3, torch.float64, 8 * 4 * 3000),
        (1000, 512, 3, torch.bfloat16, 4 * 4 * 3000 + 4 * 512),
        (1000, 2**16, 1, torch.float16, 4 * 4 * 1000 + 4 * 2**16),
        (300_000, 8, 1, torch.float32, 4 * 4 * 300_000),
    ):
        expected = min(most, max(least, budget // a_row))
        assert job(classes, dim, heads, dtype, device).chunk_rows == expected, (classes, heads)


def test_rows_and_bytes_of_partial_sums_by_device() -> None:
    for device, rows, size in (("cpu", 2048, 0), ("cuda", 512, 2**28), ("meta", 2048, 0)):
        passes = job(10, 512, 1, torch.float32, device)
        assert (passes._slab_rows, passes._partial_bytes) == (rows, size)


def test_what_it_says_of_itself() -> None:
    backend = get("torch")
    found = backend.availability()
    assert (found.available, found.reason, found.how) == (True, f"PyTorch {torch.__version__}", "")
    assert (backend.name, backend.streams, backend.maps) == ("torch", True, True)
    passes = job(3, 4, 1, torch.float32, "cpu")
    assert backend.supports(passes.problem) is None
    assert backend.not_by_default(passes.problem) is None
    assert passes.describe() == "torch: chunked closed form"
    assert passes.explain(100) == ["torch: chunked closed form"]
    assert passes.whole("moso", 1.0, read=True) is None


def test_the_sum_of_gradients_goes_by_the_slabs_of_the_device(monkeypatch) -> None:
    """And residuals come back where they are kept or sequences ask for them."""
    asked: list[tuple[int, int]] = []
    total = torch_backend.gradient_sum

    def noted(residual: Any, features: Any, slab_rows: int, *, batch_bytes: int = 0) -> Any:
        asked.append((slab_rows, batch_bytes))
        return total(residual, features, slab_rows, batch_bytes=batch_bytes)

    monkeypatch.setattr(torch_backend, "gradient_sum", noted)
    monkeypatch.setattr(torch_backend, "_PARTIAL_BYTES", {"cpu": 1234})
    monkeypatch.setattr(torch_backend, "_SLAB_ROWS", {"cpu": 3})
    features, weight = torch.ones(6, 2), torch.zeros(4, 2)
    labels = torch.zeros(6, dtype=torch.long)
    for chunk_size, offsets, returned in (
        (None, None, True),
        (6, None, False),
        (6, torch.tensor([0, 2, 6]), True),
    ):
        problem = build_problem(features, weight, labels, cu_seqlens=offsets)
        passes = prepared("torch", problem, chunk_size)
        part = passes.first(slice(0, 6), _allocate(problem))
        assert (part.residual is not None) == returned == passes.returns_residual
        assert part.grad_sum.shape == (1, 4, 2) and part.bias_grad_sum.shape == (1, 4)
    assert asked == [(3, 1234)] * 3
