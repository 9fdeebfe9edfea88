"""Every case and provider of the suite under pytest-benchmark.

    pytest benches/suites/bench_suite.py --benchmark-enable -k c10-d512

Results are compared with float64 first: a wrong one fails and gets no number. With
--benchmark-disable only that comparison runs, on few rows. `python -m benches run` is the same
suite with interleaved rounds, ratios, memory and charts.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from moso_fast.bench.cases import CASES, COMPILED_CASES, Case
from moso_fast.bench.inputs import Inputs, Result, errors_of, exact, make_inputs
from moso_fast.bench.providers import Provider, providers_for

CHECK_ROWS = 64  # whole sequences in every token case

PAIRS = [(case, p) for case in CASES.values() for p in providers_for(case, "benches.peers")]


@lru_cache(maxsize=1)
def problem(name: str, rows: int) -> tuple[Inputs, Result]:
    inputs = make_inputs(CASES[name], rows)
    return inputs, exact(CASES[name], inputs)


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=[f"{c.name}-{p.name}" for c, p in PAIRS])
def test_case(benchmark, case: Case, provider: Provider) -> None:
    rows = case.small if benchmark.enabled else min(case.small, CHECK_ROWS)
    inputs, truth = problem(case.name, rows)
    reason = provider.missing() or provider.refuse(case, inputs)
    if reason:
        pytest.skip(reason)
    if not benchmark.enabled and provider.compiles and case.name != COMPILED_CASES[0]:
        pytest.skip("compiled in one case alone where nothing is timed")
    job = provider.prepare(case, inputs)
    result = job() if benchmark.enabled else benchmark(job)
    errors = errors_of(result, truth)
    assert max(errors.values()) <= provider.tolerance(case), errors
    assert all(error == error for error in errors.values()), errors
    benchmark.group = case.name
    benchmark.extra_info.update(errors=errors, rows=rows)
    if benchmark.enabled:
        benchmark.pedantic(job, rounds=5)
