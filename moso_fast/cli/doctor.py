"""``moso-fast doctor``: what this installation can do here, and how to get the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..version import __version__
from ._common import Json, jsonable, print_pairs, print_table

# Distribution -> what it is for; torch and numpy are required, the others optional.
PACKAGES = {
    "torch": "required",
    "numpy": "required",
    "triton": "Triton kernels",
    "pyarrow": ".parquet score tables",
    "matplotlib": "plots",
    "typer": "command line",
    "rich": "command line",
    "scikit-learn": "moso-fast demo",
    "safetensors": ".safetensors checkpoints",
}
_MODULES = (
    "functional",
    "scorer",
    "tables.table",
    "tables.select",
    "tables.report",
    "surrogate",
    "sources.checkpoints.checkpoint",
)
_SECONDS_FOR_A_TOOL = 10
_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"  # where the build looks last


def doctor(
    json: Json = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also what the build recorded.")
    ] = False,
) -> None:
    """Say what can run on this machine, why the rest cannot, and how to get it.

    The exit code is 1 only where something installed is broken.
    """
    facts = examine()
    if json:
        import json as json_module

        print(json_module.dumps(jsonable(facts), allow_nan=False))
    else:
        _print(facts, verbose)
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Collect all facts; JSON-able but for what the build recorded."""
    from ..backends import backends
    from ..util import native as util_native

    problems = _import_problems()
    natives = {name: util_native.load_native(name) for name in ("_cpu", "_cuda")}
    for native in natives.values():
        if native.module is None and "cannot be loaded" in native.reason:
            problems.append(f"{native.reason}; {native.how}")
    return {
        "moso_fast": {
            "version": __version__,
            "folder": str(Path(__file__).resolve().parents[1]),
        },
        "backends": {
            name: {"available": a.available, "reason": a.reason, "how": a.how}
            for name, a in backends().items()
        },
        "native": {
            name: {"loaded": native.module is not None, "reason": native.reason, "how": native.how}
            for name, native in natives.items()
        },
        "backend_environment": os.environ.get("MOSO_FAST_BACKEND"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {"nvcc": _nvcc(), "c++": _compiler()},
        "cpu": _cpu(natives["_cpu"].module),
        "gpus": _gpus(),
        "cuda": _cuda(natives["_cuda"].module),
        "build": util_native.build_info(),
        "problems": problems,
    }


def _print(facts: dict[str, Any], verbose: bool) -> None:
    print(f"moso_fast {facts['moso_fast']['version']} in {facts['moso_fast']['folder']}\n")
    rows = [
        (name, "yes" if entry["available"] else "no", entry["reason"])
        for name, entry in facts["backends"].items()
    ]
    print_table(("backend", "runs", "why"), rows)
    missing = {n: e["how"] for n, e in facts["backends"].items() if e["how"]}
    for name, entry in facts["native"].items():
        if not entry["loaded"] and entry["how"] not in missing.values():
            missing[f"moso_fast.{name}"] = f"{entry['reason']}; {entry['how']}"
    if missing:
        print("\nhow to get the rest")
        print_pairs(missing)
    if facts["backend_environment"]:
        print(f"\nMOSO_FAST_BACKEND={facts['backend_environment']} decides over backend='auto'")
    print()
    cpu = facts["cpu"]
    print_pairs(
        {
            "python": f"{facts['python']['version']} ({facts['python']['executable']})",
            **{
                name: version or f"not installed ({PACKAGES[name]})"
                for name, version in facts["packages"].items()
            },
            "c++": facts["tools"]["c++"] or "no compiler found",
            "nvcc": facts["tools"]["nvcc"] or "not found",
            "cpu": f"{cpu['model']}, {cpu['threads']} threads, torch {cpu['torch_simd']}"
            + (f", moso_fast {cpu['simd']} ({cpu['thread_pool']} threads)" if cpu["simd"] else ""),
            "cuda": facts["cuda"],
        }
    )
    for gpu in facts["gpus"]:
        print(f"gpu {gpu['index']}  {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    if verbose:
        print()
        print_pairs({f"build: {name}": value for name, value in facts["build"].items()})
    for problem in facts["problems"]:
        print(f"\nBROKEN  {problem}")


def _import_problems() -> list[str]:
    problems = []
    for name in _MODULES:
        try:
            importlib.import_module(f"moso_fast.{name}")
        except Exception as error:  # whatever it is, it is what the user came here to see
            problems.append(f"moso_fast.{name} cannot be imported: {' '.join(str(error).split())}")
    return problems


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str], containing: str = "") -> str | None:
    """First line (that contains a text) of a tool's answer, or None where it gives none."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_FOR_A_TOOL, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in answer.stdout.splitlines() if containing in line), None)


def _nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", _USUAL_NVCC]
    path = next((found for found in map(shutil.which, places) if found), None)
    if path is None:
        return None
    release = _first_line([path, "--version"], "release")
    return f"{path} ({release.strip() if release else 'does not answer to --version'})"


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()[:1]
    path = next(
        (found for found in map(shutil.which, [*named, "g++", "c++", "clang++"]) if found), None
    )
    if path is None:
        return None
    return f"{path} ({_first_line([path, '--version']) or 'does not answer to --version'})"


def _cpu(native: Any) -> dict[str, Any]:
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "model": model,
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "simd": ", ".join(native.variants()) if native else None,
        "thread_pool": ("PyTorch's" if native.shares_pool() else "own") if native else None,
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": device.name,
                "capability": f"{device.major}{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
        )
    return found


def _cuda(native: Any) -> str:
    """One sentence on what torch and our CUDA module see."""
    import torch

    built = (
        f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    )
    if native is None:
        return f"{built}; moso_fast._cuda not there"
    report = native.device_query()
    if report["error"]:
        return f"{built}; moso_fast._cuda ({native.architectures}): {report['error']}"
    return f"{built}; moso_fast._cuda ({native.architectures}) sees {report['count']} device(s)"
