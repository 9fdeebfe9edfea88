"""Layouts of plain PyTorch: tokens, and the order of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layouts import Case, Layout, one_by_one
from layouts_torch_networks import SUM, C, D, H, N, Zeros, adds_to, sentences
from torch import Tensor, nn

LAYOUTS: list[Layout] = []
layout = adds_to(LAYOUTS)


class Tokens(nn.Module):
    """Tokens (B, T) of ids, 0 = padding; a head on every token, then ``pool``."""

    def __init__(self, pool: Callable[..., Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, H)
        self.mix = nn.Linear(H, H)
        self.score = nn.Linear(H, C, bias=False) if head is None else head
        self.pool = pool

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids).cumsum(1)))
        return self.pool(self.score(h), ids)


def token_case(pool: Callable[..., Tensor], labels: str = "class", **more: Any) -> Case:
    torch.manual_seed(3)
    return Case(Tokens(pool, more.pop("score", None)), sentences(labels), **more)


def last_token(z: Tensor, ids: Tensor) -> Tensor:
    at = torch.where(ids > 0, torch.arange(ids.shape[1]), -1).argmax(1)
    return z[torch.arange(len(z)), at]


layout("last token pooled behind the head")(lambda: token_case(last_token))
layout("last token pooled, padded on the left")(lambda: token_case(last_token, "left"))
layout("last token pooled, one sample a batch")(lambda: token_case(last_token, loader=one_by_one))
layout("last token pooled, head of zeros")(lambda: token_case(last_token, score=Zeros(H, C)))
layout("first token pooled behind the head")(lambda: token_case(lambda z, ids: z[:, 0]))
layout("mean over all tokens behind the head")(lambda: token_case(lambda z, ids: z.mean(1)))
layout(
    "mean over tokens that are no padding", last="the model's logits are not the output of head"
)(lambda: token_case(lambda z, ids: (z * (ids > 0)[..., None]).sum(1) / (ids > 0).sum(1)[:, None]))
layout("largest logit over tokens", last="the model's logits are not the output of head 'score'")(
    lambda: token_case(lambda z, ids: z.amax(1))
)


def token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).reshape(-1, C), y.flatten(), reduction="sum")


layout("a label for every token, their sum")(
    lambda: token_case(lambda z, ids: z, "token", loss=token_loss, options=SUM)
)
layout("a label for every token, their mean")(
    lambda: token_case(
        lambda z, ids: z,
        "token",
        loss=lambda m, x, y: F.cross_entropy(m(x).reshape(-1, C), y.flatten()),
        options={"per": "token"},
    )
)
layout("token logits with classes second", full="labels")(
    lambda: token_case(
        lambda z, ids: z.movedim(-1, 1),
        "token",
        loss=lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"),
        options=SUM,
    )
)


class Sorting(nn.Module):
    """Sorts a batch by length, as packed RNNs want it, and puts the logits back (or not)."""

    def __init__(self, back: bool, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.back = nn.Embedding(12, H), back
        self.fc = nn.Linear(H, C) if head is None else head

    def forward(self, ids: Tensor) -> Tensor:
        order = (ids > 0).sum(1).argsort(descending=True, stable=True)
        z = self.fc(torch.tanh(self.embed(ids[order]).sum(1)))
        return z[order.argsort()] if self.back else z


def sorting(head: Callable[[], nn.Module] | None = None, **more: Any) -> Case:
    torch.manual_seed(3)
    return Case(Sorting(True, None if head is None else head()), sentences(), **more)


layout("sorted by length and put back")(sorting)
layout("sorted by length and put back, head of zeros")(lambda: sorting(lambda: Zeros(H, C)))


class Choices(nn.Module):
    """Multiple choice: C inputs a sample, each with one score."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(D, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.classifier(torch.tanh(self.body(x.flatten(0, 1))))
        return z.view(len(x), -1)


@layout("multiple choice", last="made of several rows")
def _choices() -> Case:
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, C, D, generator=g), torch.randint(C, (N,), generator=g)
    return Case(Choices(), list(zip(x, y.tolist(), strict=True)))


class View(nn.Module):
    """All tokens in one batch dimension before the head, put apart behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(12, H), nn.Linear(H, C)

    def forward(self, ids: Tensor) -> Tensor:
        z = self.fc(torch.tanh(self.embed(ids).cumsum(1)).flatten(0, 1))
        return z.view(*ids.shape, C)


@layout("tokens in one dimension before the head")
def _view() -> Case:
    torch.manual_seed(3)
    return Case(View(), sentences("token"), loss=token_loss, options=SUM)
