"""The network, the samples and the decorator that the layouts of plain PyTorch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layouts import Case, Layout
from torch import Tensor, nn

N, D, H, C = 14, 6, 9, 4
SUM = {"per": "sample"}  # the sum over the tokens or pixels of a sample


def adds_to(layouts: list[Layout]) -> Callable:
    """Return a decorator, for functions that build a case, which adds a layout to the list."""

    def layout(
        name: str, *, last: str | None = None, full: str | None = None, **more: Any
    ) -> Callable:
        def add(build: Callable[[], Case]) -> Callable[[], Case]:
            layouts.append(Layout(name, build, last, full, **more))
            return build

        return add

    return layout


def rows(classes: int = C, seed: int = 1) -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, D, generator=g), torch.randint(classes, (N,), generator=g)
    return list(zip(x, y.tolist(), strict=True))


def sentences(labels: str = "class") -> list[tuple[Tensor, Any]]:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 12, (N, 7), generator=g)
    length = torch.randint(2, 8, (N, 1), generator=g)
    ids = torch.where(torch.arange(7) < length, ids, 0)
    if labels == "left":
        ids = ids.flip(1)
    if labels == "token":
        y = torch.where(ids > 0, torch.randint(C, (N, 7), generator=g), -100)
        return list(zip(ids, y, strict=True))
    return list(zip(ids, torch.randint(C, (N,), generator=g).tolist(), strict=True))


class Net(nn.Module):
    """A body, a head, and something behind it."""

    def __init__(
        self,
        head: nn.Module | None = None,
        behind: Callable[..., Any] | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = nn.Linear(D, H)
        self.fc = nn.Linear(H, C) if head is None else head
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        z = self.fc(h)
        return z if self.behind is None else self.behind(self, z, h)


def case(head: nn.Module | None = None, behind: Any = None, **more: Any) -> Case:
    torch.manual_seed(3)
    modules = more.pop("modules", {})
    head = head() if head is not None and not isinstance(head, nn.Module) else head
    model = Net(head, behind, **{name: make() for name, make in modules.items()})
    for value in model.fc.parameters():  # logits of some size, so that maps bend them
        value.data.mul_(3)
    return Case(model, more.pop("data", None) or rows(), **more)


class Zeros(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
