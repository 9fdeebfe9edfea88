"""A problem of a given shape that takes no memory, for the backends to be asked about."""

from __future__ import annotations

import torch

from moso_fast.core.problem import Problem, build_problem

from .table import Shape


def outline(
    shape: Shape,
    dtype: torch.dtype,
    precision: str,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
) -> Problem:
    """Describe a problem of this shape without its memory.

    On a CPU the backends answer for a GPU of compute capability 9.0.
    """
    n, c, d = shape
    row = torch.zeros(1, d, device=device)  # float32 heads are taken as they are: no copy
    labels = torch.zeros(1, dtype=torch.long, device=device).expand(n)
    features, bias = row.to(dtype).expand(n, d), row[0, :1].expand(c)
    return build_problem(features, row.expand(c, d), labels, bias, precision=precision)
