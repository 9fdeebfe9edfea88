"""Runs of backend="cuda" beside the definition in float64."""

from __future__ import annotations

import functools

import torch
from core_support import Case, assert_close, assert_stats_match, prepared

from moso_fast.core.engine import _allocate
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import last_layer_stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
score = functools.partial(last_layer_stats, backend="cuda")


def run(case: Case, **options):
    """Return the statistics of a case, with other options where they are named."""
    return score(*case.args, **{**case.options, **options})


def exact_scores(exact) -> torch.Tensor:
    """Return the scores that follow from exact statistics."""
    return (exact.count * exact.alignment - exact.grad_sqnorm) / (exact.count - 1)


def check(case: Case, tolerance: float, **options) -> None:
    """Compare the statistics and scores of a case with the definition in float64."""
    exact = closed_form_stats(*case.args, **case.options)
    stats = run(case, **options)
    assert_stats_match(stats, exact, tolerance, floor=1e-7)
    if exact.count > 1:
        expected = exact_scores(exact)
        scores = stats.scores().reshape(expected.shape)
        assert_close(scores, expected, tolerance, floor=1e-7, what="scores")


def first_pass_of(gpu, case: Case, **options):
    """Run the first pass alone on the backend ``gpu``; return what it leaves of every row."""
    problem = build_problem(*case.args, **case.options, **options)
    out = _allocate(problem)
    prepared(gpu, problem, problem.rows).first(slice(0, problem.rows), out)
    return out
