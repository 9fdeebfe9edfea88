"""The two passes over chunks of rows, the same for every backend.

First pass: row statistics and the sum of the gradients; then the mean gradient G in float64, in
a fixed order; second pass: the alignment of every row with G. Residuals of the first pass are
kept where they fit the memory budget, otherwise the second pass computes them again. What is
checked on the way, and when the host waits for it, is in ``verdict.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import make_plan, rows_at_a_time
from .passes import Passes, Plan, Results, RowBuffers
from .precision import own_precision
from .problem import Problem
from .sequences import segment_sum, sequence_grad_sqnorm
from .status import STATUS_SLOTS, sequence_offsets
from .streaming import CudaLane, Feed, StreamedFeed
from .sums import sqnorm, thread_blocks
from .verdict import Reading, Verdict

if TYPE_CHECKING:
    from ..backends import Backend

# Numbers of a head whose gradient sum a GPU widens to float64 only to add chunks up.
_LARGE_HEAD = 2**24

# The fields of Results that have a value for every sample.
_SAMPLE_FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")


@dataclass
class _Swept:
    """What the first pass leaves of all chunks together."""

    # The first chunk's sums become the total: for large heads a fresh one costs as much as adding.
    grad_sum: Tensor | None = None
    bias_grad_sum: Tensor | None = None
    kept: list[Tensor | None] = field(default_factory=list)  # residuals of every chunk
    sequence_norms: list[Tensor] = field(default_factory=list)


def make_feed(problem: Problem, chunks: list[slice], plan: Plan) -> Feed:
    """Walk through the chunks where they lie, or bring them to the device."""
    if not problem.streamed:
        return Feed(problem, chunks)
    return StreamedFeed(problem, chunks, CudaLane(problem.device), plan.resident_bytes)


def run(
    problem: Problem,
    backend: Backend,
    chunk_size: int | None = None,
    formula: str | None = None,
    scale: float = 1.0,
) -> Results:
    """Score ``problem`` with ``backend``.

    ``formula`` and ``scale`` are those of the scores that will be asked for: the samples must
    suffice for it, and a backend may compute them on the way.

    Raises
    ------
    ValueError
        Data that the first pass refuses (label out of range, non-finite feature, overflow); one
        counted sample where ``formula`` divides by N - 1.
    RuntimeError
        The self-check sum_i a_i = N |G|^2 failed: a wrong result is never returned.
    """
    reading = _reading(problem)
    if reading is Reading.NEVER and problem.streamed:
        raise ValueError(
            f"features must be on {problem.device} under CUDA graph capture, got "
            f"{problem.features.device}"
        )
    plan = make_plan(problem, chunk_size)
    passes = backend.prepare(problem, plan)
    # The host cuts the rows by these: a read of their own, before anything is launched.
    offsets = None if problem.cu_seqlens is None else sequence_offsets(problem)
    chunks = list(_chunks(problem.rows, rows_at_a_time(problem, plan, passes), offsets))
    verdict = Verdict(problem, formula, reading)
    if len(chunks) == 1 and offsets is None and not problem.streamed:
        whole = passes.whole(formula, scale, read=reading is not Reading.NEVER)
        if whole is not None:
            verdict.whole(whole)
            return whole.results
    with own_precision(problem):
        verdict.parameters()
        with closing(make_feed(problem, chunks, plan)) as feed:
            results, counted = _two_passes(feed, passes, offsets, verdict)
        verdict.results(results, counted)
        # Unknown under capture: the graph may be replayed on rows of which some do not count.
        if verdict.count != counted.shape[0]:
            _leave_out(results, ~counted)
    return results


def _reading(problem: Problem) -> Reading:
    """When the host may read what lies on the device; the reasons are in ``verdict.py``."""
    if _capturing(problem):
        return Reading.NEVER
    if problem.asynchronous and not problem.streamed:
        return Reading.TOGETHER
    return Reading.AT_ONCE


def _two_passes(
    feed: Feed, passes: Passes, offsets: Tensor | None, verdict: Verdict
) -> tuple[Results, Tensor]:
    """Results of all samples, and the mask of those that count; the others hold anything."""
    problem = feed.problem
    rows = _allocate(problem)
    swept = _first_passes(feed, passes, rows, offsets)
    counted = _samples_counted(problem, rows.counted)
    count = rows.count = counted.sum()
    verdict.rows(rows.status, count)
    grad, bias_grad = _mean_gradient(problem, swept, count)
    mean_grad_sqnorm = sqnorm(grad.flatten(1))
    if problem.bias is not None:
        mean_grad_sqnorm = mean_grad_sqnorm + sqnorm(bias_grad)
    alignment = torch.empty_like(rows.loss)
    passes.begin_second(
        grad.to(problem.compute_dtype),
        None if problem.bias is None else bias_grad.to(problem.compute_dtype),
    )
    # Of a large head these are as much memory as the second pass takes for itself.
    swept.grad_sum = swept.bias_grad_sum = None
    del grad, bias_grad
    for number in feed.second_pass():
        chunk = feed.chunks[number]
        passes.second(chunk, rows, swept.kept[number], alignment[:, chunk])
    fields = _fields(problem, rows, alignment, swept.sequence_norms)
    results = Results(mean_grad_sqnorm=mean_grad_sqnorm, count=count, **fields)
    return results, counted


def _first_passes(feed: Feed, passes: Passes, rows: RowBuffers, offsets: Tensor | None) -> _Swept:
    problem = feed.problem
    swept = _Swept()
    for number in feed.first_pass():
        chunk = feed.chunks[number]
        part = passes.first(chunk, rows)
        if len(feed.chunks) == 1 and _too_large_to_widen(part.grad_sum):
            swept.grad_sum = part.grad_sum
        else:
            swept.grad_sum = _add_up(swept.grad_sum, part.grad_sum)
        swept.bias_grad_sum = _add_up(swept.bias_grad_sum, part.bias_grad_sum)
        if offsets is not None:
            assert part.residual is not None
            swept.sequence_norms.append(
                sequence_grad_sqnorm(problem, chunk, rows.counted[chunk], part.residual, offsets)
            )
        swept.kept.append(part.residual if passes.plan.keep_residual else None)
        del part  # its sums are as large as the heads, and the next chunk has its own
    return swept


def _mean_gradient(problem: Problem, swept: _Swept, count: Tensor) -> tuple[Tensor, Tensor]:
    """G (K, C, D) and its bias part (K, C), in the dtype and memory of the sums.

    That is float64, or float32 for the large sum of an only chunk. The bias part is of no meaning
    where there is no bias.
    """
    grad, bias_grad = swept.grad_sum, swept.bias_grad_sum
    if grad is None or bias_grad is None:  # not a single row
        grad = torch.zeros(problem.weight.shape, dtype=torch.float64, device=problem.device)
        bias_grad = torch.zeros(grad.shape[:2], dtype=torch.float64, device=problem.device)
    at_least_one = count.clamp_min(1)
    grad /= at_least_one
    if problem.bias is not None:
        bias_grad /= at_least_one
    return grad, bias_grad


def _too_large_to_widen(grad_sum: Tensor) -> bool:
    """Whether the sum of an only chunk stays float32: there is nothing to add it up with.

    Of a head of a large vocabulary every sweep over a float64 sum takes a GPU as long as a tenth
    of a matrix product.
    """
    return grad_sum.is_cuda and grad_sum.numel() >= _LARGE_HEAD


def _add_up(total: Tensor | None, part: Tensor) -> Tensor:
    return part.to(torch.float64) if total is None else total.add_(part)


def _capturing(problem: Problem) -> bool:
    return problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _chunks(rows: int, chunk_rows: int, offsets: Tensor | None) -> Iterator[slice]:
    """Row ranges of at most ``chunk_rows``; sequences stay whole."""
    if offsets is None:
        for start in range(0, rows, chunk_rows):
            yield slice(start, min(start + chunk_rows, rows))
        return
    bounds = offsets.tolist()
    start = 0
    for last, end in pairwise(bounds):
        if end - start > chunk_rows and last > start:
            yield slice(start, last)
            start = last
    if start < rows:
        yield slice(start, rows)


def _allocate(problem: Problem) -> RowBuffers:
    rows, dtype, device = problem.rows, problem.compute_dtype, problem.device
    # Each of its own: most become results, and results share no memory.
    loss = torch.empty(problem.heads, rows, dtype=dtype, device=device)
    return RowBuffers(
        loss=loss,
        residual_sqnorm=torch.empty_like(loss),
        margin=torch.empty_like(loss),
        entropy=torch.empty_like(loss),
        feature_sqnorm=torch.empty(rows, dtype=dtype, device=device),
        counted=torch.empty(rows, dtype=torch.bool, device=device),
        status=torch.full((STATUS_SLOTS,), rows, dtype=torch.int64, device=device),
    )


def _samples_counted(problem: Problem, counted: Tensor) -> Tensor:
    if problem.cu_seqlens is None:
        return counted
    return segment_sum(counted[None].double(), problem.cu_seqlens)[0] > 0


def _fields(
    problem: Problem,
    rows: RowBuffers,
    alignment: Tensor,
    sequence_norms: list[Tensor],
) -> dict[str, Tensor]:
    """Make the results of rows those of samples, by name; most in the memory of ``rows``."""
    if problem.cu_seqlens is not None:
        return _sum_sequences(problem, rows, alignment, sequence_norms, problem.cu_seqlens)
    grad_sqnorm = torch.empty_like(alignment)
    for norms, squared, features in thread_blocks(
        grad_sqnorm, rows.residual_sqnorm, rows.feature_sqnorm
    ):
        if problem.bias is not None:  # a feature more, which is 1
            features += 1
        torch.mul(squared, features, out=norms)
        squared.sqrt_()
    return {
        "alignment": alignment,
        "grad_sqnorm": grad_sqnorm,
        "loss": rows.loss,
        "el2n": rows.residual_sqnorm,
        "margin": rows.margin,
        "entropy": rows.entropy,
    }


def _sum_sequences(
    problem: Problem,
    rows: RowBuffers,
    alignment: Tensor,
    sequence_norms: list[Tensor],
    offsets: Tensor,
) -> dict[str, Tensor]:
    used = rows.counted[None]

    def total(values: Tensor) -> Tensor:
        return segment_sum(torch.where(used, values, 0).double(), offsets)

    tokens = total(torch.ones_like(alignment))
    norms = torch.cat(sequence_norms, 1) if sequence_norms else total(alignment)
    fields = {
        "alignment": total(alignment),
        "grad_sqnorm": norms,
        "loss": total(rows.loss),
        "el2n": total(rows.residual_sqnorm).sqrt(),
        "margin": total(rows.margin) / tokens,
        "entropy": total(rows.entropy) / tokens,
    }
    dtype = problem.compute_dtype
    return {name: values.to(dtype).contiguous() for name, values in fields.items()}


def _leave_out(results: Results, ignored: Tensor) -> None:
    """Give samples that do not count NaN everywhere."""
    for name in _SAMPLE_FIELDS:
        getattr(results, name).masked_fill_(ignored, float("nan"))
