"""Batch norm with running statistics, layer norm, group norm and RMS norm."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tape import Call, Tape


def _affine_gradients(
    tape: Tape,
    call: Call,
    gradient: Tensor,
    normalised: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Add the uses of weight and bias in ``normalised * weight + bias``; return their gradients.

    ``channels``: the parameters belong to dimension 1, else to all dimensions after the leading.
    """
    outer, inner = tape.arrange(call, gradient), tape.arrange(call, normalised)
    of_weight = of_bias = None

    def per_sample(values: Tensor) -> Tensor:
        if not channels:
            return values.sum(1)
        return values.flatten(3).sum((1, 3)) if values.dim() > 3 else values.sum(1)

    if weight is not None and tape.plan.tracked(weight):
        of_weight = tape.vector(weight, per_sample(outer * inner)).to(weight.dtype)
    if bias is not None and tape.plan.tracked(bias):
        of_bias = tape.vector(bias, per_sample(outer)).to(bias.dtype)
    return of_weight, of_bias


def _single(dtype: torch.dtype) -> torch.dtype:
    """Format in which PyTorch normalises tensors of ``dtype``: 16-bit ones in float32."""
    return torch.promote_types(dtype, torch.float32)


class _BatchNorm(torch.autograd.Function):
    """F.batch_norm with running statistics, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        tape: Tape,
        call: Call,
    ) -> Tensor:
        result = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        mean, var = mean.to(_single(x.dtype)), var.to(_single(x.dtype))
        ctx.save_for_backward(x, weight, bias, mean, (var + eps).rsqrt())
        ctx.tape, ctx.call = tape, call
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias, mean, rstd = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.dim() - 2))
        of_input = None
        if ctx.needs_input_grad[0]:
            scale = rstd if weight is None else rstd * weight
            of_input = (gradient * scale.view(shape)).to(x.dtype)
        if ctx.tape.probing:
            ctx.tape.probe(ctx.call, gradient)
            return of_input, None, None, None, None, None, None, None
        normalised = (x.to(rstd.dtype) - mean.view(shape)).mul_(rstd.view(shape))
        of_weight, of_bias = _affine_gradients(
            ctx.tape, ctx.call, gradient, normalised, weight, bias, channels=True
        )
        return of_input, of_weight, of_bias, None, None, None, None, None


def with_strides_of(input: Tensor, result: Tensor) -> Tensor:
    """Give the gradient of a batch norm's result the strides of its input.

    torch 2.13 takes a permuted gradient of a single image for a contiguous one on a CPU, and
    returns a wrong gradient without a word.
    """
    if result.requires_grad:
        strides = input.stride()
        result.register_hook(
            lambda g: torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
        )
    return result


def batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Trace ``F.batch_norm`` in eval mode."""
    if training or running_mean is None or running_var is None:
        raise ValueError(
            "model: a batch norm uses the statistics of the batch, so that samples influence each "
            "other; it needs running statistics (track_running_stats=True) and eval mode"
        )
    rank = input.dim()
    call = tape.call("batch_norm", (weight, bias), ("vector", "vector"), input.shape[:1], 1, rank)
    if call is None:
        result = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        return with_strides_of(input, result)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps, tape, call)


def _as_autocast_does(x: Tensor) -> Tensor:
    """Within autocast, layer norm and group norm compute in float32."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


class _LayerNorm(torch.autograd.Function):
    """F.layer_norm, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Tape,
        call: Call,
    ) -> Tensor:
        result, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.tape, ctx.call = shape, tape, call
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias, mean, rstd = ctx.saved_tensors
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = torch.ops.aten.native_layer_norm_backward(
                gradient, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        if ctx.tape.probing:
            ctx.tape.probe(ctx.call, gradient)
            return of_input, None, None, None, None, None, None
        normalised = (x.to(_single(x.dtype)) - mean) * rstd
        of_weight, of_bias = _affine_gradients(
            ctx.tape, ctx.call, gradient, normalised, weight, bias, channels=False
        )
        return of_input, None, of_weight, of_bias, None, None, None


def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Trace ``F.layer_norm``."""
    shape = list(normalized_shape)
    lead = input.dim() - len(shape)
    input = _as_autocast_does(input)
    mixed = any(p is not None and p.dtype != input.dtype for p in (weight, bias))
    if lead < 1 or mixed:
        return NotImplemented
    kinds = ("vector", "vector")
    call = tape.call("layer_norm", (weight, bias), kinds, input.shape, lead, input.dim())
    if call is None:
        return NotImplemented
    return _LayerNorm.apply(input, shape, weight, bias, eps, tape, call)


class _GroupNorm(torch.autograd.Function):
    """F.group_norm, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Tape,
        call: Call,
    ) -> Tensor:
        x = x.contiguous()
        size = math.prod(x.shape[2:])
        result, mean, rstd = torch.native_group_norm(
            x, weight, bias, x.shape[0], x.shape[1], size, groups, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.tape, ctx.call = groups, tape, call
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias, mean, rstd = ctx.saved_tensors
        of_input, groups = None, ctx.groups
        if ctx.needs_input_grad[0]:
            of_input = torch.ops.aten.native_group_norm_backward(
                gradient.contiguous(),
                x,
                mean,
                rstd,
                weight,
                x.shape[0],
                x.shape[1],
                math.prod(x.shape[2:]),
                groups,
                [True, False, False],
            )[0]
        if ctx.tape.probing:
            ctx.tape.probe(ctx.call, gradient)
            return of_input, None, None, None, None, None, None
        grouped = x.reshape(x.shape[0], groups, -1).to(_single(x.dtype))
        normalised = ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)
        of_weight, of_bias = _affine_gradients(
            ctx.tape, ctx.call, gradient, normalised, weight, bias, channels=True
        )
        return of_input, None, of_weight, of_bias, None, None, None


def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Trace ``F.group_norm``."""
    input = _as_autocast_does(input)
    if any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        return NotImplemented
    rank = input.dim()
    call = tape.call("group_norm", (weight, bias), ("vector", "vector"), input.shape[:1], 1, rank)
    if call is None:
        return NotImplemented
    return _GroupNorm.apply(input, num_groups, weight, bias, eps, tape, call)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor, eps: float, tape: Tape, call: Call
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps, ctx.tape, ctx.call = shape, eps, tape, call
        return F.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        dims = tuple(range(x.dim() - len(ctx.shape), x.dim()))
        wide = x.to(_single(x.dtype))
        rstd = (wide.square().mean(dims, keepdim=True) + ctx.eps).rsqrt()
        normalised = wide * rstd
        of_input = None
        if ctx.needs_input_grad[0]:
            weighted = gradient * weight
            mean = (weighted * normalised).mean(dims, keepdim=True)
            of_input = (rstd * (weighted - normalised * mean)).to(x.dtype)
        if ctx.tape.probing:
            ctx.tape.probe(ctx.call, gradient)
            return of_input, None, None, None, None, None
        of_weight, _ = _affine_gradients(
            ctx.tape, ctx.call, gradient, normalised, weight, None, channels=False
        )
        return of_input, None, of_weight, None, None, None


def rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Trace ``F.rms_norm``."""
    shape = list(normalized_shape)
    lead = input.dim() - len(shape)
    if weight is None or lead < 1 or weight.dtype != input.dtype:
        return NotImplemented
    call = tape.call("rms_norm", (weight,), ("vector",), input.shape, lead, input.dim())
    if call is None:
        return NotImplemented
    eps = torch.finfo(_single(input.dtype)).eps if eps is None else eps
    return _RMSNorm.apply(input, shape, weight, eps, tape, call)
