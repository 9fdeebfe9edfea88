"""CUDA C++ kernels for few classes (csrc/cuda): features read once a pass, three launches.

Their very source also runs without a GPU, in an emulator of a thread block against float64
(tests/native/cuda), and the compiler's report shows no spills. They were measured on an H200;
``auto`` picks them where they were ahead there, elsewhere ask with ``backend="cuda"``.

Operands are sums of bfloat16 terms, accumulators float32. At "medium", 16-bit features meet one
term of weights and residuals; float32 features are two terms at "high" and "medium" and three at
"highest", which keeps every digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.passes import FirstPass, Passes, Plan, RowBuffers, Whole
from ...core.problem import Problem
from ...util.native import load_native
from ..base import Availability, Backend
from . import device as gpu
from . import jobs
from .whole import run_whole

# Slabs of one launch; csrc/cuda/index.cuh cuts shorter ones evenly.
_SLABS = 528
# Up to here one call for the whole job makes up for kernels that are slower with many classes:
# 50,000 rows of 100 classes, bfloat16, take 1.0 ms where Triton takes 2.2, 200,000 rows 2.3 each.
_FEW_ROWS = 2**17
# Rows at a time where a strided feature matrix must be copied.
_COPIED_ROWS = 65536


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
        capability = gpu.capability(gpu.index(problem.device))
        built = str(gpu.module().architectures)
        if not gpu.compiled_for(capability, built):
            name = ".".join(map(str, capability))
            return f"the kernels are not compiled for compute capability {name}: {built}"
        return _unknown(problem) or _too_large(problem, gpu.shared_limit(problem.device))

    def not_by_default(self, problem: Problem) -> str | None:
        """Where no measurement says that these kernels are ahead."""
        most = 16 if problem.features.dtype == torch.float32 else 32
        if problem.heads * problem.classes > most and problem.rows > _FEW_ROWS:
            return (
                f"measured ahead on an H200 only for up to {most} classes of this dtype, or up to "
                f"{_FEW_ROWS} rows"
            )
        if gpu.capability(gpu.index(problem.device))[0] != 9:
            return "measured on an H200 only, compute capability 9.0"
        return None

    def prepare(self, problem: Problem, plan: Plan) -> CudaPasses:
        """See :class:`moso_fast.backends.base.Backend`."""
        return CudaPasses(problem, plan)


class CudaPasses(Passes):
    """Launches of one problem, all cut by the same plan of the kernels."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self._cut = jobs.plan_of(problem, gpu.shared_limit(problem.device))
        # Rows whose slabs are as long as the rounding of their sums allows.
        rows = _SLABS * int(self._cut["slab_limit"])
        self.chunk_rows = rows if jobs.unit_columns(problem.features) else min(rows, _COPIED_ROWS)

    def describe(self) -> str:
        """Tile of the first pass, operand terms and passes over the features."""
        problem, cut = self.problem, self._cut
        blocks = ", two blocks a tile" if cut["parts"] == 2 else ""
        if cut["together"] == 2:
            blocks = ", two blocks a multiprocessor"
        digits = "all" if jobs.exact(problem) else "leading"
        return (
            f"cuda: few classes, {problem.heads * problem.classes} of {16 * cut['tiles']}, tiles "
            f"of {cut['tile_rows']} rows, {cut['stages']} staged{blocks}, features read once a "
            f"pass, {digits} digits of float32 operands"
        )

    def first(self, rows: slice, out: RowBuffers) -> FirstPass:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem = self.problem
        heads, classes, dim = problem.weight.shape
        count = rows.stop - rows.start
        residual = gpu.empty(problem, count, heads, classes) if self.returns_residual else None
        grad_sum = gpu.empty(problem, heads, classes, dim, dtype=torch.float64)
        bias_grad_sum = gpu.empty(problem, heads, classes, dtype=torch.float64)
        if count == 0:
            return FirstPass(grad_sum.zero_(), bias_grad_sum.zero_(), residual)
        chunk = jobs.Chunk(problem, rows, self._cut)
        partial, bias_partial = jobs.partial_sums(problem, -(-count // chunk.slab_rows()))
        results = jobs.row_results(out, rows, residual, partial, bias_partial)
        gpu.launch(problem.device, gpu.module().few_classes_first, chunk.first(results))
        reduce = jobs.reduce_job(partial, bias_partial, grad_sum, bias_grad_sum)
        gpu.launch(problem.device, gpu.module().few_classes_reduce, reduce)
        return FirstPass(grad_sum, bias_grad_sum, residual)

    def second(
        self, rows: slice, out: RowBuffers, residual: Tensor | None, alignment: Tensor
    ) -> None:
        """See :class:`moso_fast.core.passes.Passes`."""
        problem, count = self.problem, rows.stop - rows.start
        if count == 0:
            return
        chunk = jobs.Chunk(problem, rows, self._cut)
        if residual is None:
            residual = gpu.empty(problem, count, problem.heads, problem.classes)
            job = chunk.first(jobs.no_results(residual))
            gpu.launch(problem.device, gpu.module().few_classes_first, job)
        job = chunk.second(jobs.row_inputs(out, rows, residual, alignment))
        job["mean_grad"] = chunk.address(self.mean_grad)
        job["mean_bias_grad"] = chunk.address(self.mean_bias_grad)
        if problem.cu_seqlens is None:  # the gradient of a sequence is not a row's
            counted = out.number_counted()
            job["count"] = counted.data_ptr()
        gpu.launch(problem.device, gpu.module().few_classes_second, job)

    def whole(self, formula: str | None, scale: float, *, read: bool) -> Whole | None:
        """See :class:`moso_fast.core.passes.Passes`."""
        if not self.plan.keep_residual:
            return None
        return run_whole(self.problem, self._cut, formula, scale, read=read)


def _unknown(problem: Problem) -> str | None:
    """Why these kernels cannot take this kind of problem, whatever its size; or None."""
    if problem.loss != "cross_entropy" or problem.soft_labels:
        return "the CUDA C++ kernels know cross-entropy with class ids only"
    if problem.features.dtype not in jobs.DTYPES:
        return "float64 features need float64 accumulators, which only torch has"
    return None


def _too_large(problem: Problem, shared_limit: int) -> str | None:
    plan = jobs.plan_of(problem, shared_limit)
    return None if plan["ok"] else str(plan["reason"])
