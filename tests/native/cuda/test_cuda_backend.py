"""The CUDA backend without a GPU: what it takes, what it says, what it hands to the kernels."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
from core_support import Case, prepared, random_case

import moso_fast
from moso_fast import moso_scores
from moso_fast.backends import choose, get
from moso_fast.backends.cuda import backend as cuda
from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.cuda.backend import CudaBackend
from moso_fast.core.problem import build_problem
from moso_fast.util.native import NativeModule, load_native

needs_module = pytest.mark.skipif(
    load_native("_cuda").module is None, reason="moso_fast._cuda is not built"
)


class OnGpu:
    """A problem that claims to lie on a GPU."""

    def __init__(self, problem, rows: int | None = None) -> None:
        self._problem = problem
        self.device = torch.device("cuda:0")
        self.rows = problem.rows if rows is None else rows

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


def problem_of(case: Case, **options):
    return build_problem(*case.args, **case.options, **options)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with a GPU of this capability and shared memory."""

    def pretend(
        capability=(9, 0),
        shared=cuda_emulator.H200_SHARED,
        architectures="sm_80 sm_90a sm_100 compute_100",
    ) -> None:
        monkeypatch.setattr(load_native("_cuda").module, "architectures", architectures)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda_device, "capability", lambda device: capability)
        monkeypatch.setattr(cuda_device, "limits", lambda device: (shared, 132))

    return pretend


def test_missing_module_is_explained(monkeypatch) -> None:
    missing = NativeModule(None, "nvcc was not found at installation", "install nvcc")
    monkeypatch.setattr(cuda, "load_native", lambda name: missing)
    found = moso_fast.backends()["cuda"]
    assert (found.available, found.reason, found.how) == (False, missing.reason, missing.how)


@needs_module
def test_no_device_is_explained(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = moso_fast.backends()["cuda"]
    assert not found.available and "finds no CUDA device" in found.reason
    assert "NVIDIA GPU" in found.how
    with pytest.raises(ValueError, match=r"^backend='cuda' cannot run this problem: .*no CUDA"):
        moso_scores(*random_case("ids").args, backend="cuda")


@needs_module
def test_a_device_makes_it_available(machine) -> None:
    machine()
    found = moso_fast.backends()["cuda"]
    assert found.available and "few classes" in found.reason


@needs_module
@pytest.mark.parametrize(
    "case, options, reason",
    [
        (random_case("soft"), {}, "class ids only"),
        (random_case("mse"), {}, "class ids only"),
        (random_case("binary"), {}, "class ids only"),
        (random_case("ids", dtype=torch.float64), {}, "float64"),
        (random_case("ids", c=113), {}, "112 classes"),
        (random_case("ids", c=20, heads=6), {}, "112 classes"),
        (random_case("ids", n=2, c=3, d=2049), {}, "2048 columns"),
        (random_case("ids", n=2, c=80, d=512), {"precision": "highest"}, "shared memory"),
        (random_case("ids", n=2, c=80, d=512), {"precision": "high"}, "shared memory"),
        (random_case("ids"), {}, None),
        (random_case("ids_smoothed", heads=3), {}, None),
        (random_case("ids", n=2, c=80, d=512, dtype=torch.bfloat16), {}, None),
        (random_case("ids", n=2, c=100, d=512, dtype=torch.bfloat16), {}, None),
        (random_case("ids", n=2, c=32, d=1024, dtype=torch.float16), {}, None),
        (random_case("ids", n=2, c=16, d=2048, dtype=torch.bfloat16), {}, None),
        (random_case("ids", n=2, c=10, d=2048), {}, None),
    ],
)
def test_supports(machine, case, options, reason) -> None:
    machine()
    problem = problem_of(case, **options)
    found = CudaBackend().supports(OnGpu(problem))
    assert (found is None) if reason is None else (reason in found)
    assert "need a GPU" in CudaBackend().supports(problem)


@needs_module
@pytest.mark.parametrize(
    "capability, runs",
    [
        *[((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)],
        *[((10, 0), True), ((10, 3), True), ((12, 0), False)],
    ],
)
def test_only_what_it_is_compiled_for(machine, capability, runs) -> None:
    machine(capability)
    reason = CudaBackend().supports(OnGpu(problem_of(random_case("ids"))))
    assert (reason is None) == runs
    if not runs:
        assert f"capability {capability[0]}.{capability[1]}" in reason


@needs_module
@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        ("sm_90a compute_90", (8, 0), False),
        ("sm_90a compute_90", (9, 0), True),
        ("sm_90a compute_90", (10, 0), False),
        ("sm_80 compute_80", (8, 6), True),
        ("sm_80 compute_80", (9, 0), False),
        ("sm_100 compute_100", (9, 0), False),
    ],
)
def test_a_module_for_fewer_gpus_says_so(machine, architectures, capability, runs) -> None:
    """MOSO_FAST_CUDA_ARCHITECTURES: without binary code a launch would fail, or compile PTX."""
    machine(capability, architectures=architectures)
    reason = CudaBackend().supports(OnGpu(problem_of(random_case("ids"))))
    assert (reason is None) == runs
    assert runs or reason.endswith(f": {architectures}")


@needs_module
@pytest.mark.parametrize("capability, bulk", [((8, 0), False), ((9, 0), True), ((10, 3), True)])
def test_bulk_copies_only_where_the_code_has_them(machine, capability, bulk) -> None:
    machine(capability)
    assert cuda_device.bulk_copies(torch.device("cuda:0")) == bulk


@needs_module
def test_shared_memory_of_the_device_decides(machine) -> None:
    problem = OnGpu(problem_of(random_case("ids", n=2, c=100, d=512, dtype=torch.bfloat16)))
    machine()
    assert CudaBackend().supports(problem) is None
    machine((8, 0), cuda_emulator.A100_SHARED)
    assert "shared memory" in CudaBackend().supports(problem)


@needs_module
@pytest.mark.parametrize(
    "capability, case, reason",
    [
        ((9, 0), random_case("ids", c=10, dtype=torch.bfloat16), None),
        ((9, 0), random_case("ids", c=16, dtype=torch.float16), None),
        ((9, 0), random_case("ids", c=8, heads=2, dtype=torch.bfloat16), None),
        ((9, 0), random_case("ids", c=32, dtype=torch.bfloat16), None),
        ((9, 0), random_case("ids", c=33, dtype=torch.bfloat16), "only for up to 32 classes"),
        ((9, 0), random_case("ids", c=17, heads=2, dtype=torch.float16), "up to 32 classes"),
        ((9, 0), random_case("ids", c=16), None),
        ((9, 0), random_case("ids", c=17), "only for up to 16 classes"),
        ((8, 0), random_case("ids", c=10, dtype=torch.bfloat16), "capability 9.0"),
        ((10, 0), random_case("ids", c=10, dtype=torch.bfloat16), "capability 9.0"),
    ],
)
def test_by_default_only_where_it_was_measured_ahead(machine, capability, case, reason) -> None:
    machine(capability)
    for precision in ("medium", "highest"):
        problem = problem_of(case, precision=precision)
        found = CudaBackend().not_by_default(OnGpu(problem, rows=2**17 + 1))
        assert (found is None) if reason is None else (reason in found)
        if capability == (9, 0):  # with few rows also where its kernels are the slower ones
            assert CudaBackend().not_by_default(OnGpu(problem, rows=2**17)) is None


@needs_module
def test_plans_are_worked_out_once(machine, monkeypatch) -> None:
    machine()
    calls = []
    module = load_native("_cuda").module

    def planner(*size):
        calls.append(size)
        return module.few_classes_plan(*size)

    monkeypatch.setattr(
        cuda_device,
        "module",
        lambda: type(
            "Module",
            (),
            {"few_classes_plan": staticmethod(planner), "architectures": module.architectures},
        )(),
    )
    for seed in range(3):
        problem = OnGpu(problem_of(random_case("ids", c=7, seed=seed)))
        assert CudaBackend().supports(problem) is None
        prepared("cuda", problem).describe()
    assert len(calls) == 1


@needs_module
def test_auto_says_why_it_does_not_take_it(machine, monkeypatch) -> None:
    machine()
    problem = OnGpu(problem_of(random_case("ids", c=17)), rows=200_000)
    missing = moso_fast.Availability(False, "no Triton here", "")
    monkeypatch.setattr(get("triton"), "availability", lambda: missing, raising=False)
    backend, reasons = choose(problem)
    assert backend.name == "torch"
    assert (
        "cuda: not used, measured ahead on an H200 only for up to 16 classes of this dtype, or up "
        "to 131072 rows" in reasons
    )
    assert choose(problem, "cuda")[0].name == "cuda"  # asked for by name it runs


@needs_module
def test_describe_and_chunks(machine) -> None:
    machine()
    case = random_case("ids", n=4, c=10, d=512, dtype=torch.bfloat16)
    problem = OnGpu(problem_of(case))
    words = prepared("cuda", problem).describe()
    assert "10 of 16" in words and "tiles of 32 rows, 2 staged" in words
    assert "two blocks a multiprocessor" in words
    assert prepared("cuda", problem).chunk_rows == 528 * 8192
    exact = OnGpu(problem_of(case, precision="highest"))
    assert prepared("cuda", exact).chunk_rows == 528 * 2048
    turned = problem_of(Case(case.features.T.contiguous().T, *case.args[1:]))
    assert prepared("cuda", OnGpu(turned)).chunk_rows == 65536
    two = OnGpu(problem_of(random_case("ids", n=4, c=100, d=64, dtype=torch.bfloat16)))
    assert "two blocks a tile" in prepared("cuda", two).describe()


@needs_module
def test_the_built_module_plans_as_the_emulator_does() -> None:
    if cuda_emulator.compiler() is None:
        pytest.skip("needs a C++ compiler")
    built, emulated = load_native("_cuda").module, cuda_emulator.build()
    for feature in range(3):
        for exact in (False, True):
            for classes, dim in ((10, 512), (32, 1024), (100, 512), (16, 2048), (113, 1)):
                arguments = (feature, exact, classes, dim, cuda_emulator.H200_SHARED)
                assert built.few_classes_plan(*arguments) == emulated.few_classes_plan(*arguments)
    for rows in (1, 1000, 10**6, 10**9):
        assert built.few_classes_slab_rows(rows, 2048) == emulated.few_classes_slab_rows(rows, 2048)


@needs_module
def test_limits_of_no_device_are_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="cudaDeviceGetAttribute"):
        load_native("_cuda").module.device_limits(0)


@needs_module
def test_a_launch_that_cuda_refuses_is_an_error_with_its_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the job below must not run")
    module = load_native("_cuda").module
    job = dict.fromkeys(
        (
            *("partial", "bias_partial", "slabs", "classes", "dim", "grad_sum"),
            *("bias_grad_sum", "mean", "bias_mean", "counted", "rows", "counts"),
            *("device", "stream"),
        ),
        0,
    )
    with pytest.raises(RuntimeError, match=r"^cudaSetDevice: .*\(cudaError"):
        module.few_classes_reduce({**job, "classes": 1, "dim": 1})
    with pytest.raises(KeyError, match="bias_partial"):
        module.few_classes_reduce({k: v for k, v in job.items() if k != "bias_partial"})
