"""Cases on the GPU, scored there, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from core_support import FIELDS, Case, assert_stats_match

from moso_fast import backends
from moso_fast.backends import get
from moso_fast.core.problem import build_problem
from moso_fast.functional import LastLayerStats, last_layer_stats

SCORE_ERROR = {"highest": 1e-5, "high": 5e-3, "medium": 1e-2}


def on_gpu(case: Case, device: str = "cuda") -> Case:
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    moved = [None if tensor is None else tensor.to(device) for tensor in case.args]
    return Case(*moved, options)


def score(backend: str, case: Case, **options) -> LastLayerStats:
    """Score on the GPU; skip, with the backend's own reason, what it says it cannot run."""
    found = backends()[backend]
    if not found.available:
        pytest.skip(f"{backend}: {found.reason}")
    options = {**case.options, **options}
    checked = {name: value for name, value in options.items() if name != "chunk_size"}
    reason = get(backend).supports(build_problem(*case.args, **checked))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    stats = last_layer_stats(*case.args, backend=backend, **options)
    assert stats.backend == backend and stats.loss.is_cuda
    return stats


def assert_matches(stats: LastLayerStats, exact, tolerance: float, floor: float = 0.0) -> None:
    """Compare a GPU's result with a reference that lies on the CPU."""
    moved = {name: getattr(stats, name).cpu() for name in FIELDS}
    norm = torch.as_tensor(stats.mean_grad_sqnorm, dtype=torch.float64).cpu()
    stats = LastLayerStats(**moved, backend="", _mean_grad_sqnorm=norm.reshape(-1),
                           _count=torch.tensor(stats.count))  # fmt: skip
    assert_stats_match(stats, exact, tolerance, floor)


def exact_scores(exact) -> torch.Tensor:
    return (exact.count * exact.alignment - exact.grad_sqnorm) / (exact.count - 1)
