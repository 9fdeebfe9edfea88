"""The emulator of the CUDA kernels, and a backend that runs them in it."""

from __future__ import annotations

import cuda_emulator
import pytest
from cuda_emulator import in_place_of_a_gpu


@pytest.fixture(scope="module")
def emulator():
    """The module that runs the kernels' source on the CPU; it needs a C++ compiler."""
    return cuda_emulator.build()


@pytest.fixture
def gpu(emulator, monkeypatch):
    """The backend that ``backend="cuda"`` means: the emulator, with nothing counted so far."""
    backend = in_place_of_a_gpu(emulator, monkeypatch)
    emulator.take_counts()
    yield backend
    emulator.set_options(False, False)
