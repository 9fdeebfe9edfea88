"""A job of one chunk by CUDA C++ kernels: launched in one go, its end (closing.h) included.

What a host does between launches counts where a job is small: PyTorch's operations for the mean
gradient, the results of rows, the self-check and the scores are some twenty, of 9 us each on the
host of an H200, beside kernels of 60 us for 50,000 rows and ten classes.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.formulas import FORMULAS
from ...core.passes import Results, Whole
from ...core.problem import Problem
from ...core.status import STATUS_SLOTS
from . import device as gpu
from . import jobs

# Rows that a thread of the last sweep has at least, where that leaves it blocks to work with; and
# how many blocks of it there are at most, so that their sums are quickly added up.
_ROWS_A_THREAD, _MOST_BLOCKS = 4, 512
# Between arrays in one piece of memory: what the widest loads and copies want.
_ALIGNMENT = 128


def run_whole(
    problem: Problem, plan: dict[str, Any], formula: str | None, scale: float, *, read: bool
) -> Whole:
    """Launch everything for ``problem``, whose rows are one chunk.

    ``read``: wait for the facts, which then lie in main memory; else nothing waits, and they are
    on the device.
    """
    module, chunk = gpu.module(), jobs.Chunk(problem, slice(0, problem.rows), plan)
    (heads, classes, dim), rows = problem.weight.shape, problem.rows
    width, slabs = heads * classes, -(-rows // chunk.slab_rows())
    blocks = -(-rows // (module.closing_threads * _ROWS_A_THREAD))
    blocks = max(1, min(blocks, _MOST_BLOCKS // heads))
    loss = gpu.empty(problem, heads, rows)
    alignment, grad_sqnorm, el2n, margin, entropy = (torch.empty_like(loss) for _ in range(5))
    results = Results(
        alignment=alignment,
        grad_sqnorm=grad_sqnorm,
        loss=loss,
        el2n=el2n,
        margin=margin,
        entropy=entropy,
        mean_grad_sqnorm=gpu.empty(problem, heads, dtype=torch.float64),
        count=torch.empty((), dtype=torch.int64, device=problem.device),
        score=None if formula is None else torch.empty_like(loss),
    )
    facts = gpu.facts(problem, STATUS_SLOTS + 1 + heads * module.closing_head_facts, read)
    counted = torch.empty(rows, dtype=torch.bool, device=problem.device)
    # Every array that is gone with this call lies in one piece of memory.
    scratch, at = gpu.carve(
        problem,
        _ALIGNMENT,
        residual=4 * rows * width,
        feature_sqnorm=4 * rows,
        partial=4 * slabs * width * module.few_classes_partial_columns(dim),
        bias_partial=4 * slabs * width,
        grad_sum=8 * width * dim,
        bias_grad_sum=8 * width,
        mean=4 * width * dim,
        bias_mean=4 * width,
        counts=8 * module.closing_count_blocks,
        sums=8 * heads * blocks * module.closing_row_sums,
        status=8 * STATUS_SLOTS,
    )
    at.update(
        loss=loss.data_ptr(),
        margin=margin.data_ptr(),
        entropy=entropy.data_ptr(),
        alignment=alignment.data_ptr(),
        grad_sqnorm=grad_sqnorm.data_ptr(),
        residual_sqnorm=el2n.data_ptr(),  # until its root is taken
        mean_grad_sqnorm=results.mean_grad_sqnorm.data_ptr(),
        count=results.count.data_ptr(),
        counted=counted.data_ptr(),
        facts=facts.data_ptr(),
    )
    first = chunk.first({**at, "stat_stride": rows})
    shared = {"slabs": slabs, "classes": width, "dim": dim, "rows": rows}
    second = {**at, "alignment_stride": rows, "count": 0, "behind": rows, "mean_grad": at["mean"]}
    second["mean_bias_grad"] = 0 if problem.bias is None else at["bias_mean"]
    second = chunk.second(second)
    finish = {
        **at,
        "rows": rows,
        "heads": heads,
        "blocks_a_head": blocks,
        "sample_weight": first["sample_weight"],
        "squared_one": 0.0 if problem.bias is None else 1.0,
        "rescale": 1,
    }
    judge = {**at, "heads": heads, "blocks_a_head": blocks, "classes": classes, "dim": dim}
    judge["weight"], judge["bias"] = first["weight"], first["bias"]
    job = {
        "first": first,
        "reduce": {**at, **shared},
        "second": second,
        "finish": finish,
        "judge": judge,
        "score": None,
        "wait": read,
    }
    if results.score is not None:
        job["score"] = {
            **at,
            "rows": rows,
            "heads": heads,
            "formula": FORMULAS.index(formula),
            "scale": float(scale),
            "score": results.score.data_ptr(),
        }
    gpu.launch(problem.device, module.few_classes_whole, job, first, second)
    del scratch  # had to live until the launch
    return Whole(results, counted, facts)
