"""Good arguments, and bad calls of which each has its one-line error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from core_support import random_case

NAN, INF = float("nan"), float("inf")
N, C, D = 6, 3, 4
PROBABILITIES = torch.full((N, C), 1 / 3)


@dataclass(frozen=True)
class Bad:
    """One bad call: what replaces the good arguments, and what must be said about it."""

    name: str
    error: type[Exception]
    message: str
    arguments: dict[str, Any] = field(default_factory=dict)


def good(**changes: Any) -> dict[str, Any]:
    case = random_case("ids", n=N, c=C, d=D)
    arguments = dict(zip(("features", "weight", "labels", "bias"), case.args, strict=True))
    return {**arguments, **changes}


def changed(name: str, at: tuple[int, ...], value: float, **changes: Any) -> dict[str, Any]:
    tensor = {**good(), **changes}[name].clone()
    tensor[at] = value
    return {**changes, name: tensor}


def table(*rows: tuple[str, type[Exception], str, dict[str, Any]]) -> Any:
    bad = [Bad(*row) for row in rows]
    return pytest.mark.parametrize("bad", bad, ids=[row.name for row in bad])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def assert_refused(bad: Bad, call: Any, **extra: Any) -> None:
    with pytest.raises(bad.error, match=f"^{re.escape(bad.message)}$") as caught:
        call(**good(**bad.arguments), **extra)
    assert type(caught.value) is bad.error
