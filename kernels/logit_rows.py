"""Rows of logits in memory, as the kernels that turn them into residuals in place walk them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class LogitRows(NamedTuple):
    """The items (row, head) of a program; (BLOCK_ROWS,) each."""

    base: Any  # pointers to the first logits
    row: tl.tensor  # int64, as head
    head: tl.tensor
    exists: tl.tensor
    counted: tl.tensor  # which of them the mask, if there is one, lets count


@triton.jit
def logit_rows(
    logits,  # (n, K * C) float32
    counted,  # (n,) bool or None
    items,  # n * K
    row_stride,  # of logits
    HEADS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # row_stride == K * C, known when compiling
):
    """LogitRows of this program."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = item < items
    row = item // HEADS
    head = item % HEADS
    start_of_row = item * CLASSES if CONTIGUOUS else row * row_stride + head * CLASSES
    base = logits + start_of_row
    live = exists
    if counted is not None:
        live &= tl.load(counted + row, mask=exists, other=0).to(tl.int1)
    return LogitRows(base, row, head, exists, live)
