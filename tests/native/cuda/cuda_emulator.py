"""Runs the CUDA kernels' own source on the CPU: builds the emulator, and a backend on top of it.

The folder emulator/ holds a thread block whose threads are fibers. It fails on accesses outside the
arrays, reads of what nobody wrote, races between barriers, and warps whose lanes part ways.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moso_fast.backends import _REGISTRY, Availability
from moso_fast.backends.cuda import backend as cuda
from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.cuda import jobs as cuda_jobs
from moso_fast.core.problem import Problem
from moso_fast.core.status import STATUS_SLOTS

EMULATOR = Path(__file__).resolve().parent / "emulator"
SOURCE = EMULATOR.parents[3] / "csrc"
CUDA = SOURCE / "cuda"
FEATURES = ("kFloat32", "kBfloat16", "kFloat16")
H200_SHARED = 232448  # bytes a block may have: 227 KB
A100_SHARED = 166912


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler, or None; None too where the sources are not here."""
    if not SOURCE.is_dir() or os.name == "nt":
        return None
    named = shlex.split(os.environ.get("CXX", ""))
    found = named[0] if named else next((c for c in ("c++", "g++", "clang++") if _path(c)), None)
    return (named or [found]) if found and _path(found) else None


def _path(program: str) -> str | None:
    return shutil.which(program)


def build() -> ModuleType:
    """Compile the emulator once for each state of its sources; import it."""
    command = compiler()
    assert command is not None, "tests skip where there is no compiler"
    paths = [*EMULATOR.iterdir(), *SOURCE.glob("*.h"), *CUDA.iterdir()]
    files = sorted(path for path in paths if path.suffix in (".h", ".cuh", ".cpp"))
    digest = hashlib.sha256(" ".join([*command, sys.version]).encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    mine = Path(tempfile.gettempdir(), f"moso_fast_emulator_{os.getuid()}")
    mine.mkdir(exist_ok=True, mode=0o700)
    assert mine.lstat().st_uid == os.getuid(), f"{mine} belongs to somebody else: remove it"
    folder = mine / digest.hexdigest()[:16]
    target = folder / f"_cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.is_file():
        folder.mkdir(exist_ok=True)
        _compile(command, folder, target)
    spec = importlib.util.spec_from_file_location("_cuda_emulator", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(command: list[str], folder: Path, target: Path) -> None:
    import pybind11

    work = Path(tempfile.mkdtemp(dir=folder))
    flags = [*command, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{CUDA}", f"-I{EMULATOR}"]
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    jobs = [
        (EMULATOR / "instances.cpp", f"{name}.o", ["-O1", f"-DMOSO_FEATURE={name}"])
        for name in FEATURES
    ]
    jobs += [
        (CUDA / "few_classes_plan.cpp", "plan.o", ["-O1"]),
        (EMULATOR / "module.cpp", "module.o", ["-O0", *(f"-I{path}" for path in includes)]),
    ]
    others = sorted(set(EMULATOR.glob("*.cpp")) - {source for source, _, _ in jobs})
    jobs += [(source, f"{source.stem}.o", ["-O2"]) for source in others]
    running = [
        subprocess.Popen(
            [*flags, *own, "-c", str(source), "-o", str(work / out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, out, own in jobs
    ]
    for process in running:
        words = process.communicate()[1]
        assert process.returncode == 0, words
    built = work / target.name
    objects = [str(work / out) for _, out, _ in jobs]
    subprocess.run([*command, "-shared", *objects, "-o", str(built)], check=True)
    os.replace(built, target)  # whole or not at all: several runs may build at once
    shutil.rmtree(work)


class EmulatedCuda(cuda.CudaBackend):
    """The backend with the emulator in place of the GPU; features lie in main memory."""

    def __init__(self, emulator: ModuleType, patch: Any, shared: int = H200_SHARED) -> None:
        self.emulator = emulator
        self.multiprocessors = 3
        self.bulk = True  # as from sm_90 on
        self.launches: list[tuple[str, dict[str, Any]]] = []
        self.wide_loads: dict[str, list[int]] = {}  # of the last launch by each name
        patch.setattr(cuda_device, "module", lambda: emulator)
        patch.setattr(cuda_device, "shared_limit", _of_device(lambda: shared))
        patch.setattr(cuda_device, "multiprocessors", _of_device(lambda: self.multiprocessors))
        patch.setattr(cuda_device, "bulk_copies", _of_device(lambda: self.bulk))
        patch.setattr(cuda_device, "launch", self._launch)
        patch.setattr(cuda_device, "empty", self._empty)
        patch.setattr(cuda_device, "facts", self._facts)
        self.shared = shared
        self._guarded: list[torch.Tensor] = []

    def supports(self, problem: Problem) -> str | None:
        return cuda._unknown(problem) or cuda._too_large(problem, self.shared)

    def _empty(
        self, problem: Problem, *shape: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """NaN between bands of a number that no kernel writes."""
        numbers = 1
        for size in shape:
            numbers *= size
        whole = torch.full((numbers + 128,), float("nan"), dtype=dtype)
        whole[:64] = whole[-64:] = 12345.0
        self._guarded.append(whole)
        return whole[64:-64].view(shape)

    def _facts(self, problem: Problem, numbers: int, read: bool) -> torch.Tensor:
        return self._empty(problem, numbers, dtype=torch.float64)

    def _launch(self, device: Any, function: Any, job: dict[str, Any], *parts: Any) -> None:
        assert device == _DEVICE, "launched where the problem is not"
        name = function.__name__
        if name == "few_classes_whole":
            # What the module does in one call, with the arrays of each kernel known by themselves.
            _reset_status(job["first"]["status"])
            for part in (*WHOLE, "closing_score"):
                own = job[part.rpartition("_")[2]]
                if own is not None:
                    self._launch(device, getattr(self.emulator, part), own)
            return
        self.launches.append((name, dict(job)))
        for key, (size, writable) in _sizes(name, job).items():
            if job[key]:
                self.emulator.register_array(job[key], size, writable)
        try:
            function({**job, "device": 0, "stream": 0})
        finally:
            self.emulator.forget_arrays()
        self.wide_loads[name] = self.emulator.last_wide_loads()
        self._check_guards(name)

    def job(self, name: str) -> dict[str, Any]:
        """Return what the last launch of this kernel was given."""
        return next(job for launched, job in reversed(self.launches) if launched == name)

    def _check_guards(self, name: str) -> None:
        """Fail where a kernel wrote beside an array."""
        for whole in self._guarded:
            inside = bool((whole[:64] == 12345.0).all() and (whole[-64:] == 12345.0).all())
            assert inside, f"{name} wrote beside an array"


# Where the problems lie that the emulator is given.
_DEVICE = torch.device("cpu")


def _of_device(answer: Callable[[], Any]) -> Callable[[torch.device], Any]:
    """What is asked about a device must be asked about that of the problem."""

    def asked(device: torch.device) -> Any:
        assert device == _DEVICE
        return answer()

    return asked


def in_place_of_a_gpu(emulator: ModuleType, patch: Any) -> EmulatedCuda:
    """Have ``backend="cuda"`` mean the emulator."""
    backend = EmulatedCuda(emulator, patch)
    patch.setattr(backend, "availability", lambda: Availability(True, "emulated"))
    patch.setitem(_REGISTRY, "cuda", backend)
    return backend


# The kernels of a job in one go, in their order.
WHOLE = (
    "few_classes_first",
    "few_classes_reduce",
    "few_classes_second",
    "closing_finish",
    "closing_judge",
)


def _reset_status(address: int) -> None:
    ctypes.memset(address, 0x7F, 8 * STATUS_SLOTS)


def _sizes(name: str, job: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Bytes of every array of a job, and whether the kernel may write it."""
    if name.startswith("closing"):
        return _closing_sizes(name, job)
    if name == "few_classes_reduce":
        slabs, classes, dim = job["slabs"], job["classes"], job["dim"]
        columns = -(-dim // 16) * 16
        return {
            "partial": (4 * slabs * classes * columns, False),
            "bias_partial": (4 * slabs * classes, False),
            "grad_sum": (8 * classes * dim, True),
            "bias_grad_sum": (8 * classes, True),
            "mean": (4 * classes * dim, True),
            "bias_mean": (4 * classes, True),
            "counted": (job["rows"], False),
            "counts": (8 * 64, True),
        }
    rows, heads, dim = job["rows"], job["heads"], job["dim"]
    width = heads * job["classes"]
    item = 4 if job["feature"] == cuda_jobs.DTYPES[torch.float32] else 2
    features = ((rows - 1) * job["row_stride"] + dim) * item
    if name == "few_classes_second":
        column = 4 * ((heads - 1) * job["alignment_stride"] + rows)
        return {
            "features": (features, False),
            "residual": (4 * rows * width, False),
            "mean_grad": (4 * width * dim, False),
            "mean_bias_grad": (4 * width, False),
            "feature_sqnorm": (4 * rows, False),
            "counted": (rows, False),
            "count": (8, False),
            "alignment": (column, True),
        }
    slabs = -(-rows // job["slab_rows"])
    column = 4 * ((heads - 1) * job["stat_stride"] + rows)
    return {
        "features": (features, False),
        "weight": (4 * width * dim, False),
        "bias": (4 * width, False),
        "labels": (8 * rows, False),
        "sample_weight": (4 * rows, False),
        **{key: (column, True) for key in ("loss", "residual_sqnorm", "margin", "entropy")},
        "feature_sqnorm": (4 * rows, True),
        "counted": (rows, True),
        "status": (32, True),
        "residual": (4 * rows * width, True),
        "partial": (4 * slabs * width * (-(-dim // 16) * 16), True),
        "bias_partial": (4 * slabs * width, True),
    }


def _closing_sizes(name: str, job: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    heads = job["heads"]
    if name == "closing_judge":
        numbers, sums = heads * job["classes"], 8 * heads * job["blocks_a_head"] * 3
        return {
            "sums": (sums, False),
            "grad_sum": (8 * numbers * job["dim"], False),
            "bias_grad_sum": (8 * numbers, False),
            "weight": (4 * numbers * job["dim"], False),
            "bias": (4 * numbers, False),
            "counts": (8 * 64, False),
            "status": (8 * STATUS_SLOTS, False),
            "facts": (8 * (STATUS_SLOTS + 1 + 6 * heads), True),
            "mean_grad_sqnorm": (8 * heads, True),
            "count": (8, True),
        }
    column = 4 * heads * job["rows"]
    if name == "closing_score":
        return {
            "alignment": (column, False),
            "grad_sqnorm": (column, False),
            "mean_grad_sqnorm": (8 * heads, False),
            "count": (8, False),
            "score": (column, True),
        }
    results = ("alignment", "residual_sqnorm", "grad_sqnorm", "loss", "margin", "entropy")
    return {
        **{key: (column, True) for key in results},
        "feature_sqnorm": (4 * job["rows"], False),
        "counted": (job["rows"], False),
        "sample_weight": (4 * job["rows"], False),
        "counts": (8 * 64, False),
        "sums": (8 * heads * job["blocks_a_head"] * 3, True),
    }
