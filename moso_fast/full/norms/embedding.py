"""Embeddings: the gradient touches the looked-up rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import Factors
from .tape import Call, Tape


class _Embedding(torch.autograd.Function):
    """F.embedding, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, index: Tensor, skip: int | None, tape: Tape, call: Call
    ) -> Tensor:
        ctx.save_for_backward(weight, index)
        ctx.skip, ctx.tape, ctx.call = skip, tape, call
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        weight, index = ctx.saved_tensors
        tape, call = ctx.tape, ctx.call
        if tape.probing:
            tape.probe(call, gradient)
            return None, None, None, None, None
        cols = tape.arrange(call, gradient)
        rows = tape.arrange(call, index)
        if ctx.skip is not None:
            # The row of the padding token is held fixed.
            cols = cols.masked_fill((rows == ctx.skip)[..., None], 0.0)
        total = tape.matrix(weight, Factors(rows, cols[:, None]), weight.shape[0])[0]
        return total.to(weight.dtype), None, None, None, None


def embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Trace ``F.embedding``, except where a gradient depends on the other samples of the batch.

    ``sparse`` is how the gradient would be stored, not what it is: here it is always dense.
    """
    if max_norm is not None or scale_grad_by_freq or input.dim() < 1:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    kinds = (("matrix", 1, *weight.shape),)
    rows = tape.rows
    if tape.expanding and input.shape[0] == 1 and input.dim() > 1:
        # Positions, the same for all samples: looked up for each, so that gradients stay apart.
        input = input.expand(rows, *input.shape[1:])
    elif tape.expanding and input.dim() == 1 and not _by_sample(tape, input, weight):
        input = input.expand(rows, *input.shape)
    rank = input.dim()
    call = tape.call("embedding", (weight,), kinds, input.shape, rank, rank)
    if call is None:
        return NotImplemented
    return _Embedding.apply(weight, input.long(), padding_idx, tape, call)


def _by_sample(tape: Tape, input: Tensor, weight: Tensor) -> bool:
    """Tell whether a list of numbers can belong to the samples, and is not the same for all."""
    if input.shape[0] % tape.rows:
        return False
    # A number of positions that is a multiple of the batch size by chance: the plan knows better.
    return tape.probing or tape.rows == 1 or tape.known_call("embedding", weight, 1)
