"""The Triton backend as machines with and without a GPU see it; its numbers in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_support import Case, random_case
from interpreter import run_interpreted

import moso_fast
from moso_fast import engine
from moso_fast.backends import choose, get
from moso_fast.backends import triton as triton_backend
from moso_fast.backends.triton import TritonBackend, operand_dtype
from moso_fast.functional import moso_scores
from moso_fast.problem import build_problem


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set what the backend finds: version (None: not installed), CUDA device, ROCm, interpreter."""

    def set_up(
        version: str | None = "3.9.0",
        *,
        cuda: bool = True,
        hip: str | None = None,
        interpret: bool = False,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        monkeypatch.setattr(triton_backend, "_installed", lambda: version is not None)
        monkeypatch.setattr(triton_backend, "_version", lambda: version)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        if interpret:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        else:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return set_up


class _On:
    """A problem whose features claim to lie on another device."""

    def __init__(self, problem, device: str) -> None:
        self._problem, self.device = problem, torch.device(device)

    def __getattr__(self, name: str):
        return getattr(self._problem, name)


def problem_of(case: Case, **options):
    return build_problem(*case.args, **case.options, **options)


@pytest.mark.parametrize(
    "setting, available, reason, how",
    [
        ({"version": None}, False, "Triton is not installed", 'pip install "triton>=3.6"'),
        ({"version": "3.5.1"}, False, "3.5.1 is older than 3.6", 'pip install "triton>=3.6"'),
        ({"version": "2.10.0+git"}, False, "older than 3.6", 'pip install "triton>=3.6"'),
        ({"cuda": False}, False, "finds no CUDA device", "NVIDIA GPU"),
        ({"hip": "6.4"}, False, "proven for NVIDIA GPUs only", "backend='torch'"),
        ({}, True, "Triton 3.9.0, kernels proven", ""),
        ({"version": "3.6.0"}, True, "not yet timed on a GPU", ""),
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
    problem = _On(problem_of(random_case("ids")), "cuda")
    backend, reasons = choose(problem)
    assert backend.name == ("triton" if proven else "torch")
    if proven:
        assert "triton: chosen, Triton 3.9.0, kernels proven by interpreter" in reasons[-1]
        assert "not yet timed" in reasons[-1]
    else:
        assert f"compute capability {capability[0]}.{capability[1]}" in reasons[0]
        assert choose(problem, "triton")[0].name == "triton"  # asked for by name it runs


def test_what_is_proven_is_what_the_compiler_test_covers() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from aot import ARCHITECTURES

    assert {arch // 10 for arch in ARCHITECTURES} == set(triton_backend._PROVEN)


def test_float64_on_a_gpu_falls_to_torch_with_the_reason(machine) -> None:
    machine()
    backend, reasons = choose(_On(problem_of(random_case("ids", dtype=torch.float64)), "cuda"))
    assert backend.name == "torch" and "triton: not used, float64" in reasons[0]


def test_refused_by_name_on_a_machine_without_a_gpu(machine, monkeypatch) -> None:
    machine(cuda=False)
    case = random_case("ids")
    with pytest.raises(ValueError, match=r"^backend='triton' cannot run this problem: .*no CUDA"):
        moso_scores(*case.args, backend="triton")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^MOSO_FAST_BACKEND=triton cannot run this problem"):
        moso_scores(*case.args)


def test_cuda_is_explained_and_refused() -> None:
    found = moso_fast.backends()["cuda"]
    assert not found.available and "device queries only" in found.reason
    assert "triton" in found.how and "torch" in found.how
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run: .*device queries only"):
        moso_scores(*random_case("ids").args, backend="cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpu, triton, torch; got 'cupy'"):
        get("cupy")


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
    monkeypatch.setattr(engine, "residual_budget", lambda device: 2**36)
    backend = TritonBackend("blas")
    for classes, dim in ((10, 512), (1000, 2048), (128_256, 4096)):
        features = torch.zeros(1, dim).expand(4, dim)
        weight = torch.zeros(1, dim).expand(classes, dim)
        problem = build_problem(features, weight, torch.zeros(4).long())
        rows = backend.chunk_rows(_On(problem, "cuda"))
        assert rows > 2000 and rows * classes * 8 <= 2**31
        assert backend.chunk_rows(problem) * classes * 8 <= 2**18 or classes > 2**16
    tall = build_problem(torch.zeros(4, 1), torch.zeros(1, 1), torch.zeros(4).long())
    assert backend.chunk_rows(_On(tall, "cuda")) * 8 <= 2**31


def test_import_and_availability_do_not_import_triton() -> None:
    code = (
        "import sys, moso_fast; moso_fast.backends(); "
        "sys.exit('triton' in sys.modules and 'Triton was imported')"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_whole_path_in_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    run_interpreted("test_triton_scoring.py", tmp_path)
