"""Every regime of the Triton backend on the GPU, forced; streaming, graph capture, the search.

Names that end in ``_small`` are what `make gpu-check` runs under compute-sanitizer.
"""

from __future__ import annotations

import json

import pytest
import torch
from core_support import FIELDS, Case, assert_close, confident_case, generator, random_case
from gpu_support import (
    SCORE_ERROR,
    assert_matches,
    exact_scores,
    on_gpu,
    score,
)

from moso_fast.backends import backends
from moso_fast.backends.triton import autotune as triton_autotune
from moso_fast.backends.triton.choice import REGIME_VARIABLE, REGIMES
from moso_fast.core import memory
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.core.streaming import CudaLane, StreamedFeed
from moso_fast.functional import explain, last_layer_stats

pytestmark = pytest.mark.gpu


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch) -> str:
    """Force a regime for the test."""
    if not backends()["triton"].available:
        pytest.skip(f"triton: {backends()['triton'].reason}")
    monkeypatch.setenv(REGIME_VARIABLE, request.param)
    return request.param


# Every kernel is compiled for its shape, a second or so each: few shapes, the same ones again.
@pytest.mark.parametrize("kind", ["ids_smoothed", "soft_smoothed", "binary", "mse"])
def test_losses_small(kind, regime) -> None:
    case = random_case(kind, n=37, heads=3)
    exact = explicit_stats(*case.args, **case.options)
    for options in ({}, {"chunk_size": 16}):
        assert_matches(score("triton", on_gpu(case), **options), exact, 1e-5, floor=1e-6)


@pytest.mark.parametrize("classes, dim", [(1, 3), (31, 129), (129, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_off_every_tile_small(classes, dim, dtype, regime) -> None:
    case = random_case("ids", n=67, c=classes, d=dim, dtype=dtype)
    stats = score("triton", on_gpu(case), precision="highest")
    assert_matches(stats, closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("classes, dim", [(10, 512), (1000, 192)])
@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.float32, "highest"), (torch.float32, "medium"), (torch.bfloat16, "medium")],
)
def test_precisions(dtype, precision, classes, dim, regime) -> None:
    case = random_case("ids", n=20_000, c=classes, d=dim, dtype=dtype)
    exact = closed_form_stats(*case.args)
    stats = score("triton", on_gpu(case), precision=precision)
    assert_matches(stats, exact, SCORE_ERROR[precision])
    assert_close(stats.scores().cpu(), exact_scores(exact)[0], SCORE_ERROR[precision])


def test_confident_model(regime) -> None:
    case = confident_case()
    assert_matches(score("triton", on_gpu(case)), closed_form_stats(*case.args), 1e-5)


@pytest.mark.raw_memory
@pytest.mark.parametrize("classes, dim", [(10, 512), (1000, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bitwise_equal_over_runs(dtype, classes, dim, regime) -> None:
    case = on_gpu(random_case("ids", n=30_001, c=classes, d=dim, dtype=dtype))
    first = score("triton", case)
    for _ in range(3):
        again = score("triton", case)
        for name in FIELDS:
            assert torch.equal(getattr(again, name), getattr(first, name)), name


def test_bad_rows_are_named_small(regime) -> None:
    case = on_gpu(random_case("ids", n=30))
    labels, features = case.labels.clone(), case.features.clone()
    labels[21], features[17, 2] = 5, float("nan")
    with pytest.raises(ValueError, match=r"^labels\[21\] is 5, outside \[0, 5\)"):
        score("triton", Case(case.features, case.weight, labels, case.bias))
    with pytest.raises(ValueError, match=r"^features\[17, 2\] is nan; row 17 is the first"):
        score("triton", Case(features, *case.args[1:]))
    kept = [row for row in range(30) if row != 17]
    exact = closed_form_stats(
        *(t.cpu() for t in (features[kept], case.weight, case.labels[kept], case.bias))
    )
    stats = score("triton", Case(features, *case.args[1:]), nonfinite="exclude")
    for name in FIELDS:
        assert_close(getattr(stats, name)[kept].cpu(), getattr(exact, name)[0], 1e-5, what=name)


@pytest.mark.whole_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_more_than_2_to_the_31_features(dtype, regime) -> None:
    """The same row again and again; D = 512, which the tiles for few classes hold too."""
    rows, dim, classes = 4_300_000, 512, 4
    row = torch.randn(1, dim, generator=generator(5)).to(dtype)
    weight = (torch.randn(classes, dim, generator=generator(6)) / dim**0.5).to(dtype).float()
    labels = torch.arange(rows) % classes
    features = row.cuda().expand(rows, dim).contiguous()  # an address of its own for each
    case = Case(features, weight.cuda(), labels.cuda(), None)
    stats = score("triton", case, precision="highest")
    exact = closed_form_stats(row.expand(classes, dim), weight, torch.arange(classes))
    index = torch.tensor([0, 1, 2, 3, rows - 4, rows - 3, rows - 2, rows - 1])
    for name in FIELDS:
        expected = getattr(exact, name)[0].repeat(2)
        assert_close(getattr(stats, name).cpu()[index], expected, 1e-4, what=name)


def test_graph_capture(regime) -> None:
    case = on_gpu(random_case("ids", n=5000, c=10, d=512, dtype=torch.bfloat16))
    other = on_gpu(random_case("ids", n=5000, c=10, d=512, dtype=torch.bfloat16, seed=1))
    expected = score("triton", other)  # compiles the kernels, grows the pools
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = last_layer_stats(*case.args, backend="triton", **case.options)
    for static, new in zip(case.args, other.args, strict=True):
        if static is not None and new is not None:
            static.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert stats.count == expected.count
    for name in FIELDS:
        # Under capture cuBLAS cuts a product otherwise: 1.6e-6 of the alignments on an H200.
        assert_close(getattr(stats, name), getattr(expected, name), 1e-5, what=name)


def host_case(n: int = 50_000, **options) -> Case:
    """Features in main memory, the head and the labels on the GPU."""
    case = random_case("ids", n=n, c=10, d=64, **options)
    moved = on_gpu(case)
    return Case(case.features, moved.weight, moved.labels, moved.bias, case.options)


@pytest.mark.parametrize(
    "pinned, resident_rows", [(False, 0), (False, 20_000), (True, 0), (True, 10**6)]
)
def test_features_in_main_memory(pinned, resident_rows, regime, monkeypatch) -> None:
    case = host_case()
    features = case.features.pin_memory() if pinned else case.features
    row = features.shape[1] * features.element_size()
    monkeypatch.setattr(memory, "CHUNK_BYTES", 7_000 * row)
    monkeypatch.setattr(memory, "resident_budget", lambda *arguments: resident_rows * row)
    stats = score("triton", Case(features, *case.args[1:], case.options))
    expected = score("triton", on_gpu(case))
    for name in FIELDS:
        assert_close(getattr(stats, name), getattr(expected, name), 1e-4, what=name)
    stay = 50_000 if resident_rows > 50_000 else resident_rows // 7_000 * 7_000
    assert f"; {stay} of 50000 rows stay on" in explain(features, *case.args[1:], backend="triton")


def test_torch_streams_too_and_bad_rows_are_named() -> None:
    case = host_case(1000)
    assert_matches(score("torch", case), closed_form_stats(*(t.cpu() for t in case.args)), 1e-5)
    case.features[913, 5] = float("inf")
    with pytest.raises(ValueError, match=r"^features\[913, 5\] is inf"):
        score("torch", case)


def test_streamed_chunks_are_whole_when_they_are_read() -> None:
    """Many chunks on a busy device: a copy too early or too late would show."""
    rows, dim, step = 4096 * 64, 256, 4096
    features = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, dim).contiguous()
    problem = build_problem(
        features, torch.zeros(2, dim, device="cuda"), torch.zeros(rows, dtype=torch.long)
    )
    chunks = [slice(at, at + step) for at in range(0, rows, step)]
    feed = StreamedFeed(problem, chunks, CudaLane(problem.device), 5 * step * dim * 4)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for steps in (feed.first_pass(), feed.second_pass()):
        for number in steps:
            torch.cuda._sleep(200_000)
            chunk = chunks[number]
            expected = torch.arange(chunk.start, chunk.stop, dtype=torch.float32, device="cuda")
            wrong += (feed.problem.feature_rows(chunk) != expected[:, None]).sum()
    feed.close()
    assert int(wrong) == 0


def test_search_keeps_a_winner_and_the_result(regime, monkeypatch, tmp_path) -> None:
    case = on_gpu(random_case("ids", n=20_000, c=10, d=512, dtype=torch.bfloat16))
    expected = score("triton", case)
    monkeypatch.setenv("MOSO_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("MOSO_FAST_CACHE", str(tmp_path))
    triton_autotune.cache_of.cache_clear()
    try:
        found = score("triton", case)
    finally:
        triton_autotune.cache_of.cache_clear()
    for name in FIELDS:
        assert_close(getattr(found, name), getattr(expected, name), 1e-2, what=name)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())
