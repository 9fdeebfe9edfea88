"""What a number needs beside it: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import moso_fast

__all__ = ["conditions", "machine", "machine_name"]

_LIBRARIES = ("captum", "opacus", "dattri", "kronfluence", "bergson", "triton")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what results in one file must have in common: hardware and thread count."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def machine_name(facts: dict[str, Any]) -> str:
    """Folder name of a machine: ``amd-epyc-2-cpus``, or that of the GPU."""
    words = facts.get("gpu") or f"{facts['processor']} {facts['cpus']} cpus"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def conditions() -> dict[str, Any]:
    """When, with which versions, from which commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "moso_fast": moso_fast.__version__,
        "backend": moso_fast.backends()["cpu"].reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": {name: v for name in _LIBRARIES if (v := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this package lies in; None for an installed package."""
    root = Path(moso_fast.__file__).parents[1]
    if not (root / "setup.py").is_file():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        code = ["status", "--porcelain", "--untracked-files=no", "--", "moso_fast", "csrc"]
        changed = subprocess.run([*git, *code], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
