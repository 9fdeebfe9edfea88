"""How long the smoke stage compiles, and that all of it compiles: measured here, without a GPU.

    python -m benches.gpu compile [--capability 90] [--save FILE.json]

Every case of the smoke stage goes through Triton's own just-in-time path with the arguments that
it will have, except that kernels are compiled for the GPU named and not launched. Times are of one
core of this machine, with an empty cache. The estimate lays the cases, in their order, on the
stage's processes, each after its own start.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from .check.stages import STAGES
from .table import OURS

# Of a process: imports (4 s on one slow core), the CUDA context and cuBLAS, and of a case the two
# jobs and their reference in float64. Assumed, to be measured.
STARTUP_SECONDS, CASE_SECONDS = 7.0, 0.5


@contextmanager
def compile_only(capability: int) -> Iterator[list[tuple[str, float]]]:
    """Have Triton compile for an absent GPU and launch nothing; yield names and seconds."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, float]] = []
    run = JITFunction.run

    def instead(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *given, grid=grid, warmup=True, **named)
        compiled.append((self.fn.__name__, time.perf_counter() - start))
        return kernel

    there = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    with patch.object(driver, "_active", there), patch.object(JITFunction, "run", instead):
        yield compiled


@contextmanager
def as_on_a_gpu() -> Iterator[Any]:
    """Yield the smoke stage's module, whose cases are those of Triton with a GPU."""
    from moso_fast.backends.triton import backend as triton

    from .check.work import smoke

    # The backend takes tensors of a CPU for its interpreter; everything else stays as it is.
    with (
        patch.dict(smoke._PREFERENCE, {"cpu": ("triton",)}),
        patch.object(triton, "interpreted", lambda: True),
    ):
        yield smoke


def measure(capability: int) -> list[dict[str, Any]]:
    """Compile every case once; return kernels and seconds of each, in the stage's order."""
    import torch

    from .check.work import kernels, timing

    found = []
    with compile_only(capability) as compiled, as_on_a_gpu() as smoke:
        for case in list(smoke.cases(torch.device("cpu"))):
            compiled.clear()
            dtype = timing.dtype_of(case["dtype"])
            data = list(smoke._data(smoke.ROWS[0], tuple(case["head"]), dtype, timing.device()))
            start = time.perf_counter()
            job = kernels.Passes(case["contender"], case["precision"], data)
            job.first()
            job.second()
            seconds = time.perf_counter() - start
            line = {**case, "kernels": list(compiled), "seconds": round(seconds, 2)}
            found.append(line)
            print(_line(line), flush=True)
    return found


def _line(case: dict[str, Any]) -> str:
    head = ",".join(str(part) for part in case["head"] if part is not None)
    name = f"{case['contender']} {head} {case['dtype']} {case['precision']}"
    return f"{case['seconds']:6.2f} s  {len(case['kernels'])} kernels  {name}"


def estimate(seconds: Sequence[float], workers: int) -> float:
    """Return when the last process is done, each taking the next case as it becomes free."""
    free = [STARTUP_SECONDS] * workers
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + each + CASE_SECONDS)
    return max(free)


def main(arguments: Sequence[str]) -> int:
    """Measure, estimate, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capability", type=int, default=90, help="sm_XX (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="write what was found to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing that an earlier run has compiled
        found = measure(options.capability)
    import triton

    from moso_fast.bench.facts import machine

    workers = next(stage.workers for stage in STAGES if stage.name == "smoke")
    # The other backends' cases, torch and cuda, compile nothing: a case each of every kind.
    others = [0.0] * 2 * 3 * len(OURS)
    wall = estimate([case["seconds"] for case in found] + others, workers)
    total = sum(case["seconds"] for case in found)
    print(
        f"Triton {triton.__version__}, sm_{options.capability}: {len(found)} cases, "
        f"{total:.0f} s of compiling on one core; smoke stage on {workers} processes: {wall:.0f} s"
    )
    if options.save is not None:
        report = {
            "triton": triton.__version__,
            "capability": options.capability,
            "assumed": {"startup_seconds": STARTUP_SECONDS, "case_seconds": CASE_SECONDS},
            "seconds_on_one_core": round(total, 1),
            "estimated_seconds": round(wall, 1),
            "workers": workers,
            "processor": machine()["processor"],
        }
        head = json.dumps(report, indent=1).removesuffix("\n}")
        # One line a case.
        lines = (json.dumps({**case, "kernels": len(case["kernels"])}) for case in found)
        text = ",\n  ".join(lines)
        options.save.write_text(f'{head},\n "cases": [\n  {text}\n ]\n}}\n', encoding="utf-8")
    return 0
