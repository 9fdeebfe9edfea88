"""Convolutions in one to three dimensions, with stride, padding, dilation and groups."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import Factors, ghost_is_cheaper
from .tape import Call, Tape

# Operations of one sample's weight gradient above which a call for each sample pays.
_ONE_BY_ONE = 4_000_000

_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Convolution(torch.autograd.Function):
    """F.conv1d, F.conv2d or F.conv3d, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: tuple[Any, ...],
        tape: Tape,
        call: Call,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.how, ctx.tape, ctx.call = how, tape, call
        return _FUNCTIONS[x.dim() - 2](x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors
        tape, call = ctx.tape, ctx.call
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = _native(gradient, x, weight, ctx.how, of_input=True).to(x.dtype)
        if tape.probing:
            tape.probe(call, gradient)
            return of_input, None, None, None, None, None
        of_weight = of_bias = None
        if tape.plan.tracked(weight):
            of_weight = _weight_gradient(tape, call, gradient, x, weight, ctx.how)
        if bias is not None and tape.plan.tracked(bias):
            outer = tape.arrange(call, gradient)  # (samples, m, R, *out)
            of_bias = tape.vector(bias, outer.flatten(3).sum((1, 3))).to(bias.dtype)
        return of_input, of_weight, of_bias, None, None, None


def _native(
    gradient: Tensor, x: Tensor, weight: Tensor, how: tuple[Any, ...], of_input: bool
) -> Tensor:
    """Gradient of the input or of the weight, summed over the batch."""
    stride, padding, dilation, groups = how
    dtype = gradient.dtype
    result = torch.ops.aten.convolution_backward(
        gradient,
        x.to(dtype),
        weight.to(dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [of_input, not of_input, False],
    )
    return result[0 if of_input else 1]


def _weight_gradient(
    tape: Tape, call: Call, gradient: Tensor, x: Tensor, weight: Tensor, how: tuple[Any, ...]
) -> Tensor:
    """Add the norms of the weight's gradients; return their sum."""
    groups = how[3]
    outer = tape.arrange(call, gradient)
    inner = tape.arrange(call, x.to(gradient.dtype))
    samples, many, channels = outer.shape[:3]
    height, width = channels // groups, weight[0].numel()
    positions = many * math.prod(outer.shape[3:])
    work = 2 * positions * groups * height * width
    ghost = ghost_is_cheaper(positions, height, width, height)
    if tape.only_use(weight) and not ghost and x.device.type == "cpu" and work > _ONE_BY_ONE:
        # The library's own kernel for one sample at a time: its result stays in the cache, and no
        # input windows are copied.
        norms, total = [], torch.zeros_like(weight, dtype=outer.dtype)
        for sample in range(samples):
            one = _native(outer[sample], inner[sample], weight.to(outer.dtype), how, of_input=False)
            norms.append(torch.linalg.vector_norm(one).double().square())
            total += one
        tape.known(weight, torch.stack(norms))
        return total.to(weight.dtype)
    cols = _patches(inner, weight.shape[2:], *how)
    rows = _positions(outer.unflatten(2, (groups, height)))
    tape.matrix(weight, Factors(rows, cols), height, wanted=False)
    return _native(gradient, x, weight, how, of_input=False).to(weight.dtype)


def _positions(tensor: Tensor) -> Tensor:
    """Bring (samples, m, G, C, *size) to (samples, G, m * L, C), by a view where possible."""
    flat = tensor.flatten(4).permute(0, 2, 1, 4, 3)
    return flat[:, :, 0] if flat.shape[2] == 1 else flat.flatten(2, 3)


def _patches(
    x: Tensor,
    kernel: torch.Size,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Input windows (samples, G, m * L, kernel * C / G) of inputs (samples, m, C, *size)."""
    samples, many, channels = x.shape[:3]
    images = x.flatten(0, 1)
    if any(padding):
        images = F.pad(images, [p for p in reversed(padding) for _ in (0, 1)])
    images = images.movedim(1, -1).contiguous()  # channels last: windows are copied in whole rows
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(images.shape[1:-1], kernel, stride, dilation, strict=True)
    ]
    steps = images.stride()
    windows = images.as_strided(
        (samples * many, *sizes, *kernel, channels),
        (
            steps[0],
            *(step * s for step, s in zip(steps[1:-1], stride, strict=True)),
            *(step * d for step, d in zip(steps[1:-1], dilation, strict=True)),
            1,
        ),
    )
    area, taps = math.prod(sizes), math.prod(kernel)
    if groups == 1:
        return windows.reshape(samples, 1, many * area, taps * channels)
    split = windows.reshape(samples, many * area, taps, groups, channels // groups)
    return split.permute(0, 3, 1, 2, 4).flatten(3)


def convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Trace ``F.conv1d``, ``F.conv2d`` and ``F.conv3d``."""
    spatial = weight.dim() - 2
    if input.dim() != spatial + 2:
        return NotImplemented
    dilation = _each(dilation, spatial)
    if isinstance(padding, str):
        ends = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(end % 2 for end in ends):
            return NotImplemented
        padding = [end // 2 if padding == "same" else 0 for end in ends]
    how = (_each(stride, spatial), _each(padding, spatial), dilation, groups)
    height, width = weight.shape[0] // groups, weight[0].numel()
    kinds = (("matrix", groups, height, width), "vector")
    rank = input.dim()
    call = tape.call("convolution", (weight, bias), kinds, input.shape[:1], 1, rank)
    if call is None:
        return NotImplemented
    return _Convolution.apply(input, weight, bias, how, tape, call)


def _each(value: Any, count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    return list(value) * (count if len(value) == 1 else 1)
