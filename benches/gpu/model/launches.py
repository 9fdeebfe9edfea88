"""Count what a job launches under graph capture; prints JSON.

Run with TRITON_INTERPRET=1 and the repository on the path, as
``python -m benches.gpu predict --count`` does.

For every regime of the Triton backend and for the CUDA backend: [launches of a job, launches of
each chunk]. Every operation of PyTorch that is no view and no allocation counts as one launch, as
every kernel of ours does; on a GPU some take two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from moso_fast.backends import Backend
from moso_fast.backends.cuda import backend as cuda
from moso_fast.backends.cuda import device as cuda_device
from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.backend import TritonBackend
from moso_fast.backends.triton.choice import REGIMES
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core import engine
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem
from moso_fast.util.native import load_native

ROWS, CLASSES, DIM = 96, 10, 64
# Of few_classes_whole: the status word and five kernels.
WHOLE = 6
# Nothing runs on the device for these.
_FREE = ("empty", "_local_scalar", "scalar_tensor", "detach", "split", "unbind", "alias")
_VIEWS = (
    *("view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("t.", "transpose", "permute", "as_strided", "unflatten", "lift"),
)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.inside = False  # an interpreted kernel: what it does is one launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::") + "."
        if not self.inside and not name.startswith((*_FREE, *_VIEWS)):
            self.launches += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_one(counter: _Count) -> Iterator[None]:
    """Count an interpreted kernel as one launch."""
    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.launches += 1
        counter.inside = True
        try:
            return run(self, *args, **kwargs)
        finally:
            counter.inside = False

    with patch.object(interpreter.GridExecutor, "__call__", call):
        yield


@contextmanager
def _captured() -> Iterator[None]:
    """Have everything believe that a graph is being captured."""
    with ExitStack() as stack:
        for module, name in (
            (engine, "_capturing"),
            (triton_regime, "capturing"),
            (triton_blas, "capturing"),
        ):
            stack.enter_context(patch.object(module, name, lambda problem: True))
        # What it does where the values are on a GPU.
        stack.enter_context(patch.object(engine, "sqnorm", lambda values: values.square().sum(1)))
        yield


def launches(backend: Backend, chunks: int) -> int:
    """Count the launches of one job in so many chunks, residuals kept."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, DIM, generator=g).bfloat16()
    weight = torch.randn(CLASSES, DIM, generator=g).bfloat16()
    labels = torch.randint(CLASSES, (ROWS,), generator=g)
    problem = build_problem(features, weight, labels, weight[:, 0])
    plan = Plan(ROWS // chunks, True, 0, 2**40)
    counter = _Count()
    with _captured(), _as_one(counter), patch.object(engine, "make_plan", lambda *given: plan):
        engine.run(problem, backend)  # first calls do more
        counter.launches = 0
        with counter:
            engine.run(problem, backend)
    return counter.launches


def _counted(run: Callable[[int], int], fewest: int = 1) -> list[int]:
    few, more = run(fewest), run(fewest + 1)
    return [few - fewest * (more - few), more - few]


def _cuda() -> dict[str, list[int]]:
    """Count for the CUDA backend, whose module does jobs of one chunk in one call."""
    limits = patch.object(cuda_device, "limits", lambda device: (232_448, 132))
    index = patch.object(cuda_device, "index", lambda device: 0)
    bulk = patch.object(cuda_device, "bulk_copies", lambda device: True)
    kernels = 0

    def launch(device: Any, function: Any, *jobs: Any) -> None:
        nonlocal kernels
        kernels += WHOLE if function.__name__ == "few_classes_whole" else 1

    def run(chunks: int) -> int:
        nonlocal kernels
        before = kernels
        found = launches(cuda.CudaBackend(), chunks)
        return found + (kernels - before) // 2  # run twice, counted once

    with limits, index, bulk, patch.object(cuda_device, "launch", launch):
        return {"cuda": _counted(run, fewest=2), "cuda whole": [run(1), 0]}


def main() -> None:
    """Print the counts."""
    found = {
        name: _counted(lambda chunks, name=name: launches(TritonBackend(name), chunks))
        for name in REGIMES
    }
    if load_native("_cuda").module is not None:
        found |= _cuda()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
