"""Every fact that `moso-fast doctor` collects, and every line that it prints of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cli_support import run

import moso_fast

doctor = importlib.import_module("moso_fast.cli.doctor")

FACTS = {
    "moso_fast": {"version": "9.9", "folder": "/some/where"},
    "backends": {
        "cpu": {"available": True, "reason": "runs", "how": ""},
        "cuda": {"available": False, "reason": "no GPU", "how": "get a GPU"},
    },
    "native": {
        "_cpu": {"loaded": True, "reason": "", "how": ""},
        "_cuda": {"loaded": False, "reason": "not built", "how": "build it"},
    },
    "backend_environment": None,
    "python": {"version": "3.x", "executable": "/bin/python"},
    "packages": {"torch": "2.x", "triton": None},
    "tools": {"nvcc": None, "c++": None},
    "cpu": {
        "model": "A CPU",
        "threads": 3,
        "torch_simd": "AVX2",
        "simd": None,
        "thread_pool": None,
    },
    "gpus": [],
    "cuda": "torch without CUDA",
    "build": {"mode": "auto", "missing": {"a": 1}},
    "problems": [],
}
PLAIN = """\
moso_fast 9.9 in /some/where

backend  runs  why
cpu      yes   runs
cuda     no    no GPU

how to get the rest
cuda             get a GPU
moso_fast._cuda  not built; build it

python  3.x (/bin/python)
torch   2.x
triton  not installed (Triton kernels)
c++     no compiler found
nvcc    not found
cpu     A CPU, 3 threads, torch AVX2
cuda    torch without CUDA
"""
EVERYTHING = """\
moso_fast 9.9 in /some/where

backend  runs  why
cpu      yes   runs

MOSO_FAST_BACKEND=torch decides over backend='auto'

python  3.x (/bin/python)
torch   2.x
triton  3.9
c++     /bin/g++ (g++ 13)
nvcc    /bin/nvcc (release 13)
cpu     A CPU, 3 threads, torch AVX2, moso_fast avx2, avx512 (own threads)
cuda    torch without CUDA
gpu 0  H100, sm_90, 79.6 GiB
gpu 1  H200, sm_90, 139.8 GiB

build: mode     auto
build: missing  a 1

BROKEN  the first

BROKEN  the second
"""


def test_the_printed_lines(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: FACTS)
    assert run(capsys, "doctor").out == PLAIN
    same = {"_cuda": {"loaded": False, "reason": "not built", "how": "get a GPU"}}
    monkeypatch.setattr(doctor, "examine", lambda: {**FACTS, "native": same})
    once = PLAIN.replace("moso_fast._cuda  not built; build it\n", "")
    assert run(capsys, "doctor").out == once.replace("cuda             get", "cuda  get")
    gpus = [
        {"index": 0, "name": "H100", "capability": "90", "memory_gib": 79.6},
        {"index": 1, "name": "H200", "capability": "90", "memory_gib": 139.8},
    ]
    full = {
        **FACTS,
        "backends": {"cpu": FACTS["backends"]["cpu"]},
        "native": {"_cpu": FACTS["native"]["_cpu"]},
        "backend_environment": "torch",
        "packages": {"torch": "2.x", "triton": "3.9"},
        "tools": {"nvcc": "/bin/nvcc (release 13)", "c++": "/bin/g++ (g++ 13)"},
        "cpu": {**FACTS["cpu"], "simd": "avx2, avx512", "thread_pool": "own"},
        "gpus": gpus,
        "problems": ["the first", "the second"],
    }
    monkeypatch.setattr(doctor, "examine", lambda: full)
    assert run(capsys, "doctor --verbose", code=1).out == EVERYTHING
    shown = run(capsys, "doctor --json", code=1).out
    assert json.loads(shown) == full and shown.count("\n") == 1


class Native:
    """A native module in name."""

    architectures = "sm_90"

    def __init__(self, shares: bool = True, query: dict | None = None) -> None:
        self.shares, self.query = shares, query

    def variants(self):
        return ["avx2", "avx512"]

    def shares_pool(self):
        return self.shares

    def device_query(self):
        return self.query


def test_facts_come_from_where_they_belong(monkeypatch) -> None:
    from moso_fast.util import native

    cpu, cuda = Native(), Native(query={"error": "", "count": 2})
    found = {
        "_cpu": native.NativeModule(cpu, "", ""),
        "_cuda": native.NativeModule(None, "not built", "build it"),
    }
    one = types.SimpleNamespace(available=False, reason="why", how="so")
    monkeypatch.setattr(native, "load_native", found.get)
    monkeypatch.setattr(native, "build_info", lambda: {"mode": "auto"})
    folder = importlib.import_module("moso_fast.backends")
    monkeypatch.setattr(folder, "backends", lambda: {"one": one})
    monkeypatch.setenv("MOSO_FAST_BACKEND", "torch")
    monkeypatch.setattr(doctor, "_nvcc", lambda: "an nvcc")
    monkeypatch.setattr(doctor, "_compiler", lambda: "a compiler")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["gpus"])
    monkeypatch.setattr(doctor, "_cpu", lambda module: ("of", module))
    monkeypatch.setattr(doctor, "_cuda", lambda module: ("of", module))
    monkeypatch.setattr(doctor, "_version", lambda name: f"{name} 1")
    monkeypatch.setattr(doctor, "_import_problems", lambda: ["a problem"])
    assert doctor.examine() == {
        "moso_fast": {
            "version": moso_fast.__version__,
            "folder": str(Path(moso_fast.__file__).parent),
        },
        "backends": {"one": {"available": False, "reason": "why", "how": "so"}},
        "native": {
            "_cpu": {"loaded": True, "reason": "", "how": ""},
            "_cuda": {"loaded": False, "reason": "not built", "how": "build it"},
        },
        "backend_environment": "torch",
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: f"{name} 1" for name in doctor.PACKAGES},
        "tools": {"nvcc": "an nvcc", "c++": "a compiler"},
        "cpu": ("of", cpu),
        "gpus": ["gpus"],
        "cuda": ("of", None),
        "build": {"mode": "auto"},
        "problems": ["a problem"],
    }
    found["_cuda"] = native.NativeModule(cuda, "", "")
    monkeypatch.delenv("MOSO_FAST_BACKEND")
    facts = doctor.examine()
    assert facts["cuda"] == ("of", cuda) and facts["backend_environment"] is None


def test_modules_that_cannot_be_imported(monkeypatch) -> None:
    honest = importlib.import_module

    def broken(name):
        if name in ("moso_fast.surrogate", "moso_fast.tables.report"):
            raise RuntimeError("of\n two lines")
        return honest(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert doctor._import_problems() == [
        f"moso_fast.{name} cannot be imported: of two lines"
        for name in ("tables.report", "surrogate")
    ]


def test_versions_of_packages(monkeypatch) -> None:
    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor._version("torch") == "torch 1" and doctor._version("triton") is None


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Return a maker of programs that answer ``--version``; no others are found."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "on path"))
    monkeypatch.setattr(doctor, "_USUAL_NVCC", str(tmp_path / "usual" / "nvcc"))

    def make(where, answer, code=0):
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        said = "".join(f"echo {line}\n" for line in answer)
        path.write_text(f'#!/bin/sh\n[ "$*" = --version ] || exit 9\n{said}exit {code}\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_the_first_nvcc_that_the_build_would_take(tools, monkeypatch, tmp_path) -> None:
    assert doctor._nvcc() is None
    for where, variable in (
        ("usual/nvcc", None),
        ("on path/nvcc", None),
        ("path/bin/nvcc", "CUDA_PATH"),
        ("home/bin/nvcc", "CUDA_HOME"),
    ):
        path = tools(where, ["nvcc of NVIDIA", "'  Cuda tools, release 13.0  '", "release 2"])
        if variable:
            monkeypatch.setenv(variable, str(Path(path).parents[1]))
        assert doctor._nvcc() == f"{path} (Cuda tools, release 13.0)"
    monkeypatch.setenv("CUDA_HOME", "")  # as good as not set
    assert doctor._nvcc().startswith(str(tmp_path / "path"))
    for answer, code in ((["nothing of it"], 0), (["release 1"], 1)):
        path = tools("path/bin/nvcc", answer, code)
        assert doctor._nvcc() == f"{path} (does not answer to --version)"


def test_the_first_compiler_that_the_build_would_take(tools, monkeypatch) -> None:
    assert doctor._compiler() is None
    for name in ("clang++", "c++", "g++"):
        path = tools(f"on path/{name}", [f"{name} 13", "more"])
        assert doctor._compiler() == f"{path} ({name} 13)"
    path = tools("mine", ["mine 1"])
    monkeypatch.setenv("CXX", f"{path} -O2")
    assert doctor._compiler() == f"{path} (mine 1)"
    tools("mine", ["mine 1"], code=1)
    assert doctor._compiler() == f"{path} (does not answer to --version)"
    tools("mine", [])
    assert doctor._compiler() == f"{path} (does not answer to --version)"


def test_a_tool_that_hangs_is_given_up(monkeypatch) -> None:
    asked = []

    def hangs(command, **options):
        asked.append((command, options["timeout"]))
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor._first_line(["x", "--version"]) is None and asked == [(["x", "--version"], 10)]


def test_the_processor(monkeypatch) -> None:
    text = "processor\t: 0\nmodel name\t: A CPU: fast \nmodel name\t: another\n"
    monkeypatch.setattr(Path, "is_file", lambda self: text is not None)
    monkeypatch.setattr(Path, "read_text", lambda self: {"/proc/cpuinfo": text}[str(self)])
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    common = {"model": "A CPU: fast", "threads": 5, "torch_simd": "AVX2"}
    assert doctor._cpu(None) == {**common, "simd": None, "thread_pool": None}
    found = doctor._cpu(Native())
    assert found == {**common, "simd": "avx2, avx512", "thread_pool": "PyTorch's"}
    assert doctor._cpu(Native(shares=False))["thread_pool"] == "own"
    text = "processor\t: 0\n"
    assert doctor._cpu(None)["model"] == "arm"
    monkeypatch.setattr(platform, "processor", lambda: "ARM of an older system")
    assert doctor._cpu(None)["model"] == "ARM of an older system"
    text = None
    assert doctor._cpu(None)["model"] == "ARM of an older system"


def test_gpus_and_what_is_seen_of_them(monkeypatch) -> None:
    sizes = (85.5 * 2**30, 150.04 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda k: types.SimpleNamespace(name=f"GPU {k}", major=9, minor=k, total_memory=sizes[k]),
    )
    assert doctor._gpus() == [
        {"index": 0, "name": "GPU 0", "capability": "90", "memory_gib": 85.5},
        {"index": 1, "name": "GPU 1", "capability": "91", "memory_gib": 150.0},
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._cuda(None) == "torch without CUDA; moso_fast._cuda not there"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sees = doctor._cuda(Native(query={"error": "", "count": 2}))
    assert sees == "torch built for CUDA 13.0; moso_fast._cuda (sm_90) sees 2 device(s)"
    fails = doctor._cuda(Native(query={"error": "no driver", "count": 0}))
    assert fails == "torch built for CUDA 13.0; moso_fast._cuda (sm_90): no driver"
