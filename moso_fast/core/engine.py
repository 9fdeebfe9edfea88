"""The two passes over chunks of rows, the same for every backend.

First pass: row statistics and the sum of the gradients; then the mean gradient G in float64, in
a fixed order; second pass: the alignment of every row with G. Residuals of the first pass are
kept where they fit the memory budget, otherwise the second pass computes them again. What is
checked on the way, and when the host waits for it, is in ``verdict.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .problem import STATUS_SLOTS, Problem, sequence_offsets
from .sequences import segment_sum, sequence_grad_sqnorm
from .streaming import CHUNK_BYTES, CudaLane, Feed, StreamedFeed
from .sums import sqnorm, thread_blocks
from .verdict import Reading, Verdict

if TYPE_CHECKING:
    from ..backends import Backend

_CPU_RESIDUAL_SHARE = 0.25
_CUDA_RESIDUAL_SHARE = 0.5

# Residuals that a GPU keeps whatever is free, so that short jobs need not wait for the driver to
# say what is. No more than most backends take to work on one chunk (512 MiB to 2 GiB), and an
# eighth of the smallest GPUs that the kernels are proven for (4 GiB).
_CUDA_ALWAYS_KEPT = 2**29

# Numbers of a head whose gradient sum a GPU widens to float64 only to add chunks up.
_LARGE_HEAD = 2**24

# What residual_budget found last, by device.
_last_budget: dict[torch.device, int] = {}

# Of the free memory of a GPU, what residuals and features from main memory may take together; and
# what else a chunk needs.
_CUDA_KEPT_SHARE = 0.8
_CUDA_WORKING_BYTES = 3 * 2**30


@dataclass
class RowBuffers:
    """What the first pass writes for every row; (K, rows) unless said otherwise."""

    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    feature_sqnorm: Tensor  # (rows,)
    counted: Tensor  # (rows,) bool
    status: Tensor  # (STATUS_SLOTS,) int64, see problem.py
    count: Tensor | None = None  # () int64, samples that count: known from the second pass on
    scratch: dict[str, Any] = field(default_factory=dict)  # for the backend's second pass alone

    def number_counted(self) -> Tensor:
        """Rows that count, () int64 on the device; of single rows, not of sequences."""
        return self.counted.sum() if self.count is None else self.count


@dataclass
class FirstPass:
    """Sums over the rows of one chunk, and their residuals (n, K, C) if asked for."""

    grad_sum: Tensor  # (K, C, D), the engine's own from here on
    bias_grad_sum: Tensor  # (K, C)
    residual: Tensor | None


@dataclass(frozen=True)
class Plan:
    """How a problem is cut: rows a chunk, and whether residuals are kept between the passes.

    ``budget_bytes`` of residuals may stay, none where the caller fixed the chunk; less than
    :func:`residual_budget` where that is enough. ``resident_bytes`` of features that come from
    main memory may stay on the device.
    """

    chunk_rows: int
    keep_residual: bool
    residual_bytes: int
    budget_bytes: int
    resident_bytes: int = 0


@dataclass
class Results:
    """Per-sample results, (K, samples); NaN where a sample does not count."""

    alignment: Tensor
    grad_sqnorm: Tensor
    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    mean_grad_sqnorm: Tensor  # (K,) float64
    count: Tensor  # () int64
    score: Tensor | None = None  # (K, samples), from backends that do that as well


@dataclass(frozen=True)
class Whole:
    """All that a backend which does a job in one go leaves behind."""

    results: Results  # NaN where a sample does not count
    counted: Tensor  # (samples,) bool
    facts: Tensor  # float64: what :meth:`moso_fast.core.verdict.Verdict.whole` reads


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


def make_plan(problem: Problem, backend: Backend, chunk_size: int | None) -> Plan:
    """Choose the rows of a chunk and whether residuals are kept.

    ``chunk_size`` (rows) fixes the chunk and has the second pass recompute residuals, so that
    memory does not grow with the number of rows.
    """
    residual_bytes = _residual_bytes(problem)
    check_chunk_size(chunk_size)
    if chunk_size is not None:
        return Plan(chunk_size, False, residual_bytes, 0)
    budget = _enough(problem.device, residual_bytes)
    rows, keep = backend.chunk_rows(problem), residual_bytes <= budget
    if not problem.streamed:
        return Plan(rows, keep, residual_bytes, budget)
    rows = max(1, min(rows, CHUNK_BYTES // (problem.dim * problem.features.dtype.itemsize)))
    resident = _resident_budget(problem.device, residual_bytes if keep else 0)
    return Plan(rows, keep, residual_bytes, budget, resident)


def residuals_fit(problem: Problem) -> bool:
    """Whether the residuals of all rows may stay between the passes."""
    needed = _residual_bytes(problem)
    return needed <= _enough(problem.device, needed)


def _residual_bytes(problem: Problem) -> int:
    return problem.rows * problem.heads * problem.classes * problem.compute_dtype.itemsize


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError unless ``chunk_size`` is None or a positive int."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size!r}")


def _enough(device: torch.device, needed: int) -> int:
    """:func:`residual_budget`, or what is always kept where ``needed`` bytes are no more."""
    if device.type == "cuda" and needed <= _CUDA_ALWAYS_KEPT:
        return _CUDA_ALWAYS_KEPT
    return residual_budget(device)


def residual_budget(device: torch.device) -> int:
    """Bytes of residuals that may stay between the passes on this device."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured_budget(device)
        budget = max(_CUDA_ALWAYS_KEPT, int(_CUDA_RESIDUAL_SHARE * _free_bytes(device)))
        _last_budget[device] = budget
        return budget
    return _cpu_budget()


@cache
def _cpu_budget() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(_CPU_RESIDUAL_SHARE * physical)
    return 2**30


def _captured_budget(device: torch.device) -> int:
    """Return the budget under CUDA graph capture, where the driver may not be asked what is free.

    A captured call must not be the first to launch a kernel: it would be compiled and loaded
    within the capture. So it is planned like the call that came before it to warm up, by what that
    one was told, unless PyTorch has since taken memory that this one would need: a graph has
    memory of its own and cannot use what others have given back. Without such a call all that
    PyTorch has not taken is as good as free.
    """
    left = torch.cuda.get_device_properties(device).total_memory
    left -= torch.cuda.memory_reserved(device)  # PyTorch's own books: the driver is not asked
    budget = int(_CUDA_RESIDUAL_SHARE * left)
    return max(_CUDA_ALWAYS_KEPT, min(budget, _last_budget.get(device, budget)))


def _free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that PyTorch holds from earlier work and can give back.

    Without the latter a second call would find what the first one used gone, and plan otherwise.
    """
    held = torch.cuda.memory_stats(device)  # empty before the first allocation

    def current(kind: str) -> int:
        return held.get(f"{kind}_bytes.all.current", 0)

    idle = current("reserved") - current("active") - current("inactive_split")
    return torch.cuda.mem_get_info(device)[0] + max(0, idle)


def _resident_budget(device: torch.device, residual_bytes: int) -> int:
    """Bytes of streamed features that may stay on a GPU beside residuals and a chunk's work."""
    free = _free_bytes(device)
    return max(0, int(_CUDA_KEPT_SHARE * free) - residual_bytes - _CUDA_WORKING_BYTES)


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
    plan = make_plan(problem, backend, chunk_size)
    # The host cuts the rows by these: a read of their own, before anything is launched.
    offsets = None if problem.cu_seqlens is None else sequence_offsets(problem)
    chunks = list(_chunks(problem.rows, plan.chunk_rows, offsets))
    verdict = Verdict(problem, formula, reading)
    if len(chunks) == 1 and plan.keep_residual and offsets is None and not problem.streamed:
        whole = backend.whole(problem, formula, scale, read=reading is not Reading.NEVER)
        if whole is not None:
            verdict.whole(whole)
            return whole.results
    verdict.parameters()
    with closing(make_feed(problem, chunks, plan)) as feed:
        results, counted = _two_passes(feed, backend, plan, offsets, verdict)
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
    feed: Feed, backend: Backend, plan: Plan, offsets: Tensor | None, verdict: Verdict
) -> tuple[Results, Tensor]:
    """Results of all samples, and the mask of those that count; the others hold anything."""
    problem = feed.problem
    rows = _allocate(problem)
    swept = _first_passes(feed, backend, plan, rows, offsets)
    counted = _samples_counted(problem, rows.counted)
    count = rows.count = counted.sum()
    verdict.rows(rows.status, count)
    grad, bias_grad = _mean_gradient(problem, swept, count)
    mean_grad_sqnorm = sqnorm(grad.flatten(1))
    if problem.bias is not None:
        mean_grad_sqnorm = mean_grad_sqnorm + sqnorm(bias_grad)
    alignment = torch.empty_like(rows.loss)
    mean_grad = grad.to(problem.compute_dtype)
    mean_bias_grad = None if problem.bias is None else bias_grad.to(problem.compute_dtype)
    for number in feed.second_pass():
        chunk, residual = feed.chunks[number], swept.kept[number]
        backend.second_pass(
            problem, chunk, rows, mean_grad, mean_bias_grad, residual, alignment[:, chunk]
        )
    fields = _fields(problem, rows, alignment, swept.sequence_norms)
    results = Results(mean_grad_sqnorm=mean_grad_sqnorm, count=count, **fields)
    return results, counted


def _first_passes(
    feed: Feed, backend: Backend, plan: Plan, rows: RowBuffers, offsets: Tensor | None
) -> _Swept:
    problem = feed.problem
    swept = _Swept()
    for number in feed.first_pass():
        chunk = feed.chunks[number]
        keep = plan.keep_residual or offsets is not None
        part = backend.first_pass(problem, chunk, rows, keep)
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
        swept.kept.append(part.residual if plan.keep_residual else None)
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
