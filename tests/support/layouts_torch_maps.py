"""Layouts of plain PyTorch: what lies behind the head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from layouts import Case, Layout
from layouts_torch_heads import MuReadout, hooked
from layouts_torch_networks import C, H, Zeros, adds_to, case, rows
from torch import Tensor, nn

LAYOUTS: list[Layout] = []
layout = adds_to(LAYOUTS)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.4))


def behind(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda model, z, h: function(z)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "final soft cap": lambda z: 2 * torch.tanh(z / 2),
    "soft cap of 30, which bends large logits only": lambda z: 30 * torch.tanh(z / 30),
    "constant logit scale": lambda z: z * 0.0625,
    "negative logit scale": lambda z: -z,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1),
    "softmax with a temperature": lambda z: (z / 1.7).softmax(-1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "log_softmax with a temperature": lambda z: (z / 1.7).log_softmax(-1),
    "tanh": torch.tanh,
    "clamp": lambda z: z.clamp(-1, 1.5),
    "clamp that no real logit reaches": lambda z: z.clamp(-50, 50),
    "ReLU": torch.relu,
    "a class masked by a large number": lambda z: z.masked_fill(torch.arange(C) == 2, -1e4),
    "a factor and an offset a class": lambda z: z * torch.tensor([1, 2, 0.5, 1.5]).to(z) + 0.25,
}
for _name, _function in MAPS.items():
    layout(f"behind the head: {_name}")(lambda f=_function: case(None, behind(f)))
layout("behind a zero head: final soft cap")(
    lambda: case(lambda: Zeros(H, C), behind(MAPS["final soft cap"]))
)
layout("behind a zero head: constant logit scale")(
    lambda: case(lambda: Zeros(H, C), behind(MAPS["constant logit scale"]))
)
layout("behind a weight_norm head: constant logit scale")(
    lambda: case(hooked(nn.utils.weight_norm), behind(MAPS["constant logit scale"]))
)
layout("behind a muP head without bias: final soft cap")(
    lambda: case(lambda: MuReadout(H, C, bias=False), behind(MAPS["final soft cap"]))
)


@layout("behind the head: learned temperature")
def _temperature() -> Case:
    return case(None, lambda m, z, h: z / m.t.log.exp(), modules={"t": Temperature})


def norm_behind(affine: bool) -> Case:
    def make() -> nn.Module:
        norm = nn.BatchNorm1d(C, affine=affine)
        norm.running_mean.copy_(torch.randn(C))
        norm.running_var.copy_(torch.rand(C) + 0.5)
        return norm

    return case(None, lambda m, z, h: m.norm(z), modules={"norm": make}, options={"head": "fc"})


@layout("behind the head: BatchNorm")
def _norm() -> Case:
    return norm_behind(True)


@layout("behind the head: BatchNorm without parameters")
def _norm_plain() -> Case:
    return norm_behind(False)


REFUSED_MAPS: dict[str, Callable[..., Tensor]] = {
    "LayerNorm": lambda m, z, h: F.layer_norm(z, (C,)),
    "logits of length 1": lambda m, z, h: F.normalize(z, dim=-1),
    "exp": lambda m, z, h: z.exp(),
    "a skip": lambda m, z, h: z + h[:, :C],
    "a temperature for each sample": lambda m, z, h: z * (1 + h[:, :1] ** 2),
    "a mask of -inf": lambda m, z, h: z.masked_fill(torch.arange(C) == 3, -math.inf),
    "logits beside those of the head": lambda m, z, h: torch.cat([z, h[:, :1]], 1),
    "some classes left out": lambda m, z, h: z[:, :-1],
}
for _name, _wrap in REFUSED_MAPS.items():
    layout(f"behind the head: {_name}", last="the model's logits are not the output of head 'fc'")(
        lambda f=_wrap: case(None, f, data=rows(C - 1))
    )


@layout("two heads averaged (distilled ViT)", last="something is added to it")
def _two_heads() -> Case:
    return case(
        None,
        lambda m, z, h: (z + m.second(h)) / 2,
        modules={"second": lambda: nn.Linear(H, C)},
    )


@layout("head used twice", last="was called more than once")
def _twice() -> Case:
    return case(None, lambda m, z, h: z + m.fc(h))


@layout("wrong head chosen", last="the model's logits are not the output of head 'body'")
def _wrong_head() -> Case:
    return case(options={"head": "body"})
