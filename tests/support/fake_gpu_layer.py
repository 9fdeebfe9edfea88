"""Stands in for the work of benches/gpu/check: units that go wrong in every way, and no torch.

FAKE_GPU_FAULTS names what goes wrong, as JSON: {"STAGE UNIT": kind}. The kinds:

triton  an error that is no RuntimeError          nan     a wrong result
cuda    an error that stays with the process      signal  dies by a signal
hang    never ends, and has a child               exit    ends in the middle
stray   the same, the child ends with nobody      flood   prints without end, then dies

Without FAKE_GPU_NAME it is a machine that has no GPU. FAKE_GPU_PLAN names a stage whose units
cannot be listed; FAKE_GPU_LIMIT gives the units other seconds, FAKE_GPU_SECONDS has them take so
long, FAKE_GPU_INFORMS makes them for information, FAKE_GPU_CONTENDER has
them all run the same; FAKE_GPU_IMPORT=fails breaks the import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benches.gpu.check.worker import Wrong, run_child

FAULTS = json.loads(os.environ.get("FAKE_GPU_FAULTS", "{}"))
UNITS = ("one", "two", "three")
LIMIT = float(os.environ.get("FAKE_GPU_LIMIT", "0.7"))
_poisoned = False

if os.environ.get("FAKE_GPU_IMPORT") == "fails":
    raise ImportError("libcuda.so.1: cannot open shared object file")


class TritonError(Exception):
    """As triton.errors.TritonError, which is no RuntimeError either."""


class OutOfResources(TritonError):
    """What a tile that takes too much shared memory raises."""


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """List the units, or run one."""
    if unit["work"] == "plan":
        _plan(unit["stages"], emit)
        return
    if _poisoned:
        raise RuntimeError("CUDA error: the context of this process is gone")
    print(f"working on {unit['key']}")
    emit(milliseconds=1.5, item_bytes=2, relative_error=1e-7, before=True)
    time.sleep(float(os.environ.get("FAKE_GPU_SECONDS", "0")))
    _go_wrong(FAULTS.get(unit["key"]), emit)
    emit(after=True)


def _plan(stages: list[str], emit: Callable[..., None]) -> None:
    gpu, torch = (os.environ.get(f"FAKE_GPU_{name}") or None for name in ("NAME", "TORCH"))
    emit(facts={"gpu": gpu, "torch": torch, "commit": "none"})
    for stage in stages:
        if stage == os.environ.get("FAKE_GPU_PLAN"):
            emit(**{f"fault of {stage}": "KeyError: 'sm_90'"})
            continue
        units = [
            {
                "stage": stage,
                "key": f"{stage} {name}",
                "work": "fake",
                "limit": LIMIT,
                "sources": [f"{name}.py"],
                "shape": [1_280_000, 10, 512],
                "dtype": "bfloat16",
                "precision": "medium",
                "contender": os.environ.get("FAKE_GPU_CONTENDER", f"cuda of {stage}"),
                "informs": "FAKE_GPU_INFORMS" in os.environ,
            }
            for name in UNITS
        ]
        emit(**{f"units of {stage}": units})


def _go_wrong(kind: str | None, emit: Callable[..., None]) -> None:
    global _poisoned
    if kind == "triton":
        raise OutOfResources("out of resource: shared memory, Required: 262144\nand a page more")
    if kind == "cuda":
        _poisoned = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    if kind == "hang":
        run_child([sys.executable, "-c", "import time; time.sleep(60)"])
    if kind == "stray":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).wait()
    if kind == "nan":
        emit(relative_error=float("nan"), milliseconds=float("inf"))
        raise Wrong("relative error nan, at most 0.01 is right")
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        print("terminate called without an active exception")
        os._exit(3)
    if kind == "flood":
        for _ in range(20_000):
            print("PTX " * 30)
        os.abort()
