"""A job of one chunk by CUDA C++ kernels: launched in one go, its end (closing.h) included.

What a host does between launches counts where a job is small: PyTorch's operations for the mean
gradient, the results of rows, the self-check and the scores are some twenty, of 9 us each on the
host of an H200, beside kernels of 60 us for 50,000 rows and ten classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine import Results, RowBuffers, Whole
from ..formulas import FORMULAS
from ..problem import STATUS_SLOTS, Problem
from . import _cuda_device as gpu
from . import _cuda_jobs as jobs
from ._cuda_device import Job

# Rows that a thread of the last sweep has at least, where that leaves it blocks to work with; and
# how many blocks of it there are at most, so that their sums are quickly added up.
_ROWS_A_THREAD, _MOST_BLOCKS = 4, 512


def run_whole(problem: Problem, plan: dict[str, Any]) -> Whole:
    """Launch everything for ``problem``, whose rows are one chunk, and wait for nothing."""
    module, chunk = gpu.module(), jobs.Chunk(problem, slice(0, problem.rows), plan)
    heads, classes, dim = problem.weight.shape
    out = _row_buffers(problem)
    alignment, grad_sqnorm = torch.empty_like(out.loss), torch.empty_like(out.loss)
    residual = gpu.empty(problem, problem.rows, heads, classes)
    partial, bias_partial = jobs.partial_sums(problem, -(-problem.rows // chunk.slab_rows()))
    grad_sum, bias_grad_sum = _gradient(problem, torch.float64)
    mean, bias_mean = _gradient(problem, torch.float32)
    counts = gpu.empty(problem, module.closing_count_blocks, dtype=torch.float64)  # 8 bytes each
    blocks = -(-problem.rows // (module.closing_threads * _ROWS_A_THREAD))
    blocks = max(1, min(blocks, _MOST_BLOCKS // heads))
    sums = gpu.empty(problem, heads, blocks, module.closing_row_sums, dtype=torch.float64)
    numbers = STATUS_SLOTS + 1 + heads * module.closing_head_facts
    results = Results(
        alignment=alignment,
        grad_sqnorm=grad_sqnorm,
        loss=out.loss,
        el2n=out.residual_sqnorm,
        margin=out.margin,
        entropy=out.entropy,
        mean_grad_sqnorm=gpu.empty(problem, heads, dtype=torch.float64),
        count=torch.empty((), dtype=torch.int64, device=problem.device),
        status=out.status,
    )
    whole = Whole(results, out.counted, gpu.empty(problem, numbers, dtype=torch.float64))

    rows = {"counted": out.counted.data_ptr(), "counts": counts.data_ptr(), "rows": problem.rows}
    first = chunk.first(residual, jobs.row_results(out, chunk.rows, partial, bias_partial))
    reduce = jobs.reduce_job(partial, bias_partial, grad_sum, bias_grad_sum)
    reduce.update(rows, mean=mean.data_ptr(), bias_mean=bias_mean.data_ptr())
    of_bias = None if problem.bias is None else bias_mean
    second = chunk.second(out, residual, mean, of_bias, alignment)
    second["behind"] = problem.rows  # the mean is that of all rows until the end
    by_block = {"heads": heads, "blocks_a_head": blocks, "sums": sums.data_ptr()}
    finish = {**_finish(problem, out, alignment, grad_sqnorm), **rows, **by_block}
    finish["sample_weight"] = first["sample_weight"]
    judge = {
        **by_block,
        "classes": classes,
        "dim": dim,
        "grad_sum": grad_sum.data_ptr(),
        "bias_grad_sum": bias_grad_sum.data_ptr(),
        "weight": first["weight"],
        "bias": first["bias"],
        "counts": counts.data_ptr(),
        "status": out.status.data_ptr(),
        "facts": whole.facts.data_ptr(),
        "mean_grad_sqnorm": results.mean_grad_sqnorm.data_ptr(),
        "count": results.count.data_ptr(),
    }
    parts = {"first": first, "reduce": reduce, "second": second, "finish": finish, "judge": judge}
    gpu.launch(problem.device, module.few_classes_whole, parts, first, second)
    return whole


def _finish(problem: Problem, out: RowBuffers, alignment: Tensor, grad_sqnorm: Tensor) -> Job:
    return {
        "alignment": alignment.data_ptr(),
        "residual_sqnorm": out.residual_sqnorm.data_ptr(),
        "grad_sqnorm": grad_sqnorm.data_ptr(),
        "loss": out.loss.data_ptr(),
        "margin": out.margin.data_ptr(),
        "entropy": out.entropy.data_ptr(),
        "feature_sqnorm": out.feature_sqnorm.data_ptr(),
        "squared_one": 0.0 if problem.bias is None else 1.0,
        "rescale": 1,
    }


def _row_buffers(problem: Problem) -> RowBuffers:
    """As the engine allocates them; the first kernel makes the status word what it should be."""
    device = problem.device
    loss = gpu.empty(problem, problem.heads, problem.rows)
    return RowBuffers(
        loss=loss,
        residual_sqnorm=torch.empty_like(loss),
        margin=torch.empty_like(loss),
        entropy=torch.empty_like(loss),
        feature_sqnorm=gpu.empty(problem, problem.rows),
        counted=torch.empty(problem.rows, dtype=torch.bool, device=device),
        status=torch.empty(STATUS_SLOTS, dtype=torch.int64, device=device),
    )


def _gradient(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for (K, C, D) and (K, C) numbers."""
    heads, classes, dim = problem.weight.shape
    return (
        gpu.empty(problem, heads, classes, dim, dtype=dtype),
        gpu.empty(problem, heads, classes, dtype=dtype),
    )


def score(
    formula: str,
    alignment: Tensor,
    grad_sqnorm: Tensor,
    mean_grad_sqnorm: Tensor,
    count: Tensor,
    scale: float,
) -> Tensor:
    """Do what :func:`moso_fast.formulas.score` does, for float32 results of these kernels."""
    result = torch.empty_like(alignment)
    job = {
        "alignment": alignment.data_ptr(),
        "grad_sqnorm": grad_sqnorm.data_ptr(),
        "mean_grad_sqnorm": mean_grad_sqnorm.data_ptr(),
        "count": count.data_ptr(),
        "rows": alignment.shape[-1],
        "heads": mean_grad_sqnorm.shape[0],
        "formula": FORMULAS.index(formula),
        "scale": float(scale),
        "score": result.data_ptr(),
    }
    gpu.launch(alignment.device, gpu.module().closing_score, job)
    return result
