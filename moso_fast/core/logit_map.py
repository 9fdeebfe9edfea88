"""Known functions between the output of a head and the logits that a model's loss is taken of.

With z the head's output and m the map, the loss is l(m(z)) and its derivative by z is m'(z)^T r
with r = dl/dm: all that the last layer's gradients need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

KINDS = ("scale", "affine", "tanh", "sigmoid", "softmax", "log_softmax", "clamp")


@dataclass(frozen=True, eq=False)
class LogitMap:
    """A map m from the head's output z (..., C) to the logits (..., C).

    Parameters
    ----------
    kind
        ``"scale"``: a z; ``"affine"``: a_c z_c + b_c; ``"tanh"``: a tanh(b z), the final soft cap
        of some language models; ``"sigmoid"``, ``"softmax"`` and ``"log_softmax"`` of a z;
        ``"clamp"``: a z, no lower than b and no higher than c.
    values
        a, b, c: float64, () or (C,) each, as many as the kind takes.
    """

    kind: str
    values: tuple[Tensor, ...]

    def apply(self, z: Tensor) -> Tensor:
        """m(z), in the dtype of ``z``."""
        return _APPLY[self.kind](z, *self._values(z))

    def pull_back(self, z: Tensor, residual: Tensor) -> Tensor:
        """m'(z)^T r: the derivative by z of a loss whose derivative by m(z) is ``residual``."""
        return _PULL_BACK[self.kind](z, residual, *self._values(z))

    def rounding(self, z: Tensor) -> Tensor:
        """Size of m(z) and of the terms that it is made of: what its rounding errors scale with."""
        size = self.apply(z).abs()
        first = self._values(z)[0]
        if self.kind == "affine":
            return (first * z).abs() + self._values(z)[1].abs() + size
        if self.kind in ("sigmoid", "softmax"):
            return size * (1 + 2 * (first * z).abs().amax(-1, keepdim=True))
        if self.kind == "log_softmax":
            return size + (first * z).abs().amax(-1, keepdim=True)
        if self.kind == "clamp":
            return size + (first * z).abs().clamp_max(size.amax())
        return size

    def keeps_cross_entropy(self) -> bool:
        """Tell whether cross-entropy is the same with the map and without it."""
        return self.kind == "log_softmax" and float(self.values[0]) == 1.0

    def describe(self) -> str:
        """Return the map in words, with its numbers where there are few."""
        shown = [f"{float(v):.6g}" if v.dim() == 0 else "" for v in self.values]
        if self.kind == "affine":
            return "a factor and an offset for every class (such as BatchNorm in eval mode)"
        if self.kind == "scale":
            return f"a factor of {shown[0]}"
        if self.kind == "tanh":
            return f"{shown[0]} * tanh({shown[1]} * z), a soft cap"
        if self.kind == "clamp":
            return f"clamp({_times(shown[0])}, {shown[1]}, {shown[2]})"
        return f"{self.kind}({_times(shown[0])})"

    def _values(self, z: Tensor) -> list[Tensor]:
        return [v.to(z.device, z.dtype) for v in self.values]


def _times(factor: str) -> str:
    return "z" if factor == "1" else f"{factor} * z"


def _softmax_back(z: Tensor, r: Tensor, a: Tensor) -> Tensor:
    p = (a * z).softmax(-1)
    return a * p * (r - (p * r).sum(-1, keepdim=True))


def _log_softmax_back(z: Tensor, r: Tensor, a: Tensor) -> Tensor:
    return a * (r - (a * z).softmax(-1) * r.sum(-1, keepdim=True))


def _clamp_back(z: Tensor, r: Tensor, a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    inside, at_bound = (a * z > low) & (a * z < high), (a * z == low) | (a * z == high)
    return torch.where(inside, a * r, torch.where(at_bound, _clamp_slope_at_bound() * a * r, 0))


@cache
def _clamp_slope_at_bound() -> float:
    """Return the derivative of a clamp where it begins to cut: 1 up to torch 2.13, 0 since."""
    with torch.inference_mode(False), torch.enable_grad():
        bound = torch.ones((), requires_grad=True, device="cpu")
        (slope,) = torch.autograd.grad(bound.clamp(0, 1), bound)
    return float(slope)


_APPLY: dict[str, Callable[..., Tensor]] = {
    "scale": lambda z, a: a * z,
    "affine": lambda z, a, b: a * z + b,
    "tanh": lambda z, a, b: a * (b * z).tanh(),
    "sigmoid": lambda z, a: (a * z).sigmoid(),
    "softmax": lambda z, a: (a * z).softmax(-1),
    "log_softmax": lambda z, a: (a * z).log_softmax(-1),
    "clamp": lambda z, a, low, high: (a * z).clamp(low, high),
}
_PULL_BACK: dict[str, Callable[..., Tensor]] = {
    "scale": lambda z, r, a: a * r,
    "affine": lambda z, r, a, b: a * r,
    # 1 / cosh^2 keeps its digits where 1 - tanh^2 has none left.
    "tanh": lambda z, r, a, b: a * b * (b * z).cosh().square().reciprocal() * r,
    "sigmoid": lambda z, r, a: a * (a * z).sigmoid() * (-a * z).sigmoid() * r,
    "softmax": _softmax_back,
    "log_softmax": _log_softmax_back,
    "clamp": _clamp_back,
}
