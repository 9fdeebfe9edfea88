"""Which kernels the passes of the CUDA backend launch, with what, and how they describe a job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import Case, random_case

from moso_fast.backends.cuda import backend as cuda
from moso_fast.backends.cuda import device as gpu
from moso_fast.backends.cuda.backend import CudaBackend, CudaPasses
from moso_fast.core.engine import _allocate
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem
from moso_fast.util.native import NativeModule

CPU = torch.device("cpu")
N, C, D, K = 20, 5, 12, 2


class Module:
    """The names of the kernels, and a plan that says what it is made for."""

    architectures = "sm_90a"
    few_classes_first, few_classes_reduce, few_classes_second = "first", "reduce", "second"

    def __init__(self) -> None:
        self.planned: list[tuple[Any, ...]] = []
        self.plan = {
            "ok": True, "tiles": 2, "narrow": 0, "parts": 1, "together": 1, "slab_limit": 2048,
            "first_bytes": 1, "second_bytes": 1, "tile_rows": 32, "stages": 3,
        }  # fmt: skip

    def few_classes_plan(self, *size: Any) -> dict[str, Any]:
        self.planned.append(size)
        return self.plan

    def few_classes_slab_rows(self, rows: int, limit: int) -> int:
        return 6

    def few_classes_partial_columns(self, dim: int) -> int:
        return 16


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(module=Module(), launches=[])
    monkeypatch.setattr(gpu, "module", lambda: made.module)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 5)
    monkeypatch.setattr(gpu, "shared_limit", lambda device: {CPU: 9000}[device])
    monkeypatch.setattr(gpu, "bulk_copies", lambda device: True)
    monkeypatch.setattr(gpu, "launch", lambda *given: made.launches.append(given))
    return made


def passes_of(case: Case, keep: bool = True, **options: Any) -> CudaPasses:
    return CudaPasses(build_problem(*case.args, **options), Plan(None, keep, 0, 0))


def case_of(**options: Any) -> Case:
    return random_case("ids", n=N, c=C, d=D, heads=K, **options)


def test_the_first_pass_is_two_launches(machine) -> None:
    for keep, offsets, returned in ((True, None, True), (False, None, False),
                                    (False, torch.tensor([0, N]), True)):  # fmt: skip
        machine.launches.clear()
        passes = passes_of(case_of(), keep, cu_seqlens=offsets)
        out = _allocate(passes.problem)
        part = passes.first(slice(2, N), out)
        (where, name, first), (also, last, reduce) = machine.launches
        assert (where, name, also, last) == (CPU, "first", CPU, "reduce")
        assert first["residual"] == (part.residual.data_ptr() if returned else 0)
        assert returned == (part.residual is not None)
        if returned:
            assert part.residual.shape == (N - 2, K, C) and part.residual.dtype == torch.float32
        assert first["loss"] == out.loss[:, 2:].data_ptr() and first["rows"] == N - 2
        assert reduce["slabs"] == 3 and reduce["grad_sum"] == part.grad_sum.data_ptr()
        assert reduce["bias_grad_sum"] == part.bias_grad_sum.data_ptr()
        assert reduce["partial"] == first["partial"] != 0
        assert (part.grad_sum.shape, part.grad_sum.dtype) == ((K, C, D), torch.float64)
        assert (part.bias_grad_sum.shape, part.bias_grad_sum.dtype) == ((K, C), torch.float64)


def test_no_rows_are_no_launch(machine) -> None:
    passes = passes_of(case_of())
    out = _allocate(passes.problem)
    part = passes.first(slice(3, 3), out)
    assert not part.grad_sum.any() and not part.bias_grad_sum.any()
    assert part.residual is not None and part.residual.shape == (0, K, C)
    passes.second(slice(3, 3), out, part.residual, torch.empty(K, 0))
    assert machine.launches == []


def test_the_second_pass_makes_residuals_that_are_not_there(machine) -> None:
    for bias in (True, False):
        passes = passes_of(case_of(bias=bias), keep=False)
        out, alignment = _allocate(passes.problem), torch.empty(K, N)
        out.count = torch.tensor(17)
        grad, shift = torch.ones(K, C, D), torch.ones(K, C) if bias else None
        passes.begin_second(grad, shift)
        machine.launches.clear()
        passes.second(slice(0, N), out, None, alignment)
        (where, name, again), (also, last, job) = machine.launches
        assert (where, name, also, last) == (CPU, "first", CPU, "second")
        assert again["residual"] == job["residual"] != 0
        # It writes nothing else.
        assert not any(again[key] for key in ("loss", "counted", "status", "partial"))
        assert job["mean_grad"] == grad.data_ptr() and job["alignment"] == alignment.data_ptr()
        assert job["mean_bias_grad"] == (0 if shift is None else shift.data_ptr())
        assert job["count"] == out.count.data_ptr()
        residual = torch.empty(N, K, C)
        machine.launches.clear()
        passes.second(slice(0, N), out, residual, alignment)
        ((_, name, job),) = machine.launches
        assert (name, job["residual"]) == ("second", residual.data_ptr())


def test_memory_that_a_pass_takes(machine, monkeypatch) -> None:
    """Sums in float64, partial sums of every slab, and residuals that nobody has handed over."""
    taken: list[Any] = []
    empty = gpu.empty

    def noted(problem: Any, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        taken.append((shape, dtype))
        return empty(problem, *shape, dtype=dtype)

    monkeypatch.setattr(gpu, "empty", noted)
    f32, f64 = torch.float32, torch.float64
    sums = [((K, C, D), f64), ((K, C), f64), ((3, K * C, 16), f32), ((3, K * C), f32)]
    for keep in (True, False):
        taken.clear()
        passes = passes_of(case_of(), keep)
        out = _allocate(passes.problem)
        passes.first(slice(2, N), out)
        assert taken == [*([((N - 2, K, C), f32)] if keep else []), *sums]
        passes.begin_second(torch.ones(K, C, D), torch.ones(K, C))
        for residual, shapes in ((torch.empty(N, K, C), []), (None, [((N, K, C), f32)])):
            taken.clear()
            passes.second(slice(0, N), out, residual, torch.empty(K, N))
            assert taken == shapes


def test_the_gradient_of_a_sequence_is_not_a_rows(machine) -> None:
    passes = passes_of(case_of(), cu_seqlens=torch.tensor([0, N]))
    out = _allocate(passes.problem)
    out.count = torch.tensor(1)
    passes.begin_second(torch.ones(K, C, D), torch.ones(K, C))
    passes.second(slice(0, N), out, torch.empty(N, K, C), torch.empty(K, N))
    assert machine.launches[0][2]["count"] == 0


def test_a_plan_is_asked_for_by_size(machine) -> None:
    cuda.jobs._planned.cache_clear()
    for dtype, precision, number, exact in (
        (torch.float32, "highest", 0, True),
        (torch.float32, "high", 0, False),
        (torch.bfloat16, "medium", 1, False),
        (torch.float16, "high", 2, True),
    ):
        passes_of(case_of(dtype=dtype), precision=precision)
        assert machine.module.planned[-1] == (number, exact, K * C, D, 9000)


def test_words_and_rows_of_a_chunk(machine) -> None:
    plan = machine.module.plan
    begin = "cuda: few classes, 10 of 32, tiles of 32 rows, 3 staged"
    end = ", features read once a pass, {} digits of float32 operands"
    for parts, together, between in (
        (1, 1, ""),
        (2, 1, ", two blocks a tile"),
        (1, 2, ", two blocks a multiprocessor"),
    ):
        plan.update(parts=parts, together=together)
        for precision, digits in (("highest", "all"), ("high", "leading")):
            words = passes_of(case_of(), precision=precision).describe()
            assert words == begin + between + end.format(digits)
    case = case_of()
    turned = Case(case.features.T.contiguous().T, *case.args[1:])
    for limit, rows, copied in ((2048, 528 * 2048, 65536), (100, 52800, 52800)):
        plan["slab_limit"] = limit
        assert passes_of(case).chunk_rows == rows
        assert passes_of(turned).chunk_rows == copied


class OnGpu(SimpleNamespace):
    """A problem that claims to lie on a GPU."""

    def __init__(self, case: Case, rows: int = N, **options: Any) -> None:
        super().__init__(of=build_problem(*case.args, **case.options, **options), rows=rows,
                         device=torch.device("cuda:1"))  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


@pytest.fixture
def gpu_of(machine, monkeypatch):
    def set_up(capability: tuple[int, int], architectures: str = "sm_80 sm_90a") -> None:
        machine.module.architectures = architectures
        monkeypatch.setattr(gpu, "capability", lambda index: {1: capability}[index])

    monkeypatch.setattr(gpu, "shared_limit", lambda device: {torch.device("cuda:1"): 9000}[device])
    set_up((9, 0))
    return set_up


def test_every_refusal_in_its_words(machine, gpu_of) -> None:
    backend: Any = CudaBackend()
    cuda.jobs._planned.cache_clear()
    case = case_of()
    where = "features and heads are on cpu; CUDA kernels need a GPU"
    assert backend.supports(build_problem(*case.args)) == where
    assert backend.supports(OnGpu(case)) is None
    for kind in ("soft", "mse", "binary"):
        why = "the CUDA C++ kernels know cross-entropy with class ids only"
        assert backend.supports(OnGpu(random_case(kind))) == why
    why = "float64 features need float64 accumulators, which only torch has"
    assert backend.supports(OnGpu(case_of(dtype=torch.float64))) == why
    gpu_of((10, 3))
    why = "the kernels are not compiled for compute capability 10.3: sm_80 sm_90a"
    assert backend.supports(OnGpu(case)) == why
    gpu_of((9, 0))
    cuda.jobs._planned.cache_clear()
    machine.module.plan.update(ok=False, reason="too many classes")
    assert backend.supports(OnGpu(case)) == "too many classes"
    cuda.jobs._planned.cache_clear()


def test_where_it_was_measured_ahead(gpu_of) -> None:
    backend: Any = CudaBackend()
    many, other = 2**17 + 1, "measured on an H200 only, compute capability 9.0"
    why = "measured ahead on an H200 only for up to {} classes of this dtype, or up to 131072 rows"
    for dtype, most in ((torch.float32, 16), (torch.bfloat16, 32), (torch.float16, 32)):
        for heads in (1, 2):
            at = random_case("ids", c=most // heads, heads=heads, dtype=dtype)
            above = random_case("ids", c=most // heads + 1, heads=heads, dtype=dtype)
            assert backend.not_by_default(OnGpu(at, many)) is None
            assert backend.not_by_default(OnGpu(above, many)) == why.format(most)
            assert backend.not_by_default(OnGpu(above, many - 1)) is None
    for capability in ((8, 9), (10, 0)):
        gpu_of(capability)
        assert backend.not_by_default(OnGpu(case_of())) == other


def test_what_is_missing_in_its_words(monkeypatch) -> None:
    backend = CudaBackend()
    monkeypatch.setattr(cuda, "load_native", lambda name: {"_cuda": NativeModule(Module(), "", "")}
                        [name])  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = backend.availability()
    assert (found.available, found.reason, found.how) == (
        True, "CUDA C++ kernels for few classes", ""
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, version = backend.availability(), torch.__version__
    assert (found.available, found.reason, found.how) == (
        False, f"moso_fast._cuda is built but PyTorch {version} finds no CUDA device",
        "run on a machine with an NVIDIA GPU and a PyTorch built for CUDA",
    )  # fmt: skip
    assert (backend.name, backend.streams, backend.maps) == ("cuda", True, False)
