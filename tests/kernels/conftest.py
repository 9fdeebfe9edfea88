"""The machine that the tests of the Triton backend pretend to run on."""

from __future__ import annotations

import pytest
import torch

from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.triton import backend as triton_backend
from moso_fast.backends.triton import products as triton_products
from moso_fast.backends.triton.regime import Limits
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.backends.triton.regimes import recompute as triton_recompute
from moso_fast.backends.triton.regimes import row_tiles as triton_row_tiles


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set what the backend finds: version (None: not installed), CUDA device, ROCm, interpreter."""

    def set_up(
        version: str | None = "3.9.0",
        *,
        cuda: bool = True,
        hip: str | None = None,
        interpret: bool = False,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        monkeypatch.setattr(triton_backend, "_installed", lambda: version is not None)
        monkeypatch.setattr(triton_backend, "_version", lambda: version)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        limits = Limits(227 * 1024, capability)
        for module in (
            triton_few_classes,
            triton_products,
            triton_recompute,
            triton_row_tiles,
        ):
            monkeypatch.setattr(module, "limits_of", lambda device: limits)
        monkeypatch.setattr(cuda_device, "shared_limit", lambda device: limits.shared_bytes)
        monkeypatch.setattr(cuda_device, "index", lambda device: 0)
        monkeypatch.setattr(cuda_device, "capability", lambda index: capability)
        if interpret:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        else:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return set_up
