"""What the packaging tests share: builds by this environment's tools, offline, and a probe.

What was built is imported by an isolated interpreter that sees this environment's packages, but
neither its moso_fast nor the working directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
CXX = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
FOLDERS = ("benches", "csrc", "kernels", "moso_fast", "tests", "tools")
BUILD_MODULES = ROOT / "tools" / "build"

# Of the compilers of this machine, a build finds those on its PATH.
HOOK = """
import json, sys
sys.path.insert(0, "tools/build")
import native_plan
native_plan.NVCC_FOLDER = "/nowhere"
from setuptools import build_meta
hook, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
name = getattr(build_meta, hook)(folder, *([settings] if settings else []))
print("built:" + name)
"""

# Runs under -I -S: sys.path is the standard library, then what is given here.
PROBE = """
import importlib, importlib.util, json, site, sys
target, dependencies, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
site.addsitedir(target)
sys.path.append(dependencies)
import moso_fast
from moso_fast.util.native import build_info, load_native
specs = {name: importlib.util.find_spec("moso_fast.kernels." + name) for name in names}
if importlib.util.find_spec("triton") is not None:
    for name in names:
        importlib.import_module("moso_fast.kernels." + name)
top = importlib.util.find_spec("kernels")
native = {name: load_native(name) for name in ("_cpu", "_cuda")}
json.dump({
    "package": moso_fast.__file__,
    "kernels": {name: spec and spec.origin for name, spec in specs.items()},
    "top_level_kernels": top and (top.origin or list(top.submodule_search_locations)),
    "native": {name: found.module and found.module.__file__ for name, found in native.items()},
    "reason": {name: found.reason for name, found in native.items()},
    "how": {name: found.how for name, found in native.items()},
    "info": build_info(),
}, sys.stdout)
"""


def copy_tree(target: Path) -> None:
    """Copy what is packed or built: the files at the root and these folders, no build outputs."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target)


def build(
    source: Path,
    hook: str,
    out: Path,
    mode: str,
    *,
    settings: dict[str, str] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Call one build hook (PEP 517) as pip does, with MOSO_FAST_BUILD=mode."""
    out.mkdir(parents=True, exist_ok=True)
    # What names compilers, and what pip and uv leave in the environment of an installation.
    chosen = ("CXX", "CUDA_HOME", "CUDA_PATH", "PIP_BUILD_TRACKER", "PIP_REQ_TRACKER", "UV")
    clean = {name: value for name, value in os.environ.items() if name not in chosen}
    # One kind of GPU and hardly any optimisation (-G, with -w against nvcc's remarks about it): the
    # tests need the modules to exist, not to be fast.
    clean |= {"MOSO_FAST_BUILD": mode, "CXXFLAGS": "-O1", "NVCC_APPEND_FLAGS": "-G -w"}
    clean |= {"MOSO_FAST_CUDA_ARCHITECTURES": "80"}
    clean |= env
    command = [sys.executable, "-c", HOOK, hook, str(out), json.dumps(settings)]
    return subprocess.run(
        command, cwd=source, env=clean, capture_output=True, text=True, check=False
    )


def built(done: subprocess.CompletedProcess[str], out: Path) -> Path:
    """Return the file that a successful hook reported."""
    assert done.returncode == 0, done.stderr[-4000:]
    return out / re.findall(r"^built:(.+)$", done.stdout, re.MULTILINE)[-1]


def install(wheel: Path, target: Path) -> Path:
    """Unpack a wheel as pip would into site-packages (less the scripts)."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def probe(target: Path, dependencies: Path) -> dict:
    """Import moso_fast and its kernels from target in a bare interpreter; return what it saw."""
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(target), str(dependencies)]
    done = subprocess.run(
        [*command, json.dumps(KERNELS)], cwd=target, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_kernels_in(seen: dict, folder: Path) -> None:
    assert KERNELS, "kernels/ holds no module: the checks below would show nothing"
    for name, origin in seen["kernels"].items():
        assert origin is not None, f"moso_fast.kernels.{name} is not importable"
        assert Path(origin).resolve() == (folder / f"{name}.py").resolve()


def script(path: Path, text: str) -> Path:
    """Write a shell script that stands for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
