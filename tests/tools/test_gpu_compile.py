"""Triton's own just-in-time path on this machine: everything but the launch.

The interpreter never compiles, and the ahead-of-time tests write signatures of their own. What a
user's first call goes through on a GPU, from the tensors to the binary, is run here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="nothing to compile with")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Any:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return importlib.import_module("benches.gpu.compile_times")


def passes(tool: Any, contender: str, precision: str, data: list[torch.Tensor]) -> list[str]:
    """Compile both passes of a regime; return the names of the kernels."""
    kernels = importlib.import_module("benches.gpu.check.work.kernels")
    with tool.compile_only(90) as compiled:
        job = kernels.Passes(contender, precision, data)
        job.first()
        job.second()
        before = len(compiled)
        job.first()  # from the cache: what is checked at every launch
        job.second()
        assert len(compiled) == 2 * before
    return [name for name, _ in compiled[:before]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype, precision", [("bfloat16", "medium"), ("float32", "highest")])
@pytest.mark.parametrize(
    "contender, head",
    [
        ("triton/row_tiles", (None, 100, 512)),
        ("triton/row_tiles", (None, 10, 190)),
        ("triton/few_classes", (3, 10, 256)),
        ("triton/recompute", (None, 1000, 192)),
        ("triton/stored", (None, 100, 192)),
        ("triton/stored", (None, 300, 192)),  # the alignment's other order
        ("triton/blas", (None, 10, 512)),
        ("triton/blas", (None, 300, 190)),  # the other order of its last product
    ],
)
def test_a_regime_compiles_and_is_launched_again(tool, contender, head, dtype, precision) -> None:
    smoke = importlib.import_module("benches.gpu.check.work.smoke")
    data = smoke._data(600, head, getattr(torch, dtype), torch.device("cpu"))
    assert passes(tool, contender, precision, list(data))


@pytest.mark.exhaustive
def test_other_losses_compile(tool) -> None:
    problem = importlib.import_module("moso_fast.core.problem")
    kernels = importlib.import_module("benches.gpu.check.work.kernels")
    g = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, 64, generator=g) for n in (50, 7))
    targets = torch.rand(50, 7, generator=g)
    for loss in ("binary_cross_entropy", "mse"):
        for regime in ("row_tiles", "few_classes", "stored"):
            data = [features, weight, targets, weight[:, 0].contiguous()]
            build = problem.build_problem

            def with_loss(*given: Any, loss: str = loss, build: Any = build, **named: Any) -> Any:
                return build(*given, loss=loss, **named)

            with pytest.MonkeyPatch.context() as patch, tool.compile_only(90) as compiled:
                patch.setattr(kernels, "build_problem", with_loss)
                job = kernels.Passes(f"triton/{regime}", "highest", data)
                for _ in range(2):
                    job.first()
                    job.second()
            assert compiled


def test_every_global_of_a_kernel_is_equal_to_itself(tool) -> None:
    """Triton refuses the launch of a kernel whose globals differ from what they were: NaN does."""
    import triton.language as tl

    kernels = importlib.import_module("moso_fast.kernels.common").__file__
    found = 0
    for path in Path(str(kernels)).parent.glob("*.py"):
        module = importlib.import_module(f"moso_fast.kernels.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, tl.constexpr):
                found += 1
                assert value.value == value.value, f"{path.name}: {name}"
    assert found > 3


def test_the_estimate_is_the_last_process_of_the_stage(tool) -> None:
    start, each = tool.STARTUP_SECONDS, tool.CASE_SECONDS
    assert tool.estimate([], 8) == start
    assert tool.estimate([1.0] * 8, 8) == start + 1 + each
    assert tool.estimate([4.0, 1.0, 1.0], 2) == start + max(4 + each, 2 * (1 + each))
