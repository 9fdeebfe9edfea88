"""Embedding bags: sums, means or maxima of the looked-up rows, with or without offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from .factors import Factors
from .tape import Call, Tape


@dataclass(frozen=True)
class Bags:
    """What the bags of one call hold.

    ``index`` (n,) row numbers of the table; ``bag`` (n,) the bag that each belongs to; ``starts``
    (b,) where the bags begin; ``share`` (n,) by how much each row counts: 0 for the padding token,
    1 / (size of the bag) for means, weights (``each``) where there are some.
    """

    index: Tensor
    bag: Tensor
    starts: Tensor
    share: Tensor
    each: Tensor | None
    mode: str
    padding: int | None

    @property
    def count(self) -> int:
        """Number of bags."""
        return len(self.starts)


def bags_of(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Bags | None:
    """Read the arguments of ``F.embedding_bag``; None for what has no rule.

    ``sparse`` is how the gradient is stored, not what it is.
    """
    if max_norm is not None or scale_grad_by_freq or input.is_nested:
        return None
    if input.dim() == 2 and offsets is None:
        length = input.shape[1]
        starts = torch.arange(input.shape[0], device=input.device) * length
    elif input.dim() == 1 and offsets is not None and offsets.dim() == 1:
        starts = offsets.long()
        if include_last_offset:
            input = input[: int(starts[-1])]
            starts = starts[:-1]
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights[: len(input)]
    else:
        return None
    index = input.reshape(-1).long()
    ends = torch.cat([starts[1:], starts.new_tensor([len(index)])])
    bag = torch.repeat_interleave(torch.arange(len(starts), device=index.device), ends - starts)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    each = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    # 16 bits count no further than 256.
    counts = torch.ones_like(index, dtype=torch.promote_types(weight.dtype, torch.float32))
    if padding_idx is not None:
        counts = torch.where(index == padding_idx, 0.0, counts)
    share = counts
    if mode == "mean":
        sizes = counts.new_zeros(len(starts)).index_add(0, bag, counts)
        share = counts / sizes.clamp_min(1)[bag]
    elif each is not None:
        share = counts * each.detach()
    return Bags(index, bag, starts, share, each, mode, padding_idx)


def written_out(weight: Tensor, bags: Bags) -> Tensor:
    """Compute the bags in operations that have a forward-mode derivative and work under vmap."""
    if bags.mode == "max":
        found = forward_ad.unpack_dual(weight).primal
        chosen, some = largest(found, bags)
        return torch.where(some, weight.gather(0, chosen), 0.0)
    looked_up = F.embedding(bags.index, weight)
    if bags.padding is not None:
        # Its row is held fixed: no derivative, and share 0 takes its value out.
        looked_up = looked_up.masked_fill((bags.index == bags.padding)[:, None], 0.0)
    share = bags.share
    if bags.each is not None:
        share = bags.each
    # Summed in 32 bits, as the kernel does: what many words add to a 16-bit sum rounds away.
    wide = torch.promote_types(looked_up.dtype, torch.float32)
    total = looked_up.new_zeros(bags.count, weight.shape[1], dtype=wide)
    parts = looked_up.to(wide) * share[:, None].to(wide)
    return total.index_add(0, bags.bag, parts).to(looked_up.dtype)


def largest(weight: Tensor, bags: Bags) -> tuple[Tensor, Tensor]:
    """(b, D) row of the table with the largest entry in each bag, and whether there is one."""
    _, _, _, chosen = torch.embedding_bag(
        weight.detach(), bags.index, bags.starts, False, 2, False, None, False, bags.padding
    )
    counted = torch.ones_like(bags.index) if bags.padding is None else bags.index != bags.padding
    sizes = torch.zeros_like(bags.starts).index_add(0, bags.bag, counted.long())
    some = (sizes > 0)[:, None].expand(chosen.shape)
    return torch.where(some, chosen.long(), 0), some


class _EmbeddingBag(torch.autograd.Function):
    """F.embedding_bag, whose backward adds to the tape."""

    traced = True

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, each: Tensor | None, bags: Bags, tape: Tape, call: Call
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bags, ctx.tape, ctx.call = bags, tape, call
        return F.embedding_bag(
            bags.index,
            weight,
            bags.starts,
            mode=bags.mode,
            per_sample_weights=each,
            padding_idx=bags.padding,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors
        bags, tape, call = ctx.bags, ctx.tape, ctx.call
        of_each = None
        if bags.each is not None and ctx.needs_input_grad[1]:
            of_each = (gradient[bags.bag] * weight[bags.index]).sum(1)
            if bags.padding is not None:
                of_each = of_each.masked_fill(bags.index == bags.padding, 0.0)
        if tape.probing:
            tape.probe(call, gradient)
            return None, of_each, None, None, None
        numbers = torch.arange(bags.count, device=gradient.device)
        # Which sample each bag belongs to.
        by_sample = tape.arrange(call, numbers[:, None])[..., 0]
        sample = torch.empty_like(numbers)
        sample[by_sample] = torch.arange(len(by_sample), device=numbers.device)[:, None]
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        if not tape.only_use(weight) and bags.mode != "max":
            total = tape.matrix(weight, _factors(bags, gradient, sample, by_sample), len(weight))[0]
        else:
            norms, total = _squared_norms(bags, weight, gradient, sample, len(by_sample))
            tape.known(weight, norms)
        return total.to(weight.dtype), of_each, None, None, None


def _squared_norms(
    bags: Bags, weight: Tensor, gradient: Tensor, sample: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Return squared norms (samples,) and the summed gradient (V, D) of the table's only use.

    What a sample adds to one row of the table (for maxima: to one entry) is summed first: it is
    then squared once, however often a bag repeats a token.
    """
    rows, width = weight.shape
    if bags.mode == "max":
        chosen, some = largest(weight, bags)
        columns = torch.arange(width, device=chosen.device)
        keys = ((sample[:, None] * rows + chosen) * width + columns)[some]
        parts, size = gradient[some][:, None], rows * width
    else:
        keys = sample[bags.bag] * rows + bags.index
        parts, size = gradient[bags.bag] * bags.share[:, None].to(gradient.dtype), rows
    known, place = keys.unique(return_inverse=True)
    sums = parts.new_zeros(len(known), parts.shape[1]).index_add_(0, place, parts)
    norms = torch.zeros(samples, dtype=torch.float64, device=sums.device)
    norms.index_add_(0, known // size, sums.square().sum(1).double())
    total = sums.new_zeros(size, sums.shape[1]).index_add_(0, known % size, sums)
    return norms, total.view(rows, width)


def _factors(bags: Bags, gradient: Tensor, sample: Tensor, by_sample: Tensor) -> Factors:
    """Row numbers (samples, T) and gradients (samples, 1, T, D), filled up with gradients of 0."""
    owner = sample[bags.bag]
    counts = torch.bincount(owner, minlength=len(by_sample))
    order = owner.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
    longest = max(1, int(counts.max())) if len(counts) else 1
    rows = owner.new_zeros(len(by_sample), longest)
    cols = gradient.new_zeros(len(by_sample), 1, longest, gradient.shape[1])
    rows[owner, place] = bags.index
    cols[owner, 0, place] = gradient[bags.bag] * bags.share[:, None].to(gradient.dtype)
    return Factors(rows, cols)


def embedding_bag(tape: Tape, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Trace ``F.embedding_bag``."""
    bags = bags_of(input, weight, *args, **kwargs)
    if bags is None or id(bags.each) in tape.plan.names:
        return NotImplemented
    kind: tuple[Any, ...] = ("matrix", 1, *weight.shape)
    if bags.mode == "max":
        # No sum of outer products: what else uses the table cannot be added to it.
        kind = ("maxima", len(tape.calls))
    rank = input.dim()
    call = tape.call("embedding_bag", (weight,), (kind,), (bags.count,), 1, rank)
    if call is None:
        return NotImplemented
    return _EmbeddingBag.apply(weight, bags.each, bags, tape, call)
