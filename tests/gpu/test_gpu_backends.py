"""Every backend that "auto" may take on a GPU, on the GPU, against the definition in float64.

Names that end in ``_small`` are what `make gpu-check` runs under compute-sanitizer.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from core_support import (
    FIELDS,
    KINDS,
    Case,
    assert_close,
    confident_case,
    generator,
    random_case,
    rank_correlation,
)
from gpu_support import SCORE_ERROR, assert_matches, exact_scores, on_gpu, score

from moso_fast import backends
from moso_fast.backends import _PREFERENCE, choose, get
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import LastLayerStats, explain, last_layer_stats, moso_scores

pytestmark = pytest.mark.gpu

each_backend = pytest.mark.parametrize("backend", _PREFERENCE["cuda"])


def score_error(stats: LastLayerStats, exact) -> float:
    """Error of the scores relative to what they are the difference of, N a and q over N - 1.

    With fewer samples than classes random gradients are nearly orthogonal and N a is nearly q: a
    score of 100 rows of 50,257 classes is 1/2700 of either, and no arithmetic has its last digits.
    """
    truth = exact_scores(exact)[0]
    terms = truth.norm() + exact.grad_sqnorm[0].norm() / (exact.count - 1)
    return float((stats.scores().cpu().double() - truth).norm() / terms)


@pytest.mark.parametrize("classes", [5, 100])
def test_auto_takes_kernels_of_ours_where_they_are_proven(classes) -> None:
    case = on_gpu(random_case("ids", c=classes))
    problem = build_problem(*case.args)
    chosen, reasons = choose(problem)
    major = torch.cuda.get_device_capability()[0]
    if backends()["cuda"].available and get("cuda").not_by_default(problem) is None:
        assert chosen.name == "cuda" and classes == 5, reasons
    elif backends()["triton"].available and major in (8, 9, 10):
        assert chosen.name == "triton", reasons
    assert f"backend   {chosen.name}" in explain(*case.args)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@each_backend
def test_every_loss_small(backend, kind, heads) -> None:
    case = random_case(kind, n=37, heads=heads)
    exact = explicit_stats(*case.args, **case.options)
    for options in ({}, {"chunk_size": 16}):
        assert_matches(score(backend, on_gpu(case), **options), exact, 1e-5, floor=1e-6)


@pytest.mark.parametrize("classes, dim", [(1, 3), (2, 1), (33, 8), (129, 65), (1025, 40)])
@each_backend
def test_shapes_off_every_tile_small(backend, classes, dim) -> None:
    case = random_case("ids", n=67, c=classes, d=dim)
    assert_matches(score(backend, on_gpu(case)), closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("classes", [10, 100, 1000, 9000, 50_257])
@pytest.mark.parametrize("precision", SCORE_ERROR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_backend
def test_dtypes_and_precisions(backend, dtype, precision, classes) -> None:
    case = random_case("ids", n=100 if classes > 1000 else 5000, c=classes, d=192, dtype=dtype)
    exact = closed_form_stats(*case.args)
    tolerance = SCORE_ERROR[precision] if dtype != torch.float64 else 1e-11
    case = on_gpu(case)
    stats = score(backend, case, precision=precision)
    assert stats.loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_matches(stats, exact, tolerance)
    assert score_error(stats, exact) <= tolerance
    again = score(backend, case, precision=precision, chunk_size=1000)
    assert_matches(again, exact, tolerance)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("chunk_size", [None, 600])
@each_backend
def test_sequences_small(backend, chunk_size, precision) -> None:
    offsets = torch.tensor([0, 7, 7, 300, 1000])
    case = random_case("ids", n=1000, c=20, d=64, cu_seqlens=offsets, dtype=torch.bfloat16)
    exact = explicit_stats(*case.args, **case.options)
    stats = score(backend, on_gpu(case), chunk_size=chunk_size, precision=precision)
    assert_matches(stats, exact, SCORE_ERROR[precision])


@each_backend
def test_confident_model(backend) -> None:
    case = confident_case()
    exact = closed_form_stats(*case.args)
    stats = score(backend, on_gpu(case))
    assert_matches(stats, exact, 1e-5)
    for value, truth in (
        (stats.loss, exact.loss[0]),
        (stats.grad_sqnorm, exact.grad_sqnorm[0]),
        (stats.scores(), exact_scores(exact)[0]),
    ):
        assert rank_correlation(value.cpu(), truth) > 0.9999


@each_backend
def test_many_equal_rows(backend) -> None:
    case = Case(
        torch.randn(1, 6, generator=generator(1)).expand(100_000, 6),
        torch.randn(3, 6, generator=generator(2)),
        torch.zeros(100_000, dtype=torch.long),
        torch.ones(3),
    )
    assert_matches(score(backend, on_gpu(case)), closed_form_stats(*case.args), 1e-5)


@pytest.mark.raw_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 1000])
@each_backend
def test_bitwise_equal_over_runs(backend, classes, dtype) -> None:
    case = on_gpu(random_case("ids", n=30_001, c=classes, d=128, dtype=dtype))
    first = score(backend, case)
    for _ in range(3):
        again = score(backend, case)
        for name in FIELDS:
            assert torch.equal(getattr(again, name), getattr(first, name)), name
        assert torch.equal(again.scores(), first.scores())


@pytest.mark.raw_memory
@each_backend
def test_follows_the_current_stream(backend) -> None:
    case = on_gpu(random_case("ids", n=5000, c=100, d=256))
    expected = score(backend, case)
    stream = torch.cuda.Stream()
    late = torch.full_like(case.features, float("nan"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(case.features)  # right only for what runs behind it on this stream
        stats = score(backend, Case(late, *case.args[1:], case.options))
    torch.cuda.current_stream().wait_stream(stream)
    for name in FIELDS:
        assert_close(getattr(stats, name), getattr(expected, name), 1e-6, what=name)


@pytest.mark.raw_memory
@each_backend
def test_a_call_waits_once(backend) -> None:
    """The host reads everything that a call is judged by in one transfer, at the end."""
    # bfloat16: float32 goes to cuBLAS, which looks at the norms first.
    case = on_gpu(random_case("ids", n=5000, c=10, d=256, dtype=torch.bfloat16))
    score(backend, case)  # compiles, and grows pools
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            last_layer_stats(*case.args, backend=backend, **case.options)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


@each_backend
def test_under_torch_compile(backend) -> None:
    case = on_gpu(random_case("ids", n=500, c=20, d=64))
    expected = score(backend, case).scores()

    def function(features):
        return 2.0 * moso_scores(features, *case.args[1:], backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    assert_close(compiled(case.features), 2.0 * expected, 1e-6)


@each_backend
def test_a_device_that_is_not_the_current_one(backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    case = random_case("ids", n=500, c=20, d=64)
    stats = score(backend, on_gpu(case, "cuda:1"))
    assert stats.loss.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_matches(stats, closed_form_stats(*case.args), 1e-5)


@pytest.mark.whole_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_backend
def test_more_than_2_to_the_31_features(backend, dtype) -> None:
    """The same row again and again, each at an address of its own: N D exceeds 32 bits."""
    rows, dim, classes = 1_100_000, 2048, 4
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free device memory")
    row = torch.randn(1, dim, generator=generator(5)).to(dtype)
    weight = (torch.randn(classes, dim, generator=generator(6)) / dim**0.5).to(dtype).float()
    labels = torch.arange(rows) % classes
    features = row.cuda().expand(rows, dim).contiguous()
    case = Case(features, weight.cuda(), labels.cuda(), None)
    stats = score(backend, case, precision="highest")
    # One row of every label tells all: rows with equal labels are equal, counts are equal.
    exact = closed_form_stats(row.expand(classes, dim), weight, torch.arange(classes))
    index = torch.tensor([0, 1, 2, 3, rows - 4, rows - 3, rows - 2, rows - 1])
    for name in FIELDS:
        expected = getattr(exact, name)[0].repeat(2)
        assert_close(getattr(stats, name).cpu()[index], expected, 1e-4, what=name)
    assert stats.count == rows


@pytest.mark.whole_gpu
@each_backend
def test_more_than_2_to_the_31_logits(backend) -> None:
    rows, dim, classes = 1_100_000, 8, 2048
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free device memory")
    row = torch.randn(1, dim, generator=generator(5))
    weight = torch.randn(classes, dim, generator=generator(6))
    labels = torch.arange(rows) % classes
    case = Case(row.expand(rows, dim), weight, labels, None)
    # Triton's kernels get all of them at once; PyTorch alone would take several copies.
    chunk_size = rows if backend == "triton" else None
    stats = score(backend, on_gpu(case), chunk_size=chunk_size)
    exact = closed_form_stats(row.expand(classes, dim), weight, torch.arange(classes))
    last = slice(rows - 5, rows)
    for name in ("loss", "el2n", "margin", "entropy", "grad_sqnorm"):
        expected = getattr(exact, name)[0][labels[last]]
        assert_close(getattr(stats, name)[last].cpu(), expected, 1e-5, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 8])
@each_backend
def test_ignored_rows_may_hold_anything_small(backend, chunk_size, dtype) -> None:
    case = random_case("ids", n=30, dtype=dtype)
    labels, features = case.labels.clone(), case.features.clone()
    labels[[3, 29]] = -100
    features[3], features[29, 2] = float("nan"), float("inf")
    kept = labels != -100
    exact = closed_form_stats(features[kept], case.weight, labels[kept], case.bias)
    moved = on_gpu(Case(features, case.weight, labels, case.bias))
    stats = score(backend, moved, chunk_size=chunk_size, precision="highest")
    for name in FIELDS:
        value = getattr(stats, name).cpu()
        assert value[~kept].isnan().all(), name
        assert_close(value[kept], getattr(exact, name)[0], 1e-5, what=name)


@each_backend
def test_excluded_rows_small(backend) -> None:
    case = random_case("ids", n=30, nonfinite="exclude")
    case.features[4, 1] = float("nan")
    exact = closed_form_stats(*case.args, **case.options)
    assert exact.count == 29
    assert_matches(score(backend, on_gpu(case)), exact, 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 8])
@each_backend
def test_bad_rows_are_named_small(backend, chunk_size) -> None:
    case = on_gpu(random_case("ids", n=30))
    for label in (5, -1, 2**40):
        labels = case.labels.clone()
        labels[21] = label
        with pytest.raises(ValueError, match=rf"^labels\[21\] is {label}, outside \[0, 5\)"):
            score(backend, Case(case.features, case.weight, labels, case.bias),
                  chunk_size=chunk_size)  # fmt: skip
    features = case.features.clone()
    features[17, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^features\[17, 2\] is nan; row 17 is the first"):
        score(backend, Case(features, *case.args[1:]), chunk_size=chunk_size)
    soft = on_gpu(random_case("soft", n=30))
    soft.labels[19, 1] = 1.5
    with pytest.raises(ValueError, match=r"^labels\[19\] holds 1.5 at class 1"):
        score(backend, soft, chunk_size=chunk_size)


@each_backend
def test_strided_inputs_small(backend) -> None:
    case = random_case("ids", n=30)
    exact = closed_form_stats(*case.args)
    moved = on_gpu(case)
    wide = torch.full((30, 17), float("nan"), device="cuda")
    wide[:, 1:15:2] = moved.features
    for features in (wide[:, 1:15:2], moved.features.T.contiguous().T):
        labels = moved.labels.repeat_interleave(2)[::2]
        assert_matches(
            score(backend, Case(features, moved.weight, labels, moved.bias)), exact, 1e-5
        )
