"""Fixtures and marks that every test shares."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

# Thousands of collected tests stay alive to the end: to look through them for garbage at Python's
# own pace takes an eighth of the time.
gc.set_threshold(100_000, 50, 50)


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


# Tiers that run alone, when they are asked for.
_APART = ("models", "generated")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; leave out tiers that nobody has asked for.

    Plain ``pytest`` is quick: of a test with many parameter sets it runs as many as it takes to see
    every value of every parameter once, and none that is marked exhaustive. ``-m exhaustive`` runs
    those and all other sets, ``-m models`` the layouts of other libraries, ``-m generated`` looks
    whether generated files are current. A test that is named ("file.py::test") always runs.
    """
    _mark_other_sets(items)
    if not config.option.markexpr:
        asked = [argument for argument in config.args if "::" in argument]
        _leave_out(config, items, ("exhaustive", *_APART), asked)
    else:
        _leave_out(config, items, [t for t in _APART if t not in config.option.markexpr], [])
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _mark_other_sets(items: list[pytest.Item]) -> None:
    """Mark the parameter sets of a test that hold no value which an earlier one has not.

    ``@pytest.mark.quick(n)``: those after the first n.
    """
    seen: dict[str, set[tuple[str, int]]] = {}
    taken: Counter[str] = Counter()
    for item in items:
        sets = getattr(item, "callspec", None)
        if sets is None or item.get_closest_marker("exhaustive"):
            continue
        test = item.nodeid.partition("[")[0]
        known, most = seen.setdefault(test, set()), item.get_closest_marker("quick")
        values = {(name, id(value)) for name, value in sets.params.items()}
        if values <= known or (most is not None and taken[test] >= most.args[0]):
            item.add_marker("exhaustive")
            continue
        known |= values
        taken[test] += 1


def _leave_out(
    config: pytest.Config, items: list[pytest.Item], tiers: Sequence[str], named: list[str]
) -> None:
    """Deselect the tests of some tiers, but for those that were named on the command line."""
    names = [argument.rpartition("/")[2] for argument in named]
    left_out = [
        item
        for item in items
        if any(item.get_closest_marker(tier) for tier in tiers)
        and not any(item.nodeid.rpartition("/")[2].startswith(name) for name in names)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]
