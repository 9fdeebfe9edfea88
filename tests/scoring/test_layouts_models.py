"""Layouts of transformers, timm and peft against autograd of the model's own loss."""

from __future__ import annotations

import importlib

import pytest
from layouts import NOT_TRIED, Layout, check
from layouts_models import LAYOUTS

pytestmark = pytest.mark.models


def need(library: str) -> None:
    """Skip where a library is missing, or where what it imports was built for another torch."""
    try:
        importlib.import_module(library)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # the latter: torchvision for CUDA beside a CPU torch
        pytest.skip(f"{library} cannot be imported here: {error}")


def of(attribute: str) -> list[Layout]:
    return [one for one in LAYOUTS if getattr(one, attribute) != NOT_TRIED]


@pytest.mark.parametrize("layout", of("last"), ids=lambda one: one.name)
def test_last_layer(layout: Layout) -> None:
    need(layout.library)
    check(layout, "last_layer")


@pytest.mark.parametrize("layout", of("full"), ids=lambda one: one.name)
def test_whole_network(layout: Layout) -> None:
    need(layout.library)
    check(layout, "full")
