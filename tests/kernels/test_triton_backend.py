"""The Triton backend as machines with and without a GPU see it; its numbers in the interpreter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core_support import chunk_rows, prepared, random_case
from interpreter import run_interpreted, run_python
from triton_cases import needs_triton, problem_of, shape

import moso_fast
from moso_fast.backends import backends, choose, get
from moso_fast.backends import torch as torch_backend
from moso_fast.backends.triton import backend as triton_backend
from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.backend import TritonBackend, operand_dtype
from moso_fast.backends.triton.regime import CHUNK_BYTES, SLAB_ROWS, TESTED_MAJORS
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import memory
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem
from moso_fast.functional import moso_scores


class _On:
    """A problem whose features claim to lie on another device."""

    def __init__(self, problem, device: str) -> None:
        self._problem, self.device = problem, torch.device(device)

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


@pytest.mark.parametrize(
    "setting, available, reason, how",
    [
        ({"version": None}, False, "Triton is not installed", 'pip install "triton>=3.6"'),
        ({"version": "3.5.1"}, False, "3.5.1 is older than 3.6", 'pip install "triton>=3.6"'),
        ({"version": "2.10.0+git"}, False, "older than 3.6", 'pip install "triton>=3.6"'),
        ({"cuda": False}, False, "finds no CUDA device", "NVIDIA GPU"),
        ({"hip": "6.4"}, False, "tested for NVIDIA GPUs only", "backend='torch'"),
        ({}, True, "Triton 3.9.0, kernels tested", ""),
        ({"version": "3.6.0"}, True, "Triton 3.6.0, kernels tested", ""),
        ({"version": "3.10.0"}, True, "Triton 3.10.0", ""),
        ({"cuda": False, "interpret": True}, True, "in its interpreter, for tests", ""),
    ],
)
def test_availability_says_why_and_how(machine, setting, available, reason, how) -> None:
    machine(**setting)
    found = moso_fast.backends()["triton"]
    assert found.available == available
    assert reason in found.reason and how in found.how
    assert bool(found.how) != available


def test_version_is_that_of_the_installed_package() -> None:
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert triton_backend._version() == triton.__version__
    assert triton_backend._installed()


@pytest.mark.exhaustive
def test_import_and_availability_do_not_import_triton(tmp_path: Path) -> None:
    code = (
        "import sys, moso_fast; moso_fast.backends(); "
        "sys.exit('triton' in sys.modules and 'Triton was imported')"
    )
    run_python(code, tmp_path)


def test_supports(machine) -> None:
    machine()
    backend = TritonBackend()
    problem = problem_of(random_case("ids"))
    assert "features are on cpu" in backend.supports(problem)
    assert backend.supports(_On(problem, "cuda:1")) is None
    double = problem_of(random_case("ids", dtype=torch.float64))
    assert "float64" in backend.supports(_On(double, "cuda"))
    machine(interpret=True)
    assert backend.supports(problem) is None
    assert "float64" in backend.supports(double)
    assert "features are on meta" in backend.supports(_On(problem, "meta"))


@pytest.mark.parametrize(
    "capability, proven", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True),
                           ((10, 0), True), ((12, 0), False)]
)  # fmt: skip
def test_default_on_a_gpu_where_the_kernels_are_proven(machine, capability, proven) -> None:
    machine(capability=capability)
    # More classes than the CUDA C++ kernels take, where they are built.
    problem = _On(problem_of(random_case("ids", c=130)), "cuda")
    backend, reasons = choose(problem)
    assert backend.name == ("triton" if proven else "torch")
    if proven:
        assert "triton: chosen, Triton 3.9.0, kernels tested by interpreter" in reasons[-1]
    else:
        (reason,) = (line for line in reasons if line.startswith("triton: "))
        assert f"compute capability {capability[0]}.{capability[1]}" in reason
        assert choose(problem, "triton")[0].name == "triton"  # asked for by name it runs


def test_what_is_proven_is_what_the_compiler_test_covers() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from aot import ARCHITECTURES

    assert {arch // 10 for arch in ARCHITECTURES} == set(TESTED_MAJORS)


def test_float64_on_a_gpu_falls_to_torch_with_the_reason(machine) -> None:
    machine()
    backend, reasons = choose(_On(problem_of(random_case("ids", dtype=torch.float64)), "cuda"))
    assert backend.name == "torch"
    assert any(reason.startswith("triton: not used, float64") for reason in reasons)


def test_refused_by_name_on_a_machine_without_a_gpu(machine, monkeypatch) -> None:
    machine(cuda=False)
    case = random_case("ids")
    with pytest.raises(ValueError, match=r"^backend='triton' cannot run this problem: .*no CUDA"):
        moso_scores(*case.args, backend="triton")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^MOSO_FAST_BACKEND=triton cannot run this problem"):
        moso_scores(*case.args)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    known = ", ".join(["auto", *backends()])
    with pytest.raises(ValueError, match=f"must be one of {known}; got 'cu'"):
        get("cu")


@pytest.mark.parametrize(
    "dtype, precision, operand",
    [
        (torch.float32, "highest", torch.float32),
        (torch.float32, "medium", torch.float32),
        (torch.bfloat16, "medium", torch.bfloat16),
        (torch.bfloat16, "high", torch.float32),
        (torch.bfloat16, "highest", torch.float32),
        (torch.float16, "medium", torch.float32),
    ],
)
def test_operands(dtype, precision, operand) -> None:
    problem = problem_of(random_case("ids", dtype=dtype), precision=precision)
    assert operand_dtype(problem) == operand
    assert problem_of(random_case("ids", dtype=torch.bfloat16)).precision == "medium"


def test_chunks_stay_within_their_budget(monkeypatch) -> None:
    monkeypatch.setattr(memory, "residual_budget", lambda device: 2**36)
    backend, budget = TritonBackend("blas"), CHUNK_BYTES["cuda"]
    for classes, dim in ((10, 512), (1000, 2048), (128_256, 4096)):
        features = torch.zeros(1, dim).expand(4, dim)
        weight = torch.zeros(1, dim).expand(classes, dim)
        problem = build_problem(features, weight, torch.zeros(4).long())
        rows = chunk_rows(backend, _On(problem, "cuda"))
        assert rows > 2000 and rows * classes * 8 <= budget
        assert chunk_rows(backend, problem) * classes * 8 <= 2**18 or classes > 2**16
    tall = build_problem(torch.zeros(4, 1), torch.zeros(1, 1), torch.zeros(4).long())
    assert chunk_rows(backend, _On(tall, "cuda")) * 8 <= budget


def test_a_chunk_takes_no_more_than_an_eighth_of_a_small_gpu(monkeypatch) -> None:
    """And a power of two: GPUs of one kind differ by what their driver keeps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, expected in ((139, 8), (79.2, 8), (47.5, 4), (39.6, 4), (23.7, 2), (15.9, 1)):
        described = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, d=described: d)
        assert triton_regime.chunk_bytes(torch.device("cuda")) == expected * 2**30, gib
        assert triton_regime.chunk_bytes(torch.device("cpu")) == CHUNK_BYTES["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_regime.chunk_bytes(torch.device("cuda")) == CHUNK_BYTES["cuda"]


@needs_triton
def test_peak_memory_is_what_a_chunk_and_the_residuals_take(monkeypatch) -> None:
    problem = shape(10, 512, rows=1000)
    job = TritonBackend("blas").prepare(problem, Plan(None, True, 40_000, 0))
    numbers = problem.weight.numel()
    assert job.fixed_bytes() == 20 * numbers  # two float64 sums, one float32
    expected = 40_000 + 100 * job.row_bytes() + (20 + 12) * numbers
    assert f"at most about {expected / 2**20:.1f} MiB" in job.explain(100)[-1]
    two_slabs = prepared(TritonBackend("blas"), shape(10, 512, rows=2 * SLAB_ROWS["highest"] + 1))
    assert two_slabs.fixed_bytes() == (16 + 2 * 4) * numbers
    monkeypatch.setattr(triton_blas, "_BATCH_BYTES", 8 * numbers - 1)  # one slab after the other
    assert two_slabs.fixed_bytes() == (16 + 4) * numbers


@pytest.mark.parametrize("rows", [SLAB_ROWS["highest"], torch_backend._SLAB_ROWS["cuda"]])
def test_slabs_of_cublas_are_short_enough_for_float32_sums(rows: int) -> None:
    """Equal rows, added one after the other: every sum is rounded the same way."""
    terms = 2.0 ** np.random.default_rng(0).uniform(0, 1, 10_000)
    sums = np.zeros_like(terms, dtype=np.float32)
    for _ in range(rows):
        sums = (sums + terms).astype(np.float32)
    assert np.abs(sums / (rows * terms) - 1).max() < 1e-5


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "file", ["test_triton_scoring.py", "test_triton_memory.py", "test_triton_narrow.py"]
)
def test_whole_path_in_interpreter(file: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    run_interpreted(file, tmp_path)
