"""The native modules _cpu and _cuda: import one, or say why it is missing and how to get it."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["NativeModule", "build_info", "load_native"]

_PACKAGE = Path(__file__).resolve().parents[1]
_COMPILER = {"_cpu": "a C++17 compiler (g++ or clang++)", "_cuda": "nvcc and a C++17 compiler"}
_MODE = {"_cpu": "cpu", "_cuda": "cuda"}


class NativeModule(NamedTuple):
    """A native module, or why there is none.

    Attributes
    ----------
    module : ModuleType or None
        The imported module.
    reason : str
        One sentence on why it is missing; empty when it is there.
    how : str
        What to do to get it; empty when it is there.
    """

    module: ModuleType | None
    reason: str
    how: str


@cache
def load_native(name: str) -> NativeModule:
    """Import ``moso_fast._cpu`` or ``moso_fast._cuda``, or say why not and how to get it.

    Parameters
    ----------
    name : {"_cpu", "_cuda"}
        The module's name.
    """
    if name not in _MODE:
        raise ValueError(f"name must be one of {', '.join(_MODE)}; got {name!r}")
    full_name = f"moso_fast.{name}"
    try:
        return NativeModule(importlib.import_module(full_name), "", "")
    except ImportError as error:
        # Built but not loadable (another libstdc++, say) must not read as "not built".
        absent = isinstance(error, ModuleNotFoundError) and error.name == full_name
        reason = _why_absent(name) if absent else f"{full_name} cannot be loaded: {error}"
    in_tree = (_PACKAGE.parent / "setup.py").is_file()
    again = (
        "`make build`" if in_tree else "the installation again (`pip install --force-reinstall`)"
    )
    how = f"run {again} with MOSO_FAST_BUILD={_MODE[name]}"
    # An nvcc that was found and not used, for want of a GPU, need not be installed.
    if name == "_cpu" or not build_info().get("nvcc"):
        how = f"install {_COMPILER[name]} and {how}"
    return NativeModule(None, reason, how)


def build_info() -> dict[str, Any]:
    """Return setup.py's record: mode, built, missing, cxx, nvcc, cuda_architectures, cuda_debug.

    Empty in a source tree where nothing has been built.
    """
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _why_absent(name: str) -> str:
    info = build_info()
    if name in info.get("missing", {}):
        return str(info["missing"][name])
    if name in info.get("built", []):
        return (
            f"moso_fast.{name} was built, but for another Python version, or its file was removed"
        )
    return f"moso_fast.{name} has not been built in this source tree"
