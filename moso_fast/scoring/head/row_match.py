"""Which rows of a head's output are the rows of a model's logits: by equal bits."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

# Numbers that are widened to int64 at a time.
_BLOCK_ELEMENTS = 2**22
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Any large odd number: it sets rows of different samples apart.
_SAMPLE = 0x9E3779B97F4A7C1


class Match(Enum):
    """Why there is no list of rows."""

    NONE = "some row is no row of the head's output"
    AMBIGUOUS = "rows of the head's output are equal although their inputs differ"


def row_keys(rows: Tensor) -> Tensor:
    """(n,) int64, equal for rows (n, M) with equal bits; others agree once in 2^64."""
    if not rows.shape[1]:
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    generator = torch.Generator().manual_seed(20231210)
    factors = torch.randint(2**62, (rows.shape[1],), generator=generator, device="cpu") * 2 + 1
    factors = factors.to(rows.device)
    at_once = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    keys = []
    for block in rows.split(at_once):
        numbers = (block + 0).contiguous().view(_INTEGERS[rows.dtype.itemsize])  # -0.0 becomes 0.0
        keys.append((numbers.to(torch.int64) * factors).sum(1))  # wraps round, as a hash may
    return torch.cat(keys)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether (n, M) tensors of one dtype are equal, NaN included."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or torch.equal(row_keys(one), row_keys(other))


def match_rows(
    wanted: Tensor,
    rows: Tensor,
    inputs: Tensor | None,
    samples: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Match:
    """Return (m,) numbers: which of ``rows`` (n, C) each of ``wanted`` (m, C) is.

    Equal rows with equal ``inputs`` (n, D) have the same gradient, and any of them will do; with
    ``inputs`` None all rows must be different. ``samples``: the sample that each of ``wanted`` and
    of ``rows`` belongs to, which must agree.
    """
    known, asked = row_keys(rows), row_keys(wanted)
    if samples is not None:
        asked, known = (
            asked + samples[0] * _SAMPLE,
            known + samples[1] * _SAMPLE,
        )
    order = known.argsort(stable=True)
    ordered = known[order]
    first = torch.searchsorted(ordered, asked)
    after = torch.searchsorted(ordered, asked, right=True)
    if bool((first == after).any()):
        return Match.NONE
    several = after - first > 1
    if bool(several.any()):
        if inputs is None:
            return Match.AMBIGUOUS
        # Rows of one key differ in their inputs where a step within it does.
        input_keys = row_keys(inputs)[order]
        step = (ordered[1:] == ordered[:-1]) & (input_keys[1:] != input_keys[:-1])
        steps = torch.cat([step.new_zeros(1), step]).cumsum(0)
        if bool((steps[after - 1] != steps[first]).any()):
            return Match.AMBIGUOUS
    return order[first]


def distinct_share(rows: Tensor, inputs: Tensor) -> float:
    """Share of ``rows`` (n, C) that no other row with another input equals."""
    keys = row_keys(rows)
    values, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    if len(values) == len(keys):
        return 1.0
    pairs = torch.stack([inverse, row_keys(inputs)], 1).unique(dim=0)
    kinds = torch.zeros_like(counts).scatter_add_(0, pairs[:, 0], torch.ones_like(pairs[:, 0]))
    return float((kinds[inverse] == 1).double().mean())
