"""Times every shipped tile that could run a job, kernel by kernel, on its first real arguments.

Triton: each search point of the backend (``tile_for``) gets all its candidates timed with a
cleared L2 cache. CUDA C++: the plan for every amount of shared memory that gives another one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.cuda import jobs as cuda_jobs
from moso_fast.backends.triton import autotune as triton_autotune

from ..worker import described
from .kernels import Passes
from .timing import Clock, device, inputs, job_of

ROUNDS = 7
_SHARED_STEP = 8 * 1024


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Sweep the tiles of one contender on one job."""
    shape, dtype, precision = job_of(unit)
    data = inputs(shape, dtype, device())
    if unit["contender"] == "cuda":
        plans = []
        for line in cuda_plans(data, precision):
            plans.append(line)
            emit(plans=plans)
        return
    timer = triton_autotune.device_timer(device())

    def tell(key: str, lines: list[dict[str, Any]]) -> None:
        emit(**{key: lines})

    with every_tile(timer, tell):
        job = Passes(unit["contender"], precision, data)
        job.first()
        job.second()


@contextmanager
def every_tile(
    timer: Callable[[Callable[[], object]], float],
    tell: Callable[[str, list[dict[str, Any]]], None],
) -> Iterator[None]:
    """Have every search point time all its candidates and go on with its default."""

    def tile_for(
        where: torch.device, key: str, candidates: Sequence[Any], default: Any, launch: Any
    ) -> Any:
        lines = []
        for tile in candidates:
            line: dict[str, Any] = {"tile": str(tile), "default": tile == default}
            try:
                launch(tile)  # compiles
                times = [timer(lambda tile=tile: launch(tile)) for _ in range(ROUNDS)]
                line["milliseconds"] = 1e3 * statistics.median(times)
            except Exception as error:  # one that does not compile must not end the sweep
                line["why"] = described(error)
                if not _is_refusal(error):
                    lines.append(line)
                    tell(key, lines)
                    raise
            lines.append(line)
        tell(key, lines)
        return default

    searching = [
        module
        for name, module in sys.modules.items()
        if name.startswith("moso_fast.")
        and module is not triton_autotune
        and getattr(module, "tile_for", None) is triton_autotune.tile_for
    ]
    with ExitStack() as stack:
        for module in searching:
            stack.enter_context(patch.object(module, "tile_for", tile_for))
        yield


def _is_refusal(error: Exception) -> bool:
    """Whether the compiler or the device refused a tile, which leaves the device sound."""
    from triton.errors import TritonError

    return isinstance(error, TritonError)


def cuda_plans(data: list[torch.Tensor], precision: str) -> Iterator[dict[str, Any]]:
    """Time both passes under each plan that some amount of shared memory leads to."""
    problem = Passes("cuda", precision, data).problem
    most, planned = cuda_device.shared_limit(problem.device), cuda_jobs.plan_of
    clock, seen = Clock(problem.device), set()
    for limit in range(most, 0, -_SHARED_STEP):
        plan = planned(problem, limit)
        shape = plan["tile_rows"], plan["stages"], plan["parts"]
        if not plan["ok"] or shape in seen:
            continue
        seen.add(shape)
        with patch.object(
            cuda_jobs, "plan_of", lambda given, _limit, limit=limit: planned(given, limit)
        ):
            job = Passes("cuda", precision, data)
            job.first()
            times = {
                "first_milliseconds": 1e3 * clock.median(job.first, ROUNDS, ahead=True),
                "second_milliseconds": 1e3 * clock.median(job.second, ROUNDS, ahead=True),
            }
        name = f"{shape[0]} rows x {shape[1]} stages"
        yield {"plan": name, "shared_bytes": plan["first_bytes"], **times}
