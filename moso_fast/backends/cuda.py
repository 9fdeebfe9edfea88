"""CUDA C++ kernels for few classes (csrc/cuda): features read once a pass, three launches.

Their very source also runs without a GPU, in an emulator of a thread block against float64
(tests/test_cuda_*.py), and the compiler's report shows no spills. They were measured on an H200;
``auto`` picks them where they were ahead there, elsewhere ask with ``backend="cuda"``.

Operands are sums of bfloat16 terms, accumulators float32. At "medium", 16-bit features meet one
term of weights and residuals; float32 features are two terms at "high" and "medium" and three at
"highest", which keeps every digit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._native import load_native
from ..engine import FirstPass, RowBuffers
from ..problem import Problem
from .base import Availability, Backend

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Slabs of one launch; csrc/cuda/index.cuh cuts shorter ones evenly.
_SLABS = 528
# Rows at a time where a strided feature matrix must be copied.
_COPIED_ROWS = 65536
# Shared memory that every block leaves to the system, bytes.
_RESERVED = 1024


class CudaBackend(Backend):
    """One kernel a pass and one for the sum between them; cross-entropy with class ids."""

    name = "cuda"
    streams = True

    def availability(self) -> Availability:
        """Whether ``moso_fast._cuda`` is there and has a device."""
        native = load_native("_cuda")
        if native.module is None:
            return Availability(False, native.reason, native.how)
        if not torch.cuda.is_available():
            return Availability(
                False,
                f"moso_fast._cuda is built but PyTorch {torch.__version__} finds no CUDA device",
                "run on a machine with an NVIDIA GPU and a PyTorch built for CUDA",
            )
        return Availability(True, "CUDA C++ kernels for few classes")

    def supports(self, problem: Problem) -> str | None:
        """Cross-entropy with class ids, few classes, on a GPU the kernels are compiled for."""
        if problem.device.type != "cuda":
            return f"features and heads are on {problem.device}; CUDA kernels need a GPU"
        capability = _capability(_index(problem.device))
        built = str(_module().architectures)
        if not _compiled_for(capability, built):
            name = ".".join(map(str, capability))
            return f"the kernels are not compiled for compute capability {name}: {built}"
        return _unknown(problem) or _too_large(problem, _shared_limit(problem.device))

    def not_by_default(self, problem: Problem) -> str | None:
        """Where no measurement says that these kernels are ahead."""
        most = 16 if problem.features.dtype == torch.float32 else 32
        if problem.heads * problem.classes > most:
            return f"measured ahead on an H200 only for up to {most} classes of this dtype"
        if _capability(_index(problem.device))[0] != 9:
            return "measured on an H200 only, compute capability 9.0"
        return None

    def chunk_rows(self, problem: Problem) -> int:
        """Rows whose slabs are as long as the rounding of their sums allows."""
        plan = _plan(problem, _shared_limit(problem.device))
        rows = _SLABS * int(plan["slab_limit"])
        return rows if _unit_columns(problem.features) else min(rows, _COPIED_ROWS)

    def describe(self, problem: Problem) -> str:
        """Tile of the first pass, operand terms and passes over the features."""
        plan = _plan(problem, _shared_limit(problem.device))
        blocks = ", two blocks a tile" if plan["parts"] == 2 else ""
        if plan["together"] == 2:
            blocks = ", two blocks a multiprocessor"
        digits = "all" if _exact(problem) else "leading"
        return (
            f"cuda: few classes, {problem.heads * problem.classes} of {16 * plan['tiles']}, tiles "
            f"of {plan['tile_rows']} rows, {plan['stages']} staged{blocks}, features read once a "
            f"pass, {digits} digits of float32 operands"
        )

    def first_pass(
        self, problem: Problem, rows: slice, out: RowBuffers, keep_residual: bool
    ) -> FirstPass:
        """See :class:`moso_fast.backends.base.Backend`."""
        width, dim = problem.heads * problem.classes, problem.dim
        count = rows.stop - rows.start
        residual = _empty(problem, count, problem.heads, problem.classes) if keep_residual else None
        grad_sum = _empty(problem, *problem.weight.shape, dtype=torch.float64)
        bias_grad_sum = _empty(problem, *problem.weight.shape[:2], dtype=torch.float64)
        if count == 0:
            return FirstPass(grad_sum.zero_(), bias_grad_sum.zero_(), residual)
        module = _module()
        plan = _plan(problem, _shared_limit(problem.device))
        slab_rows = module.few_classes_slab_rows(count, plan["slab_limit"])
        slabs = -(-count // slab_rows)
        columns = module.few_classes_partial_columns(dim)
        partial = _empty(problem, slabs, width, columns)
        bias_partial = _empty(problem, slabs, width)
        statistics = {
            "loss": _row_address(out.loss, rows),
            "residual_sqnorm": _row_address(out.residual_sqnorm, rows),
            "margin": _row_address(out.margin, rows),
            "entropy": _row_address(out.entropy, rows),
            "stat_stride": out.loss.stride(0),
            "feature_sqnorm": _row_address(out.feature_sqnorm, rows),
            "counted": _row_address(out.counted, rows),
            "status": out.status.data_ptr(),
            "partial": partial.data_ptr(),
            "bias_partial": bias_partial.data_ptr(),
        }
        _first(problem, rows, plan, residual, slab_rows, statistics)
        reduce = {
            "partial": partial.data_ptr(),
            "bias_partial": bias_partial.data_ptr(),
            "slabs": slabs,
            "classes": width,
            "dim": dim,
            "grad_sum": grad_sum.data_ptr(),
            "bias_grad_sum": bias_grad_sum.data_ptr(),
        }
        _launch(problem, module.few_classes_reduce, reduce)
        return FirstPass(grad_sum, bias_grad_sum, residual)

    def second_pass(
        self,
        problem: Problem,
        rows: slice,
        out: RowBuffers,
        mean_grad: Tensor,
        mean_bias_grad: Tensor | None,
        residual: Tensor | None,
        alignment: Tensor,
    ) -> None:
        """See :class:`moso_fast.backends.base.Backend`."""
        count = rows.stop - rows.start
        if count == 0:
            return
        plan = _plan(problem, _shared_limit(problem.device))
        if residual is None:
            residual = _empty(problem, count, problem.heads, problem.classes)
            slab_rows = _module().few_classes_slab_rows(count, plan["slab_limit"])
            _first(problem, rows, plan, residual, slab_rows, {})
        features = _unit_rows(problem, rows)
        mean_grad = mean_grad.contiguous()
        if mean_bias_grad is not None:
            mean_bias_grad = mean_bias_grad.contiguous()
        # The self-term of a row; the gradient of a sequence is not a row's.
        counted = None if problem.cu_seqlens is not None else out.number_counted()
        a_multiprocessor = _shared_limit(problem.device) + _RESERVED
        together = min(2, a_multiprocessor // (plan["second_bytes"] + _RESERVED))
        blocks = min(-(-count // 128), together * _multiprocessors(problem.device))
        job = _features_job(problem, features, plan)
        job.update(
            blocks=blocks,
            shared_bytes=plan["second_bytes"],
            residual=residual.data_ptr(),
            mean_grad=mean_grad.data_ptr(),
            mean_bias_grad=_address(mean_bias_grad),
            feature_sqnorm=_row_address(out.feature_sqnorm, rows),
            counted=_row_address(out.counted, rows),
            count=_address(counted),
            alignment=alignment.data_ptr(),
            alignment_stride=alignment.stride(0),
        )
        _launch(problem, _module().few_classes_second, job)


def _module() -> ModuleType:
    module = load_native("_cuda").module
    assert module is not None, "chosen only where it is available"
    return module


@cache
def _compiled_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether binary code of ``architectures`` ("sm_80 sm_90a compute_90") runs on a device.

    Code runs on its own and later minor versions of a major one, with an "a" on its own only. PTX
    for later devices is not counted: nobody has looked at the registers that they would take.
    """
    for major, minor, exact in re.findall(r"sm_(\d+)(\d)(a?)", architectures):
        built = int(major), int(minor)
        if capability == built or (not exact and capability[0] == built[0] and capability > built):
            return True
    return False


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _limits(device: int) -> tuple[int, int]:
    shared, multiprocessors = _module().device_limits(device)
    return int(shared), int(multiprocessors)


def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    return _limits(_index(device))[0]


def _multiprocessors(device: torch.device) -> int:
    return _limits(_index(device))[1]


def _bulk_copies(device: torch.device) -> bool:
    return _capability(_index(device)) >= (9, 0)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _launch(problem: Problem, function: Callable[[Any], None], job: dict[str, Any]) -> None:
    """Launch on the current stream of the features' device, whatever the current device."""
    device = _index(problem.device)
    job["device"], job["stream"] = device, _stream(problem.device)
    if device == torch.cuda.current_device():
        function(job)
        return
    with torch.cuda.device(device):
        function(job)


def _unknown(problem: Problem) -> str | None:
    """Why these kernels cannot take this kind of problem, whatever its size; or None."""
    if problem.loss != "cross_entropy" or problem.soft_labels:
        return "the CUDA C++ kernels know cross-entropy with class ids only"
    if problem.features.dtype not in _DTYPES:
        return "float64 features need float64 accumulators, which only torch has"
    return None


def _too_large(problem: Problem, shared_limit: int) -> str | None:
    plan = _plan(problem, shared_limit)
    return None if plan["ok"] else str(plan["reason"])


def _exact(problem: Problem) -> bool:
    """Whether operands keep every digit of float32."""
    if problem.features.dtype == torch.float32:
        return problem.precision == "highest"
    return problem.precision != "medium"


def _plan(problem: Problem, shared_limit: int) -> dict[str, Any]:
    """How the problem is cut; not to be written to, the same for all problems of its size."""
    return _plan_of(
        _module().few_classes_plan,
        _DTYPES[problem.features.dtype],
        _exact(problem),
        problem.heads * problem.classes,
        problem.dim,
        shared_limit,
    )


@cache
def _plan_of(planner: Callable[..., dict[str, Any]], *size: int) -> dict[str, Any]:
    return planner(*size)


def _unit_columns(features: Tensor) -> bool:
    return features.stride(1) == 1 or features.shape[1] == 1


def _unit_rows(problem: Problem, rows: slice) -> Tensor:
    features = problem.feature_rows(rows)
    return features if _unit_columns(features) else features.contiguous()


def _empty(problem: Problem, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=problem.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_address(tensor: Tensor, rows: slice) -> int:
    """Address of the first of these rows in a row of numbers, or in the first of several."""
    return tensor.data_ptr() + rows.start * tensor.stride(-1) * tensor.element_size()


def _features_job(problem: Problem, features: Tensor, plan: dict[str, Any]) -> dict[str, Any]:
    """Fields that both passes read."""
    stride = features.stride(0) * features.element_size()
    return {
        "feature": _DTYPES[features.dtype],
        "exact": _exact(problem),
        "tiles": plan["tiles"],
        "narrow": plan["narrow"],
        "features": features.data_ptr(),
        "row_stride": features.stride(0),
        "rows": features.shape[0],
        "dim": problem.dim,
        "heads": problem.heads,
        "classes": problem.classes,
        "aligned": int(features.data_ptr() % 16 == 0 and stride % 16 == 0),
    }


_NO_STATISTICS = dict.fromkeys(
    (
        *("loss", "residual_sqnorm", "margin", "entropy", "stat_stride", "feature_sqnorm"),
        *("counted", "status", "partial", "bias_partial"),
    ),
    0,
)


def _first(
    problem: Problem,
    rows: slice,
    plan: dict[str, Any],
    residual: Tensor | None,
    slab_rows: int,
    statistics: dict[str, int],
) -> None:
    """Launch the first pass; without ``statistics`` it writes nothing but residuals."""
    features = _unit_rows(problem, rows)
    labels = problem.labels[rows].to(torch.int64).contiguous()
    weight = problem.weight.contiguous()
    bias = None if problem.bias is None else problem.bias.contiguous()
    sample_weight = problem.sample_weight
    if sample_weight is not None:
        sample_weight = sample_weight[rows].contiguous()
    slabs, parts = -(-features.shape[0] // slab_rows), plan["parts"]
    at_once = _multiprocessors(problem.device) * plan["together"]
    job = _features_job(problem, features, plan)
    whole = problem.dim * features.element_size() % 16 == 0
    job.update(
        statistics or _NO_STATISTICS,
        bulk=int(job["aligned"] and whole and _bulk_copies(problem.device)),
        blocks=min(slabs, at_once // parts) * parts,
        shared_bytes=plan["first_bytes"],
        first_row=rows.start,
        weight=weight.data_ptr(),
        bias=_address(bias),
        labels=labels.data_ptr(),
        sample_weight=_address(sample_weight),
        ignore_index=problem.ignore_index,
        smoothing=problem.label_smoothing,
        exclude_nonfinite=int(problem.nonfinite == "exclude"),
        residual=_address(residual),
        slab_rows=slab_rows,
        tile_rows=plan["tile_rows"],
        stages=plan["stages"],
    )
    _launch(problem, _module().few_classes_first, job)
