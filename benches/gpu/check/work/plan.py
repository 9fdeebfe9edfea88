"""The facts of this machine, and which units each stage has on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moso_fast.backends import backends
from moso_fast.backends.triton.choice import REGIMES

from ...pack import COMMIT
from ...table import DRY_TABLE, KINDS, OURS, TABLE, Shape
from ..worker import described
from . import smoke, suites, timing
from .calls import GRAPHED, STREAMED
from .peers import PEERS

ROOT = Path(__file__).resolve().parents[4]
KERNEL_ROWS, PROFILED = TABLE[:5], (TABLE[0], TABLE[2])
SWEPT = (TABLE[0], TABLE[2])
STREAMED_ROWS = (TABLE[0], TABLE[2])
ENERGY_ROWS = TABLE[:3]
VOCABULARY_ROWS = TABLE[-2:]
EVERYTHING = ("torch", "cuda", *(f"triton/{name}" for name in REGIMES))
# How the units of a stage are timed.
_TIMED = {
    name: (f"benches/gpu/check/work/{name}.py",)
    for name in ("kernels", "sweep", "profile", "calls", "peers")
}
# What is asked first of every row.
_ORDER = ("bfloat16", "medium"), ("float32", "highest"), ("float32", "high")
assert set(_ORDER) == set(KINDS)


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Emit the facts, then each stage's units; a stage that cannot be planned says why."""
    gpu = torch.cuda.is_available()
    emit(facts=facts(gpu))
    for stage in unit["stages"]:
        try:
            found = [
                {"stage": stage, **each, "key": f"{stage} {each['key']}"}
                for each in UNITS[stage](gpu)
            ]
            emit(**{f"units of {stage}": found})
        except Exception as error:  # whatever it is, the other stages have units
            emit(**{f"fault of {stage}": described(error)})


def facts(gpu: bool) -> dict[str, Any]:
    """GPU, driver, versions and commit."""
    changes = _ask("git", "status", "--porcelain", "--untracked-files=no")
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _ask("git", "rev-parse", "HEAD") or _packed_commit(),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class would have the main process import torch
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cuda_module": backends()["cuda"].reason,
        "gpu": None,
        "driver": None,
    }
    if not gpu:
        return found
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    answer = _ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0") or ""
    return found | {
        "gpu": properties.name,
        "driver": answer.split(",")[0].strip() or None,
        "state": answer,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def _packed_commit() -> str | None:
    """Where there is no git: what the variable or the pack says."""
    packed = COMMIT.read_text(encoding="utf-8").strip() if COMMIT.is_file() else None
    return os.environ.get("MOSO_FAST_COMMIT") or packed


def _ask(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    child = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    return child.stdout.strip() if child.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


Units = Iterator[dict[str, Any]]


def _smoke(gpu: bool) -> Units:
    for case in smoke.cases(timing.device()):
        head = ",".join(str(part) for part in case["head"] if part is not None)
        key = f"{case['contender']} {head} {case['dtype']} {case['precision']}"
        limit = 20.0 if case["contender"].startswith("triton") else 10.0
        yield {"key": key, "work": "smoke", "limit": limit, "sources": [case["contender"]], **case}


def _ceilings(gpu: bool) -> Units:
    for name in ("memory", *reversed(OURS)):
        own = "benches/gpu/check/work/ceilings.py"
        yield {"key": name, "work": "ceilings", "limit": 30.0, "sources": [own], "ceiling": name}


def _jobs(rows: tuple[Shape, ...], gpu: bool) -> Iterator[tuple[Shape, str, str, str]]:
    """Every row of the table (small ones without a GPU) with every dtype and precision."""
    for dtype, precision in _ORDER:
        for shape in rows if gpu else DRY_TABLE:
            yield shape, dtype, precision, f"{','.join(map(str, shape))} {dtype} {precision}"


def _unit(
    stage: str, work: str, shape: Shape, dtype: str, precision: str, job: str, contender: str
) -> dict[str, Any]:
    where = timing.device()
    ours = []
    if contender not in PEERS:
        ours.append(timing.sources(contender, shape, dtype, precision, where))
    return {
        "key": f"{job} {contender}",
        "work": work,
        # Compiles nothing, and is the one that could wait for ever.
        "limit": 12.0 if contender == "cuda" and stage != "compile" else 30.0,
        "sources": [*ours, *_TIMED[work]],
        "shape": shape,
        "dtype": dtype,
        "precision": precision,
        "contender": contender,
    }


def _prediction(
    function: str, shape: Shape, dtype: str, precision: str, contender: str
) -> dict[str, Any]:
    """Return what the model says of a contender here: "predicted", or why there is nothing.

    Whatever is wrong with a prediction must not cost the timing that it would stand beside.
    """
    if not torch.cuda.is_available():
        return {}
    try:
        from ...model import jobs, roofline

        gpu = roofline.measured(torch.cuda.get_device_name(), {}, timing.device())
        predict = getattr(jobs, function)
        return {"predicted": predict(shape, timing.dtype_of(dtype), precision, contender, gpu)}
    except Exception as error:
        return {"no_prediction": described(error)}


def _kernels(gpu: bool) -> Units:
    """Yield what has never been timed, tiles, then what is made of cuBLAS and PyTorch."""
    where, units = timing.device(), []
    for row, (shape, dtype, precision, job) in enumerate(_jobs(KERNEL_ROWS, gpu)):
        for name in timing.contenders(shape, dtype, precision, where):
            unit = _unit("kernels", "kernels", shape, dtype, precision, job, name)
            unit |= _prediction("pass_seconds", shape, dtype, precision, name)
            kind = _ORDER.index((dtype, precision))
            units.append(((_rank(name), kind, row), unit))
            if shape in SWEPT and kind < 2 and _rank(name) == 0:
                sweep = _unit("kernels", "sweep", shape, dtype, precision, job, name)
                units.append(((0.5, kind, row), {**sweep, "key": f"{sweep['key']}, tiles"}))
    yield from _ordered(units)


def _rank(contender: str) -> int:
    """First our kernels as they are chosen, then the regimes that are not, then PyTorch."""
    if contender in ("cuda", "triton", "cpu"):
        return 0
    return 2 if contender == "torch" else 1


def _ordered(units: list[tuple[Any, dict[str, Any]]]) -> Units:
    """Units by rank; within one the first kind of all rows, then the next."""
    for _, unit in sorted(units, key=lambda each: each[0]):
        yield unit


def _profile(gpu: bool) -> Units:
    """One process for all: to start one under ncu takes longer than to profile a kernel."""
    where, jobs = timing.device(), []
    for shape, dtype, precision, _ in _jobs(PROFILED, gpu):
        if (dtype, precision) == _ORDER[0]:
            for name in timing.contenders(shape, dtype, precision, where):
                if _rank(name) == 0:
                    job = {"shape": shape, "dtype": dtype, "precision": precision}
                    jobs.append({**job, "contender": name})
    yield {
        "key": "both passes",
        "work": "profile",
        "limit": 60.0,
        "sources": [*EVERYTHING, *_TIMED["profile"]],
        "jobs": jobs,
        "informs": True,
    }


def _calls(gpu: bool) -> Units:
    """Ours as they are chosen, then eager PyTorch, kind by kind; everything else behind them."""
    where, units = timing.device(), []
    for row, (shape, dtype, precision, job) in enumerate(_jobs(TABLE, gpu)):
        kind = _ORDER.index((dtype, precision))
        for name in ("eager", *timing.contenders(shape, dtype, precision, where)):
            unit = _unit("calls", "calls", shape, dtype, precision, job, name)
            unit["informs"] = name == "eager"
            first = name == "eager" or _rank(name) == 0
            unit["energy"] = shape in ENERGY_ROWS and kind == 0 and first
            if name != "eager":
                job_of = shape, dtype, precision
                unit |= _prediction("predicted_seconds", *job_of, name)
                if name in GRAPHED:
                    graph = _prediction("predicted_seconds", *job_of, f"{name} (graph)")
                    unit["predicted_graph"] = graph.get("predicted")
            units.append(((not first, kind, _rank(name) + (name == "eager"), row), unit))
        if shape in VOCABULARY_ROWS and kind == 0:
            for name in PEERS:
                unit = _unit("calls", "peers", shape, dtype, precision, job, name)
                units.append(((False, kind, 2, row), {**unit, "informs": True}))
    yield from _ordered(units)
    for shape in STREAMED_ROWS if gpu and backends()["triton"].available else ():
        for crossings in (1, 2):
            job = f"{','.join(map(str, shape))} bfloat16 medium"
            unit = _unit("calls", "calls", shape, "bfloat16", "medium", job, "triton")
            key = f"{job} from main memory, {crossings} crossing(s)"
            yield {**unit, "key": key, "contender": STREAMED, "crossings": crossings}


def _tests(gpu: bool) -> Units:
    for name in suites.files():
        yield {
            "key": name,
            "name": name,
            "work": "suites",
            "limit": 90.0,
            "sources": [name, *(("cuda",) if name == suites.CUDA_TESTS else EVERYTHING)],
            "tests": [name, "-m", "not whole_gpu"],
            "together": gpu,
        }
    alone = "tests of the whole GPU"
    yield {
        "key": alone,
        "name": alone,
        "work": "suites",
        "limit": 90.0,
        "sources": [*suites.files(), *EVERYTHING],
        "tests": ["tests/gpu", "-m", "whole_gpu"],
    }


def _compile(gpu: bool) -> Units:
    for shape, dtype, precision, job in _jobs(TABLE[:9], gpu):
        unit = _unit("compile", "calls", shape, dtype, precision, job, "compile")
        yield {**unit, "limit": 60.0, "informs": True}


def _sanitizer(gpu: bool) -> Units:
    for check in suites.checks(backends()["cuda"].available or not gpu):
        of_cuda = check["tests"][0] == suites.CUDA_TESTS
        yield {
            **check,
            "key": check["name"],
            "work": "suites",
            "limit": 280.0,
            "sources": [check["tests"][0], *(("cuda",) if of_cuda else EVERYTHING)],
        }


def _network(gpu: bool) -> Units:
    own = "benches/gpu/check/work/network.py"
    yield {"key": "ResNet-50", "work": "network", "limit": 120.0, "sources": [own], "gpu": gpu}


def _pruning(gpu: bool) -> Units:
    own = "benches/gpu/check/work/pruning.py"
    sources = [own, *EVERYTHING]
    yield {"key": "digits", "work": "pruning", "limit": 180.0, "sources": sources, "gpu": gpu}


UNITS: dict[str, Callable[[bool], Units]] = {
    "smoke": _smoke,
    "ceilings": _ceilings,
    "kernels": _kernels,
    "profile": _profile,
    "calls": _calls,
    "tests": _tests,
    "compile": _compile,
    "sanitizer": _sanitizer,
    "network": _network,
    "pruning": _pruning,
}
