"""Layouts of plain PyTorch: heads, what lies behind them, outputs, orders of rows, labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from layouts import NOT_TRIED, Case, Layout, one_by_one
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

N, D, H, C = 14, 6, 9, 4
LAYOUTS: list[Layout] = []


def layout(name: str, *, last: str | None = None, full: str | None = None, **more: Any) -> Callable:
    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        LAYOUTS.append(Layout(name, build, last, full, **more))
        return build

    return add


def rows(classes: int = C, seed: int = 1) -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, D, generator=g), torch.randint(classes, (N,), generator=g)
    return list(zip(x, y.tolist(), strict=True))


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


# --- heads -----------------------------------------------------------------------------------


@layout("nn.Linear")
def _linear() -> Case:
    return case()


@layout("nn.Linear without bias")
def _no_bias() -> Case:
    return case(lambda: nn.Linear(H, C, bias=False))


class Zeros(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


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


SUM = {"per": "sample"}  # the sum over the tokens or pixels of a sample


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


# --- behind the head ---------------------------------------------------------------------------


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


# --- what the model returns ----------------------------------------------------------------------


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


def returning(wrap: Callable[[Tensor, Tensor], Any], read: Callable[[Any], Tensor]) -> Case:
    def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(read(model(x)), y)

    def full_loss(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(read(outputs), labels, reduction="none")

    return case(None, lambda m, z, h: wrap(z, h), loss=own_loss, full_options={"loss": full_loss})


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict with logits": (lambda z, h: {"hidden": h, "logits": z}, lambda o: o["logits"]),
    "dict with another name": (lambda z, h: {"out": z}, lambda o: o["out"]),
    "object with logits": (lambda z, h: Output(h, z), lambda o: o.logits),
    "namespace": (lambda z, h: SimpleNamespace(pred=z), lambda o: o.pred),
    "(logits, features)": (lambda z, h: (z, h), lambda o: o[0]),
    "(features, logits)": (lambda z, h: (h, z), lambda o: o[1]),
    "nested": (lambda z, h: {"a": [h, {"b": z}]}, lambda o: o["a"][1]["b"]),
    "a copy": (lambda z, h: z.clone(), lambda o: o),
    "float64": (lambda z, h: z.double(), lambda o: o),
    "(soft-capped logits,)": (lambda z, h: (2 * torch.tanh(z / 2),), lambda o: o[0]),
}
for _name, (_wrap, _read) in OUTPUTS.items():
    layout(f"returns {_name}")(lambda w=_wrap, r=_read: returning(w, r))
layout("returns (probabilities, capped logits)", last="which of these are the logits cannot be")(
    lambda: returning(lambda z, h: (z.softmax(-1), 2 * torch.tanh(z / 2)), lambda o: o[1])
)
layout("returns no logits", last="the model returned a tensor (1, 9)")(
    lambda: Case(
        Net(None, lambda m, z, h: h),
        rows(),
        loss=lambda m, x, y: m(x)[:, 0].sum(),
        loader=one_by_one,
        full_options={"loss": _first},
    )
)


def _first(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs[:, 0]


@layout("logits divided in place")
def _in_place() -> Case:
    return case(None, lambda m, z, h: z.div_(3), full_options={})


class Overwritten(Net):
    """Writes to the head's input afterwards, as an activation with inplace=True on a skip does."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        z = self.fc(h)
        if not h.requires_grad:  # autograd would refuse it
            h.relu_()
        return z


@layout("features overwritten behind the head")
def _in_place_features() -> Case:
    torch.manual_seed(3)
    return Case(Overwritten(), rows())


class OverwrittenInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        if not z.requires_grad:
            x.zero_()
        return z.clone()


@layout("inputs overwritten by the model", full="the transform must be deterministic")
def _in_place_inputs() -> Case:
    torch.manual_seed(3)
    return Case(OverwrittenInput(nn.Linear(D, C)), rows())


@layout("nn.DataParallel")
def _data_parallel() -> Case:
    found = case()
    found.model = nn.DataParallel(found.model)
    return found


@layout("torch.compile")
def _compiled() -> Case:
    found = case()
    found.model.compile(backend="eager")
    return found


# --- rows ----------------------------------------------------------------------------------------


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


# --- labels and losses ---------------------------------------------------------------------------


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
