"""Parameters that are added, multiplied or expanded: positions, class tokens, layer scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tape import Call, Tape


class _OneEach(torch.autograd.Function):
    """A parameter repeated for every row of the batch, (B, ...) without a copy."""

    traced = True

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shape: tuple[int, ...], tape: Tape, call: Call) -> Any:
        ctx.tape, ctx.call, ctx.parameter = tape, call, parameter
        ctx.shape = parameter.shape
        return parameter.reshape(shape[1:]).expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        tape, call = ctx.tape, ctx.call
        if tape.probing:
            tape.probe(call, gradient)
            return None, None, None, None
        each = tape.arrange(call, gradient).sum(1)
        total = tape.vector(ctx.parameter, each).reshape(ctx.shape)
        return total.to(ctx.parameter.dtype), None, None, None


def _one_each(tape: Tape, parameter: Tensor, rank: int) -> Any:
    """(B, 1, ..., *shape) with ``rank`` dimensions, or NotImplemented."""
    shape = tuple(parameter.shape)
    if parameter.dim() == rank and shape[0] == 1:
        shape = shape[1:]
    if len(shape) >= rank or not tape.expanding:
        return NotImplemented
    full = (tape.rows, *[1] * (rank - 1 - len(shape)), *shape)
    call = tape.call("elementwise", (parameter,), ("vector",), full, 1, rank)
    if call is None:
        return NotImplemented
    return _OneEach.apply(parameter, full, tape, call)


def binary(tape: Tape, function: Any, one: Any, other: Any, **kwargs: Any) -> Any:
    """Trace sums, differences, products and quotients of a batch and a parameter."""
    plan = tape.plan
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one is other:
        return NotImplemented
    if plan.tracked(one) == plan.tracked(other):
        return NotImplemented
    parameter, batch = (one, other) if plan.tracked(one) else (other, one)
    if batch.dim() < 1 or batch.shape[0] != tape.rows:
        return NotImplemented
    each = _one_each(tape, parameter, batch.dim())
    if each is NotImplemented:
        return NotImplemented
    return function(each, batch, **kwargs) if parameter is one else function(batch, each, **kwargs)


def expand(tape: Tape, function: Any, parameter: Tensor, *sizes: Any) -> Any:
    """Trace ``parameter.expand(B, ...)``."""
    if not tape.plan.tracked(parameter):
        return NotImplemented
    shape = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    if not shape or shape[0] != tape.rows or parameter.dim() > len(shape):
        return NotImplemented
    each = _one_each(tape, parameter, len(shape))
    return NotImplemented if each is NotImplemented else function(each, *sizes)
