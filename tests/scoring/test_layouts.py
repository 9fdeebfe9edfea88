"""Layouts of plain PyTorch: each is scored as autograd of the model's own loss says, or refused."""

from __future__ import annotations

import pytest
from layouts import NOT_TRIED, Layout, check
from layouts_torch import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def of(gradient: str) -> list[Layout]:
    attribute = {"last_layer": "last", "full": "full"}[gradient]
    return [one for one in LAYOUTS if getattr(one, attribute) != NOT_TRIED]


@pytest.mark.quick(30)
@pytest.mark.parametrize("layout", of("last_layer"), ids=lambda one: one.name)
def test_last_layer(layout: Layout) -> None:
    check(layout, "last_layer")


@pytest.mark.quick(6)
@pytest.mark.parametrize("layout", of("full"), ids=lambda one: one.name)
def test_whole_network(layout: Layout) -> None:
    check(layout, "full")


def test_there_are_enough_of_them() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 60
