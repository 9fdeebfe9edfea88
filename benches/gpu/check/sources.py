"""Which files a contender runs, and a hash of them: what is not touched by a fix stays timed.

Imports are followed as text, from the modules that a contender names, through moso_fast, kernels
and benches. Modules that only list all backends or regimes count themselves but are not followed,
and packages' fronts do not count: either would lead from every contender to every other.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# Lists of all backends and of all regimes.
REGISTRIES = ("moso_fast/backends/__init__.py", "moso_fast/backends/triton/choice.py")
FRONTS = ("moso_fast/__init__.py", "moso_fast/bench/providers/__init__.py")
_BACKENDS = "moso_fast/backends"
# Everything of ours runs through these.
SHARED = (
    "moso_fast/functional.py",
    "moso_fast/backends/base.py",
    "moso_fast/backends/common.py",
    *REGISTRIES,
)
CUDA = "csrc/cuda"
NATIVE = {"cuda": (CUDA, "csrc/job_fields.h"), "cpu": ("csrc/cpu", "csrc/job_fields.h")}
NATIVE_SUFFIXES = {".cu", ".cuh", ".h", ".cpp"}
PLAIN = ("moso_fast/bench/providers/plain.py",)


def of_contender(name: str) -> tuple[str, ...]:
    """Return where to begin for a backend, "triton/REGIME", "plain" or a path of a module."""
    backend, _, regime = name.partition("/")
    if name == "plain":
        return PLAIN
    if name.endswith(".py"):
        return (name,)
    regimes = (f"{_BACKENDS}/triton/regimes/{regime}.py",) if regime else ()
    # A backend is a file, or a folder with the class in one of its files.
    own = (f"{_BACKENDS}/{backend}.py", f"{_BACKENDS}/{backend}/backend.py")
    return (*SHARED, *own, *regimes, *NATIVE.get(backend, ()))


def of_unit(names: Iterable[str]) -> str:
    """Hash of all that a unit runs, its contenders and modules by name."""
    return fingerprint(tuple(path for name in names for path in of_contender(name)))


@cache
def fingerprint(begin: tuple[str, ...], root: Path = ROOT) -> str:
    """Hash the files that ``begin`` (paths from the root; a folder means all in it) leads to."""
    digest = hashlib.sha256()
    for path in closure(begin, root):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def closure(begin: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the files that ``begin`` leads to, sorted; what is not there is left out."""
    found: set[str] = set()
    waiting = [path for each in begin for path in _files(each, root)]
    while waiting:
        path = waiting.pop()
        if path in found or path in FRONTS:
            continue
        found.add(path)
        if path.endswith(".py") and path not in REGISTRIES:
            waiting += _imported(path, root)
    return sorted(found)


def _files(path: str, root: Path) -> list[str]:
    place = root / path
    if place.is_dir():
        inside = sorted(place.rglob("*"))
        kept = (p for p in inside if p.suffix in NATIVE_SUFFIXES)
        return [p.relative_to(root).as_posix() for p in kept]
    return [path] if place.is_file() else []


@cache
def _imported(path: str, root: Path) -> tuple[str, ...]:
    """Files of this repository that a module names in its imports, wherever they stand in it."""
    return tuple(_found_imports(path, root))


def _found_imports(path: str, root: Path) -> Iterator[str]:
    tree = ast.parse((root / path).read_text(encoding="utf-8"), path)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _package(path, node.level, node.module)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            file = _module(name, root)
            if file is not None:
                yield file


def _package(path: str, level: int, module: str | None) -> str:
    """Dotted name that a ``from`` import starts at."""
    if not level:
        return module or ""
    parts = path.removesuffix(".py").split("/")[:-level]
    return ".".join([*parts, *([module] if module else [])])


def _module(name: str, root: Path) -> str | None:
    """Path of a module of this repository, or None for anybody else's."""
    path = name.replace(".", "/")
    if path.startswith("moso_fast/kernels"):
        path = path.removeprefix("moso_fast/")  # where setup.py maps it
    for place in (path, f"tests/support/{path}", f"tests/gpu/{path}"):
        for file in (f"{place}.py", f"{place}/__init__.py"):
            if (root / file).is_file():
                return file
    return None
