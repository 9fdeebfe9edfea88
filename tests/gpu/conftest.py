"""A process whose CUDA context is lost ends, where others go on with the tests behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Errors that stay with a process: every later call of it raises them again.
_LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember that a test has met such an error."""
    report = yield
    if call.excinfo is not None and any(text in str(call.excinfo.value) for text in _LOST):
        item.config.stash[_lost] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End after the test, whose report is out; pytest-xdist starts another process."""
    result = yield
    if item.config.stash.get(_lost, False) and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    return result


_lost = pytest.StashKey[bool]()
