"""Linear layers, as modules or functions, and products with a parameter: x W^T + b, x W."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import Factors
from .tape import Call, Tape


class _Linear(torch.autograd.Function):
    """F.linear, whose backward adds to the tape; ``stored`` is W or, for products, W^T."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tape: Tape, call: Call, flip: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.tape, ctx.call, ctx.flip = tape, call, flip
        return F.linear(x, weight.t() if flip else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors
        tape, call = ctx.tape, ctx.call
        of_input = None
        if ctx.needs_input_grad[0]:
            used = weight.to(gradient.dtype)
            of_input = (gradient @ (used.t() if ctx.flip else used)).to(x.dtype)
        if tape.probing:
            tape.probe(call, gradient)
            return of_input, None, None, None, None, None
        outer = tape.arrange(call, gradient)[:, None]
        # In the dtype in which the product was computed, so that rounding is the same.
        inner = tape.arrange(call, x.to(gradient.dtype))[:, None]
        rows, cols = (inner, outer) if ctx.flip else (outer, inner)
        of_weight = of_bias = None
        if tape.plan.tracked(weight):
            of_weight = tape.matrix(weight, Factors(rows, cols), weight.shape[0])[0]
            of_weight = of_weight.to(weight.dtype)
        if bias is not None and tape.plan.tracked(bias):
            of_bias = tape.vector(bias, outer[:, 0].sum(1)).to(bias.dtype)
        return of_input, of_weight, of_bias, None, None, None


def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Trace ``F.linear``."""
    return _product(tape, input, weight, bias, flip=False)


def matmul(tape: Tape, input: Tensor, mat2: Any = None, **kwargs: Any) -> Any:
    """Trace ``input @ mat2`` where ``mat2`` is a parameter."""
    if kwargs or not isinstance(input, Tensor) or not isinstance(mat2, Tensor):
        return NotImplemented
    return _product(tape, input, mat2, None, flip=True)


def addmm(tape: Tape, input: Tensor, mat1: Tensor, mat2: Any = None, **kwargs: Any) -> Any:
    """Trace ``input + mat1 @ mat2`` where ``mat2`` is a parameter and ``input`` a bias."""
    if kwargs or not isinstance(mat2, Tensor) or input.shape != mat2.shape[1:]:
        return NotImplemented
    return _product(tape, mat1, mat2, input, flip=True)


def _product(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool) -> Any:
    if weight.dim() != 2 or x.dim() < 2 or x is weight:
        return NotImplemented
    height, width = weight.shape
    shape = [*x.shape[:-1], weight.shape[1 if flip else 0]]
    kinds = (("matrix", 1, height, width), "vector")
    name = "product" if flip else "linear"
    call = tape.call(name, (weight, bias), kinds, shape, x.dim() - 1, x.dim())
    if call is None:
        return NotImplemented
    return _Linear.apply(x, weight, bias, tape, call, flip)
