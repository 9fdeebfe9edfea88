"""What the CUDA C++ kernels for few classes are handed: one job of addresses and sizes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...core.passes import RowBuffers
from ...core.problem import Problem
from . import device as gpu
from .device import Job

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Shared memory that every block leaves to the system, bytes.
_RESERVED = 1024


def exact(problem: Problem) -> bool:
    """Whether operands keep every digit of float32."""
    if problem.features.dtype == torch.float32:
        return problem.precision == "highest"
    return problem.precision != "medium"


def plan_of(problem: Problem, shared_limit: int) -> dict[str, Any]:
    """How the problem is cut; not to be written to, the same for all problems of its size."""
    return _planned(
        gpu.module().few_classes_plan,
        DTYPES[problem.features.dtype],
        exact(problem),
        problem.heads * problem.classes,
        problem.dim,
        shared_limit,
    )


@cache
def _planned(planner: Callable[..., dict[str, Any]], *size: int) -> dict[str, Any]:
    return planner(*size)


def unit_columns(features: Tensor) -> bool:
    """Whether the elements of a row are neighbours."""
    return features.stride(1) == 1 or features.shape[1] == 1


@dataclass
class Chunk:
    """Rows of a problem as the kernels take them; keeps what they borrow until they are launched.

    Both passes over the same rows may share it.
    """

    problem: Problem
    rows: slice
    plan: dict[str, Any]

    def __post_init__(self) -> None:
        features = self.problem.feature_rows(self.rows)
        self.features = features if unit_columns(features) else features.contiguous()
        self.borrowed: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start

    def slab_rows(self) -> int:
        """Rows whose gradients go to one partial sum."""
        return int(gpu.module().few_classes_slab_rows(self.count, self.plan["slab_limit"]))

    def first(self, results: Job) -> Job:
        """Job of the first pass; ``results`` of :func:`row_results` or :func:`no_results`."""
        problem, plan = self.problem, self.plan
        slab_rows, parts = self.slab_rows(), plan["parts"]
        at_once = gpu.multiprocessors(problem.device) * plan["together"]
        job = self._features_job()
        whole = problem.dim * self.features.element_size() % 16 == 0
        weights = problem.sample_weight
        job.update(
            results,
            bulk=int(job["aligned"] and whole and gpu.bulk_copies(problem.device)),
            blocks=min(-(-self.count // slab_rows), at_once // parts) * parts,
            shared_bytes=plan["first_bytes"],
            first_row=self.rows.start,
            weight=self.address(problem.weight),
            bias=self.address(problem.bias),
            labels=self.address(problem.labels[self.rows].to(torch.int64)),
            sample_weight=self.address(None if weights is None else weights[self.rows]),
            ignore_index=problem.ignore_index,
            smoothing=problem.label_smoothing,
            exclude_nonfinite=int(problem.nonfinite == "exclude"),
            slab_rows=slab_rows,
            tile_rows=plan["tile_rows"],
            stages=plan["stages"],
        )
        return job

    def second(self, row_job: Job) -> Job:
        """Job of the second pass; ``row_job`` of :func:`row_inputs`."""
        device = self.problem.device
        a_multiprocessor = gpu.shared_limit(device) + _RESERVED
        together = min(2, a_multiprocessor // (self.plan["second_bytes"] + _RESERVED))
        job = self._features_job()
        job.update(
            row_job,
            blocks=min(-(-self.count // 128), together * gpu.multiprocessors(device)),
            shared_bytes=self.plan["second_bytes"],
        )
        return job

    def _features_job(self) -> Job:
        """Fields that both passes read."""
        features, problem = self.features, self.problem
        stride = features.stride(0) * features.element_size()
        return {
            "feature": DTYPES[features.dtype],
            "exact": exact(problem),
            "tiles": self.plan["tiles"],
            "narrow": self.plan["narrow"],
            "features": features.data_ptr(),
            "row_stride": features.stride(0),
            "rows": features.shape[0],
            "dim": problem.dim,
            "heads": problem.heads,
            "classes": problem.classes,
            "aligned": int(features.data_ptr() % 16 == 0 and stride % 16 == 0),
        }

    def address(self, tensor: Tensor | None) -> int:
        """Address of a tensor, or of a copy of it whose elements are neighbours; 0 for None."""
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self.borrowed.append(tensor)
        return tensor.data_ptr()


def row_results(
    out: RowBuffers, rows: slice, residual: Tensor | None, partial: Tensor, bias_partial: Tensor
) -> Job:
    """Where the first pass writes the results of rows and the sums of their gradients."""
    return {
        "loss": _row_address(out.loss, rows),
        "residual_sqnorm": _row_address(out.residual_sqnorm, rows),
        "margin": _row_address(out.margin, rows),
        "entropy": _row_address(out.entropy, rows),
        "stat_stride": out.loss.stride(0),
        "feature_sqnorm": _row_address(out.feature_sqnorm, rows),
        "counted": _row_address(out.counted, rows),
        "status": out.status.data_ptr(),
        "residual": 0 if residual is None else residual.data_ptr(),
        "partial": partial.data_ptr(),
        "bias_partial": bias_partial.data_ptr(),
    }


def no_results(residual: Tensor) -> Job:
    """For a first pass that writes nothing but residuals."""
    return {**dict.fromkeys(_RESULTS, 0), "residual": residual.data_ptr()}


_RESULTS = (
    *("loss", "residual_sqnorm", "margin", "entropy", "stat_stride", "feature_sqnorm"),
    *("counted", "status", "partial", "bias_partial"),
)


def row_inputs(out: RowBuffers, rows: slice, residual: Tensor, alignment: Tensor) -> Job:
    """Name what the second pass reads and writes of rows, less the mean gradient."""
    return {
        "residual": residual.data_ptr(),
        "feature_sqnorm": _row_address(out.feature_sqnorm, rows),
        "counted": _row_address(out.counted, rows),
        "alignment": alignment.data_ptr(),
        "alignment_stride": alignment.stride(0),
        "count": 0,
        "behind": 0,
    }


def partial_sums(problem: Problem, slabs: int) -> tuple[Tensor, Tensor]:
    """Memory for the gradient sums of slabs, and for those of the bias."""
    width = problem.heads * problem.classes
    columns = gpu.module().few_classes_partial_columns(problem.dim)
    return gpu.empty(problem, slabs, width, columns), gpu.empty(problem, slabs, width)


def reduce_job(
    partial: Tensor, bias_partial: Tensor, grad_sum: Tensor, bias_grad_sum: Tensor
) -> Job:
    """Job of the sum over slabs; (K, C, D) and (K, C) of float64."""
    heads, classes, dim = grad_sum.shape
    return {
        "partial": partial.data_ptr(),
        "bias_partial": bias_partial.data_ptr(),
        "slabs": partial.shape[0],
        "classes": heads * classes,
        "dim": dim,
        "grad_sum": grad_sum.data_ptr(),
        "bias_grad_sum": bias_grad_sum.data_ptr(),
        # What only a job of one chunk asks for.
        **{"mean": 0, "bias_mean": 0, "counted": 0, "rows": 0, "counts": 0},
    }


def _row_address(tensor: Tensor, rows: slice) -> int:
    """Address of the first of these rows in a row of elements, or in the first of several."""
    return tensor.data_ptr() + rows.start * tensor.stride(-1) * tensor.element_size()
