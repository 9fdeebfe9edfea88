"""The CUDA C++ kernels on a GPU: every instantiation, CUDA graphs, long jobs.

What every backend must do is in test_gpu_backends.py, which runs this one too. Names that end in
``_small`` are what `make gpu-check` runs under compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch
from core_support import (
    FIELDS,
    Case,
    assert_close,
    prepared,
    random_case,
    relative_error,
)

from moso_fast import backends
from moso_fast.backends import get
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import last_layer_stats, moso_scores

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR = {"highest": 1e-5, "high": 2e-3, "medium": 1e-2}


@pytest.fixture(autouse=True)
def available() -> None:
    found = backends()["cuda"]
    if not found.available:
        pytest.skip(found.reason)


def on_gpu(case: Case) -> Case:
    moved = [None if tensor is None else tensor.cuda() for tensor in case.args]
    return Case(*moved, case.options)


def score(case: Case, **options):
    """Score, or skip where this GPU's shared memory is too small."""
    reason = get("cuda").supports(build_problem(*case.args, **case.options, **options))
    if reason is not None:
        pytest.skip(reason)
    return last_layer_stats(*case.args, backend="cuda", **case.options, **options)


def check(case: Case, precision: str, features: torch.Tensor | None = None) -> None:
    """Compare with float64; ``features`` on the GPU, with strides of their own, hold the case's."""
    exact = closed_form_stats(*case.args, **case.options)
    moved = on_gpu(case)
    if features is not None:
        moved = Case(features, *moved.args[1:], moved.options)
    stats = score(moved, precision=precision)
    for name in FIELDS:
        expected = getattr(exact, name)
        value = getattr(stats, name).cpu().reshape(expected.shape)
        assert_close(value, expected, ERROR[precision], floor=1e-7, what=name)
    expected = (exact.count * exact.alignment - exact.grad_sqnorm) / (exact.count - 1)
    assert relative_error(stats.scores().cpu().reshape(expected.shape), expected) <= (
        2 * ERROR[precision]
    )


@pytest.mark.parametrize("classes, dim", [(10, 2048), (16, 100), (32, 1024), (80, 512), (100, 512)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instantiation_small(dtype, exact, classes, dim) -> None:
    precision = "highest" if exact else "high" if dtype == torch.float32 else "medium"
    check(random_case("ids", n=600, c=classes, d=dim, dtype=dtype), precision)


@pytest.mark.parametrize(
    "n, c, d", [(2, 2, 33), (63, 15, 65), (65, 17, 100), (129, 8, 31), (1000, 3, 513)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_off_every_tile_small(dtype, n, c, d) -> None:
    check(random_case("ids", n=n, c=c, d=d, dtype=dtype), "highest")


@pytest.mark.parametrize("heads", [2, 7])
def test_stacked_heads_small(heads) -> None:
    check(random_case("ids_smoothed", n=300, c=10, d=256, heads=heads), "highest")


@pytest.mark.raw_memory
def test_jobs_of_different_size_share_a_kernel_in_one_graph() -> None:
    """The larger one's shared memory must outlive the launch of the smaller one behind it."""
    cases = [on_gpu(random_case("ids", n=500, c=10, d=d, seed=d)) for d in (1024, 64)]
    expected = [score(case).alignment for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [score(case).alignment for case in cases]
    graph.replay()
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_job(dtype) -> None:
    check(random_case("ids", n=200_000, c=10, d=128, dtype=dtype), "highest")


@pytest.mark.raw_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_once_and_replayed_on_other_data(dtype) -> None:
    cases = [on_gpu(random_case("ids", n=50_000, c=10, d=512, dtype=dtype, seed=s)) for s in (1, 2)]
    features, weight, labels, bias = (tensor.clone() for tensor in cases[0].args)

    def run() -> torch.Tensor:
        return moso_scores(features, weight, labels, bias, backend="cuda")

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = run()
    for case in cases:
        for buffer, value in zip((features, weight, labels, bias), case.args, strict=True):
            buffer.copy_(value)
        graph.replay()
        expected = moso_scores(*case.args, backend="cuda")
        assert torch.equal(scores, expected)


@pytest.mark.raw_memory
def test_nothing_waits_between_the_launches() -> None:
    """A pass returns while the GPU still sleeps: no launch may synchronise."""
    case = on_gpu(random_case("ids", n=20_000, c=10, d=256))
    problem = build_problem(*case.args)
    passes = prepared("cuda", problem)
    from moso_fast.core.engine import _allocate

    rows = slice(0, problem.rows)
    out = _allocate(problem)
    grad = torch.randn_like(problem.weight)
    alignment = torch.empty_like(out.loss)
    # Once before: kernels are loaded when they are first launched, and that may wait.
    first = passes.first(rows, out)
    passes.begin_second(grad, None)
    passes.second(rows, out, first.residual, alignment)
    del first  # its memory serves again: no allocation that may wait
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    start.record()
    first = passes.first(rows, out)
    passes.begin_second(grad, None)
    passes.second(rows, out, first.residual, alignment)
    end.record()
    assert not start.query() and not end.query()
    torch.cuda.synchronize()
    assert bool(torch.isfinite(alignment).all())


@pytest.mark.parametrize("start", [0, 5, 8])
@pytest.mark.parametrize("columns", [91, 96])
def test_features_inside_wider_rows_small(start, columns) -> None:
    """Rows at multiples of 16 bytes and at others: a copy to the GPU would lose the strides."""
    case = random_case("ids", n=333, c=10, d=77, dtype=torch.bfloat16)
    wide = torch.full((333, columns), float("nan"), dtype=torch.bfloat16, device="cuda")
    features = wide[:, start : start + 77]
    features.copy_(case.features)
    assert features.stride() == (columns, 1)
    check(case, "highest", features)
