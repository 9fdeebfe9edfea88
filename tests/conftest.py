"""Fixtures and marks that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: the largest value).

    An output that is not written everywhere then fails without a test of its own. torch does this
    in its deterministic mode, inside the operator, so that nothing has to be patched under
    torch.compile or fake tensors. The mode also swaps some operators for deterministic versions:
    tests that compare runs bitwise ask for the operators that users get, with
    ``@pytest.mark.raw_memory``. MOSO_FAST_RAW_MEMORY=1 asks for all tests: to a tool that looks for
    reads of what nobody wrote, filling is writing.
    """
    asked = os.environ.get("MOSO_FAST_RAW_MEMORY") == "1"
    if asked or request.node.get_closest_marker("raw_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def generator() -> torch.Generator:
    """Return a freshly seeded random generator on the CPU."""
    return torch.Generator().manual_seed(20231210)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device; leave out models unless asked for."""
    if "models" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("models")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("models")]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
