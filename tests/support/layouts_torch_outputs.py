"""Layouts of plain PyTorch: what the model returns, overwrites and is wrapped in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from layouts import Case, Layout, one_by_one
from layouts_torch_networks import C, D, Net, adds_to, case, rows
from torch import Tensor, nn

LAYOUTS: list[Layout] = []
layout = adds_to(LAYOUTS)


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
