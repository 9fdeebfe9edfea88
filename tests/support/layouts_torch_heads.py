"""Layouts of plain PyTorch: what the head is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layouts import Case, Layout
from layouts_torch_networks import SUM, C, H, N, Net, Zeros, adds_to, case, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

LAYOUTS: list[Layout] = []
layout = adds_to(LAYOUTS)


@layout("nn.Linear")
def _linear() -> Case:
    return case()


@layout("nn.Linear without bias")
def _no_bias() -> Case:
    return case(lambda: nn.Linear(H, C, bias=False))


@layout("subclass of nn.Linear with its own start")
def _subclass() -> Case:
    return case(lambda: Zeros(H, C))


def hooked(wrap: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        head = nn.Linear(H, C)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrap(head) or head

    return make


@layout("weight_norm (hook)")
def _weight_norm() -> Case:
    found = case(hooked(nn.utils.weight_norm))
    return found


@layout("weight_norm (parametrization)")
def _weight_norm_new() -> Case:
    return case(hooked(parametrizations.weight_norm))


@layout("spectral_norm (hook)")
def _spectral_norm() -> Case:
    return case(hooked(nn.utils.spectral_norm))


@layout("spectral_norm (parametrization)")
def _spectral_norm_new() -> Case:
    return case(hooked(parametrizations.spectral_norm))


@layout("orthogonal weight (parametrization)")
def _orthogonal() -> Case:
    # Its buffer belongs to the weight that it was made for: scored as it is.
    return case(hooked(parametrizations.orthogonal), moved=False)


@layout("pruned weight (torch.nn.utils.prune)")
def _pruned() -> Case:
    return case(hooked(lambda head: prune.l1_unstructured(head, "weight", amount=0.5)))


class MuReadout(nn.Linear):
    """The read-out of muP: features are divided by a width multiplier."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x / 8, self.weight, self.bias)


@layout("muP read-out, features / 8")
def _mup() -> Case:
    return case(lambda: MuReadout(H, C))


@layout("muP read-out, features / 8, no bias")
def _mup_no_bias() -> Case:
    return case(lambda: MuReadout(H, C, bias=False))


class ScaledWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * math.sqrt(2 / self.in_features), self.bias)


@layout("weight scaled in forward (equalised learning rate)")
def _equalised() -> Case:
    return case(lambda: ScaledWeight(H, C))


class ScaledOutput(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@layout("learned factor inside the head")
def _scaled_output() -> Case:
    return case(lambda: ScaledOutput(H, C))


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


@layout("cosine head", last="it is no plain linear map")
def _cosine() -> Case:
    return case(lambda: Cosine(H, C, bias=False))


class Clipped(nn.Linear):
    """Features beyond a length are shortened, which few samples of a batch are."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True)
        return super().forward(x * (1.2 / length).clamp_max(1))


@layout("features clipped in the head, in some rows", last="it is no plain linear map")
def _clipped() -> Case:
    return case(lambda: Clipped(H, C))


class OwnLora(nn.Module):
    """An adapter of one's own around the output layer."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(H, C), nn.Linear(H, 2, bias=False)
        self.up = nn.Linear(2, C, bias=False)
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@layout("own adapter on the head", last="something is added to it")
def _own_lora() -> Case:
    return case(lambda: OwnLora(False))


@layout("own adapter on the head, still zero", last="something is added to it")
def _own_lora_zero() -> Case:
    return case(lambda: OwnLora(True))


class LoraLinear(nn.Linear):
    """LoRA as a subclass: the weight is frozen, two factors are trained."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


@layout("LoRA in a subclass of nn.Linear, still zero", last="are trained in its place")
def _lora_subclass() -> Case:
    return case(lambda: LoraLinear(H, C))


class Int8Linear(nn.Linear):
    """A head whose weight is stored in 8 bits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        stored = (self.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@layout("head quantised to 8 bits", last="no floating point (quantised)")
def _int8() -> Case:
    torch.manual_seed(3)
    return Case(Net(Int8Linear(H, C)), rows(), moved=False)


class Packed(nn.Module):
    """A quantised head that is no nn.Linear and has no parameters, as PyTorch's own are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(-9, 9, (C, H), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed.to(x.dtype) / 9).T


@layout("quantised head without parameters", last="the model's logits are not the output of head")
def _packed() -> Case:
    torch.manual_seed(3)
    return Case(Net(Packed()), rows(), moved=False)


class Image(nn.Module):
    """A convolutional network whose head is a 1 x 1 convolution."""

    def __init__(self, pool: str, classes: int = C) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, H, 3), pool
        self.head = nn.Conv2d(H, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        if self.pool == "before":
            return self.head(h.mean((2, 3), keepdim=True)).flatten(1)
        z = self.head(h)
        if self.pool == "relu":
            z = z.relu()
        return z if self.pool == "none" else z.mean((2, 3))


def pictures(side: int = 5, pixels: bool = False) -> list[tuple[Tensor, Any]]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(N, 1, side, side, generator=g)
    shape = (N, side - 2, side - 2) if pixels else (N,)
    y = torch.randint(C, shape, generator=g)
    return list(zip(x, y if pixels else y.tolist(), strict=True))


def image_case(pool: str, pixels: bool = False, **more: Any) -> Case:
    torch.manual_seed(3)
    return Case(Image(pool), pictures(pixels=pixels), **more)


@layout("1 x 1 convolution as head, pooled before it")
def _conv_before() -> Case:
    return image_case("before")


@layout("1 x 1 convolution as head, mean over positions behind it")
def _conv_mean() -> Case:
    return image_case("mean")


@layout("1 x 1 convolution, ReLU and mean behind it", last="the model's logits are not the output")
def _conv_relu() -> Case:
    return image_case("relu")


def pixel_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


@layout("a label for every pixel", full="logits must have shape")
def _pixels() -> Case:
    return image_case("none", pixels=True, loss=pixel_loss, options=SUM)


@layout("3 x 3 convolution as head", last="must be an nn.Linear")
def _conv3() -> Case:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, C, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Case(model, pictures(), options={"head": "0"})
