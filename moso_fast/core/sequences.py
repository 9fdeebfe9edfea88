"""Sums over the tokens of each sequence, and the norm of a sequence's gradient.

The gradient of a sequence is sum_t r_t (outer) [h_t; 1], so its squared norm is not the sum of
the tokens' norms. It is computed as sum_{t,u} <r_t, r_u> (<h_t, h_u> + 1) (two T x T products)
for short sequences and as |R^T [H 1]|^2 (one C x D product) where that is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem

# Numbers in the padded (batch, T, D + K C) blocks that one round of short sequences may hold.
_BLOCK_ELEMENTS = 2**24
# Tokens of a long sequence that are multiplied at a time.
_DIRECT_ROWS = 8192


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum (K, rows) over the segments between ``offsets`` (B + 1): (K, B).

    ``offsets`` should be on the device of the values: to send them there waits for it.
    """
    if offsets.shape[0] == 1:
        return values[:, :0]
    device_offsets = offsets.to(values.device)
    return torch.segment_reduce(values.T.contiguous(), "sum", offsets=device_offsets, axis=0).T


def sequence_grad_sqnorm(
    problem: Problem, chunk: slice, counted: Tensor, residual: Tensor, offsets: Tensor
) -> Tensor:
    """|g_s|^2 of the sequences that lie in rows ``chunk``: (K, sequences), float64.

    ``residual`` is (n, K, C), zero for rows that do not count; ``counted`` is their mask (n,).
    """
    bounds = _whole_sequences(offsets, chunk) - chunk.start
    lengths = bounds.diff()
    features = problem.feature_rows(chunk).to(problem.compute_dtype)
    features = torch.where(counted[:, None], features, 0)
    out = torch.zeros(problem.heads, len(lengths), dtype=torch.float64, device=problem.device)
    classes, dim = problem.classes, problem.dim
    direct_from = classes * dim / (classes + dim)
    ones = 1.0 if problem.bias is not None else 0.0
    padded = _padded_lengths(lengths)
    for length in padded.unique().tolist():
        if length == 0:
            continue
        members = (padded == length).nonzero().squeeze(1)
        if length > direct_from:
            _direct(features, residual, bounds, members, ones, out)
        else:
            _pairwise(features, residual, bounds, members, length, ones, out)
    return out


def _whole_sequences(offsets: Tensor, chunk: slice) -> Tensor:
    """Return the offsets of this chunk's sequences; empty ones at a border go to the later chunk.

    A border repeated by empty sequences is taken at its first entry, both as the end of one chunk
    and as the start of the next, so that every sequence belongs to exactly one chunk.
    """
    first = 0 if chunk.start == 0 else int(torch.searchsorted(offsets, chunk.start))
    at_end = chunk.stop == int(offsets[-1])
    last = len(offsets) - 1 if at_end else int(torch.searchsorted(offsets, chunk.stop))
    return offsets[first : last + 1]


def _padded_lengths(lengths: Tensor) -> Tensor:
    """Round lengths up to powers of two, so that few distinct block shapes occur."""
    exponent = lengths.clamp_min(1).double().log2().ceil()
    return torch.where(lengths > 0, (2.0**exponent).long(), 0)


def _direct(
    features: Tensor, residual: Tensor, bounds: Tensor, members: Tensor, ones: float, out: Tensor
) -> None:
    # Libraries for CPUs share out the tokens of one product among the threads. In float64 what that
    # changes is lost when the result is rounded, so that float32 bits are the same for any number.
    wide = torch.float64 if features.device.type == "cpu" else features.dtype
    for index in members.tolist():
        start, stop = int(bounds[index]), int(bounds[index + 1])
        grad = torch.zeros(*residual.shape[1:], features.shape[1], dtype=wide, device=out.device)
        bias_grad = torch.zeros(residual.shape[1:], dtype=wide, device=out.device)
        for at in range(start, stop, _DIRECT_ROWS):
            rows = slice(at, min(at + _DIRECT_ROWS, stop))
            r = residual[rows].to(wide)
            grad += torch.einsum("tkc,td->kcd", r, features[rows].to(wide))
            bias_grad += r.sum(0)
        norm = grad.double().square().sum((1, 2))
        if ones:
            norm = norm + bias_grad.double().square().sum(1)
        out[:, index] = norm


def _pairwise(
    features: Tensor,
    residual: Tensor,
    bounds: Tensor,
    members: Tensor,
    length: int,
    ones: float,
    out: Tensor,
) -> None:
    width = features.shape[1] + residual[0].numel() + (1 + residual.shape[1]) * length
    at_once = max(1, _BLOCK_ELEMENTS // (length * width))
    steps = torch.arange(length, device="cpu")
    for group in members.split(at_once):
        starts, ends = bounds[group], bounds[group + 1]
        index = starts[:, None] + steps
        valid = (index < ends[:, None]).to(features.device)
        index = torch.where(index < ends[:, None], index, 0).to(features.device)
        h = features[index]
        r = torch.where(valid[..., None, None], residual[index], 0)
        gram_h = h @ h.transpose(1, 2) + ones
        gram_r = torch.einsum("btkc,bukc->kbtu", r, r)
        out[:, group.to(out.device)] = (gram_r * gram_h).double().sum((2, 3))
