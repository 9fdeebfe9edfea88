"""Layouts of transformers, timm and peft against autograd of the model's own loss."""

from __future__ import annotations

import pytest
from layouts import NOT_TRIED, Layout, check
from layouts_models import LAYOUTS

pytestmark = pytest.mark.models


def of(attribute: str) -> list[Layout]:
    return [one for one in LAYOUTS if getattr(one, attribute) != NOT_TRIED]


@pytest.mark.parametrize("layout", of("last"), ids=lambda one: one.name)
def test_last_layer(layout: Layout) -> None:
    pytest.importorskip(layout.library)
    check(layout, "last_layer")


@pytest.mark.parametrize("layout", of("full"), ids=lambda one: one.name)
def test_whole_network(layout: Layout) -> None:
    pytest.importorskip(layout.library)
    check(layout, "full")
