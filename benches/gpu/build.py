"""Builds the native modules in place, for this machine's GPU alone, where they are missing.

MOSO_FAST_BUILD=cuda: a compiler that is missing is an error here, not a reason to test less.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from .check.sources import CUDA, fingerprint

ROOT = Path(__file__).resolve().parents[2]
# What pack.py built the modules from.
SOURCE = ROOT / "build" / "gpu-pack" / "source"
LIMIT = 400.0  # seconds
SETUPTOOLS = 77  # older ones refuse the licence field of pyproject.toml


def module_path(name: str, suffix: str | None = None, root: Path = ROOT) -> Path:
    """Where the module of this Python, or of the one whose suffix is given, lies in the tree."""
    return root / "moso_fast" / f"{name}{suffix or sysconfig.get_config_var('EXT_SUFFIX')}"


def native_plan() -> ModuleType:
    """Return the module by which setup.py decides what to build."""
    folder = str(ROOT / "tools" / "build")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("native_plan")


def cuda_program(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, which need not be on PATH; None: not installed."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    path = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join([*path, native_plan().NVCC_FOLDER]))


def ask_gpu(what: str) -> str | None:
    """Answer of nvidia-smi about the first GPU ("name", "compute_cap"), None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "-i", "0")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def capability() -> str | None:
    """Compute capability of the first GPU ("9.0"), or None where there is none."""
    return ask_gpu("compute_cap")


def environment(capability: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return what the build runs with: CUDA or an error, this GPU's generation alone."""
    found = {**given, "MOSO_FAST_BUILD": "cuda"}
    if "MOSO_FAST_CUDA_ARCHITECTURES" not in given:
        major = capability.partition(".")[0]
        names = [a for a in native_plan().CUDA_ARCHITECTURES if a.rstrip("a")[:-1] == major]
        if names:
            found["MOSO_FAST_CUDA_ARCHITECTURES"] = names[-1]
    return found


def build_where_missing() -> str | None:
    """Build on a machine with a GPU unless the module is there; return what went wrong."""
    if module_path("_cuda").exists():
        packed = SOURCE.read_text(encoding="utf-8").strip() if SOURCE.is_file() else None
        if packed not in (None, fingerprint((CUDA,))):
            return f"{CUDA} has changed since `make gpu-pack`, whose module is still the old one"
        return None
    found = capability()
    if found is None:
        return None
    version = metadata.version("setuptools") if _installed("setuptools") else "none"
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < SETUPTOOLS:
        return (
            f"setuptools {version} cannot build this package, which needs {SETUPTOOLS} or newer; "
            "`make gpu-pack` on another machine builds the modules beforehand"
        )
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    print(f"--- build: {' '.join(command)}", flush=True)
    try:
        code = subprocess.run(
            command, cwd=ROOT, env=environment(found, os.environ), timeout=LIMIT, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return f"not built within {LIMIT:.0f} s"
    return f"the build ended with exit code {code}" if code else None


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
