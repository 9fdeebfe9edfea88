"""Layouts of plain PyTorch: labels and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layouts import NOT_TRIED, Case, Layout, one_by_one
from layouts_torch_maps import MAPS, behind
from layouts_torch_networks import C, D, H, N, adds_to, case, sentences
from torch import Tensor, nn

LAYOUTS: list[Layout] = []
layout = adds_to(LAYOUTS)

layout("one sample a batch")(lambda: case(loader=one_by_one))
layout("one sample a batch, soft cap")(
    lambda: case(None, behind(MAPS["final soft cap"]), loader=one_by_one)
)
layout("label smoothing")(
    lambda: case(
        options={"label_smoothing": 0.1},
        loss=lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    )
)


def soft_rows(classes: int = C) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(6)
    x, t = torch.randn(N, D, generator=g), torch.randn(N, classes, generator=g).softmax(-1)
    if classes == 1:
        t = torch.rand(N, 1, generator=g)
    return list(zip(x, t, strict=True))


def loss_case(loss: str, function: Callable, wrap: Any = None, classes: int = C) -> Case:
    def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        if loss == "cross_entropy":
            return function(outputs, y)
        return function(outputs.reshape(y.shape), y, reduction="sum")

    return case(
        lambda: nn.Linear(H, classes),
        wrap,
        data=soft_rows(classes),
        loss=own_loss,
        options={"loss": loss},
    )


BCE = F.binary_cross_entropy_with_logits
layout("label probabilities")(lambda: loss_case("cross_entropy", F.cross_entropy))
layout("label probabilities, log_softmax")(
    lambda: loss_case("cross_entropy", F.cross_entropy, behind(MAPS["log_softmax"]))
)
layout("binary targets")(lambda: loss_case("binary_cross_entropy", BCE))
layout("binary targets, soft cap")(
    lambda: loss_case("binary_cross_entropy", BCE, behind(MAPS["final soft cap"]))
)
layout("one binary logit")(lambda: loss_case("binary_cross_entropy", BCE, classes=1))
layout("one binary logit, squeezed", full="logits must have shape")(
    lambda: loss_case("binary_cross_entropy", BCE, behind(lambda z: z.squeeze(-1)), classes=1)
)
layout("one output, sigmoid, mean squared error")(
    lambda: loss_case("mse", F.mse_loss, behind(torch.sigmoid), classes=1)
)
layout("mean squared error")(lambda: loss_case("mse", F.mse_loss))
layout("mean squared error of log_softmax")(
    lambda: loss_case("mse", F.mse_loss, behind(MAPS["log_softmax"]))
)


class Tied(nn.Module):
    """A head that uses the matrix of the embedding; the reference detaches the other use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, H)
        self.fc = nn.Linear(H, 12, bias=False)
        self.fc.weight = self.embed.weight
        self.own_use = False

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.embed(ids).sum(1))
        return self.fc(h.detach() if self.own_use else h)


def tied(own_use: bool) -> Case:
    def own_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        model.own_use = own_use
        return F.cross_entropy(model(x), y)

    torch.manual_seed(3)
    return Case(Tied(), sentences(), loss=own_loss)


layout("head tied to the embedding, its own use", full=NOT_TRIED)(lambda: tied(True))
layout("head tied to the embedding", last=NOT_TRIED)(lambda: tied(False))
