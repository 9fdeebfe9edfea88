"""Problems that the tests of the Triton backend share."""

from __future__ import annotations

import pytest
import torch
from core_support import Case

from moso_fast.backends.triton import backend as triton_backend
from moso_fast.core.problem import build_problem

needs_triton = pytest.mark.skipif(
    not triton_backend._installed(), reason="Triton has no wheel for this platform"
)


def problem_of(case: Case, **options):
    """The problem that a scoring call makes of a case."""
    return build_problem(*case.args, **case.options, **options)


def shape(
    classes: int,
    dim: int,
    heads: int = 1,
    rows: int = 4,
    dtype: torch.dtype = torch.float32,
    **options,
):
    """A problem of this shape without its memory."""
    weight = torch.zeros(1, 1, 1).expand(heads, classes, dim)
    features = torch.zeros(1, 1, dtype=dtype).expand(rows, dim)
    return build_problem(features, weight, torch.zeros(rows).long(), **options)
