"""Builds for a machine with a GPU beforehand, and packs what that machine lacks.

    make gpu-pack                          (or: python -m benches.gpu pack [--help])

Compiling takes a minute and a half of a machine that is rented by the minute. This builds the
native modules for another Python (--python, one that is installed here with its headers) and for
the GPU's generation (--architectures), puts small packages that the check can use beside them
(--package), and writes one archive with the checkout: below 40 MiB, or it is an error. There:

    tar xzf gpu-pack.tar.gz && cd moso_fast && make gpu-check

The modules also lie in this checkout (moso_fast/_cuda.*.so), where a copy of it takes them along.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .build import ROOT, SOURCE, module_path
from .check.sources import CUDA, fingerprint

FOLDER = SOURCE.parent
SITE = FOLDER / "site"  # worker.py finds packages there
COMMIT = FOLDER / "commit"
MOST_BYTES = 40 * 2**20
TOOLS = ("setuptools>=77", "pybind11>=2.13", "ninja>=1.11")
# A hanging test names itself and lets the others go on; energy of a call; peers' losses.
PACKAGES = ("pytest-timeout", "nvidia-ml-py", "liger-kernel", "cut-cross-entropy")
_ASK = (
    "import json, sysconfig as s; print(json.dumps([s.get_config_var('EXT_SUFFIX'),"
    " s.get_paths()['include']]))"
)


class PackError(SystemExit):
    """Ends with one line on stderr and exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"gpu-pack: {message}")


def main(arguments: Sequence[str]) -> int:
    """Build, gather, write the archive; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--python",
        default="python3.12",
        help="interpreter of the version that runs there (default: %(default)s)",
    )
    parser.add_argument(
        "--architectures",
        default="90a",
        help='GPUs to compile for, "80 90a 100" (default: %(default)s, H100 and H200)',
    )
    parser.add_argument(
        "--package",
        action="append",
        help=f"package that the machine lacks; repeatable (default: {' '.join(PACKAGES)})",
    )
    options = parser.parse_args(arguments)
    suffix = extension_suffix(options.python)
    python = build_environment(options.python)
    build(python, options.architectures)
    modules = [module_path(name, suffix) for name in ("_cpu", "_cuda")]
    missing = [path.name for path in modules if not path.exists()]
    if missing:
        raise PackError(f"the build left no {', '.join(missing)}")
    packages(python, options.package or PACKAGES)
    COMMIT.write_text(_git("rev-parse", "HEAD") + "\n", encoding="utf-8")
    SOURCE.write_text(fingerprint((CUDA,)) + "\n", encoding="utf-8")
    archive = write_archive([*modules, SITE, COMMIT, SOURCE])
    print(f"{archive.relative_to(ROOT)}: {archive.stat().st_size / 2**20:.1f} MiB")
    print("in a copy of this checkout, these ignored paths are all that it needs:")
    for path in (*modules, SITE, COMMIT, SOURCE):
        print(f"    {path.relative_to(ROOT)}")
    return 0


def extension_suffix(python: str) -> str:
    """Return the suffix of extension modules of an interpreter that has its headers."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackError(f"{python} cannot be run ({error}); --python names another") from None
    suffix, include = json.loads(done.stdout)
    if not Path(include, "Python.h").is_file():
        raise PackError(f"{python} has no headers: {include}/Python.h is missing")
    return str(suffix)


def build_environment(python: str) -> str:
    """Return the interpreter of an environment with the build tools, made at the first call."""
    folder = FOLDER / "venv"
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(inside), "-m", "pip", "install", "--quiet", *TOOLS]
    subprocess.run(pip, check=True)
    return str(inside)


def build(python: str, architectures: str) -> None:
    """Compile both modules into the tree; what is up to date is not compiled again."""
    environment = {
        **os.environ,
        "MOSO_FAST_BUILD": "cuda",
        "MOSO_FAST_CUDA_ARCHITECTURES": architectures,
    }
    command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        raise PackError("the build failed, see above")


def packages(python: str, names: Sequence[str]) -> None:
    """Install packages, without what they need, into a folder of their own."""
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(SITE), *names], check=True)


def write_archive(more: Sequence[Path]) -> Path:
    """Pack what git tracks, as it is now, and ``more``; an error where that is too much."""
    archive = FOLDER / "gpu-pack.tar.gz"
    tracked = [ROOT / name for name in _git("ls-files", "-z").split("\0") if name]

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:gz") as file:
        for path in (*tracked, *more):
            if path.exists():
                name = Path("moso_fast", path.relative_to(ROOT))
                file.add(path, str(name), filter=anonymous)
    size = archive.stat().st_size
    if size > MOST_BYTES:
        raise PackError(f"{archive} has {size / 2**20:.1f} MiB, more than {MOST_BYTES / 2**20:g}")
    return archive


def _git(*arguments: Any) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
