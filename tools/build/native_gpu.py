"""Which GPUs this machine has, asked of NVIDIA's own programs: the build runs without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Where Windows lends its driver's programs to Linux (WSL): not on PATH.
WSL_FOLDER = "/usr/lib/wsl/lib"
# A driver that is broken may never answer.
SECONDS_TO_ANSWER = 60


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> str | None:
    """Return what the command prints, or None where it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER, env=env
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def capabilities(env: Mapping[str, str], nvcc: str) -> list[str]:
    """Return the compute capability of each kind of GPU ("90" for 9.0), oldest first.

    nvidia-smi comes with the driver. Where it is missing or too old to know the question, the
    program by which ``nvcc -arch=native`` finds out is asked; it lies beside nvcc.
    """
    path = os.pathsep.join([env.get("PATH", os.defpath), WSL_FOLDER])
    smi = shutil.which("nvidia-smi", path=path)
    answer = smi and output_of([smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", answer or "", re.MULTILINE)
    if not found:
        beside = str(Path(nvcc).resolve().with_name("__nvcc_device_query"))
        found = re.findall(r"\b(\d+)(\d)\b", output_of([beside]) or "")
    return ["".join(number) for number in sorted(set(found), key=lambda n: (int(n[0]), int(n[1])))]


def architecture_of(capability: str, architectures: Iterable[str]) -> str | None:
    """Return the newest of the architectures whose binary code runs on a GPU, None without one.

    Code runs on its own and later minor versions of a major one, with an "a" on its own only:
    sm_80 on 8.6 and 8.9 too, sm_90a on 9.0 alone.
    """
    found = None
    for name in architectures:
        number = name.rstrip("a")
        same_major = number[:-1] == capability[:-1] and int(number) <= int(capability)
        if number == capability or (same_major and name == number):
            found = name
    return found
