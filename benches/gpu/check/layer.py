"""The stages' work by name: what a worker process imports before its first unit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch  # noqa: F401 (imported while nobody waits, as is the rest)

import moso_fast.functional  # noqa: F401
from moso_fast.backends import backends

backends()  # imports Triton and the native modules, without a look at the GPU's state

Emit = Callable[..., None]


def run(unit: Mapping[str, Any], emit: Emit) -> None:
    """Run one unit; raise whatever is wrong."""
    module = importlib.import_module(f"{__package__}.work.{unit['work']}")
    module.run(unit, emit)
