"""The CUDA kernels' own source, run in the emulator, against the definition in float64."""

from __future__ import annotations

import functools
import math
import re

import cuda_emulator
import pytest
import torch
from core_support import (
    FIELDS,
    Case,
    assert_close,
    assert_stats_match,
    confident_case,
    generator,
    prepared,
    random_case,
    rank_correlation,
)
from cuda_emulator import WHOLE, in_place_of_a_gpu

from moso_fast import backends as list_backends
from moso_fast.core.engine import _allocate
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import last_layer_stats, moso_scores

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR = {"highest": 1e-5, "high": 2e-3, "medium": 1e-2}
CUT_ERROR = {"highest": 1e-6, "high": 1e-4, "medium": 1e-2}  # 5e-6 were sums to stay in there


@pytest.fixture(scope="module")
def emulator():
    return cuda_emulator.build()


@pytest.fixture
def gpu(emulator, monkeypatch):
    backend = in_place_of_a_gpu(emulator, monkeypatch)
    emulator.take_counts()
    yield backend
    emulator.set_options(False, False)


score = functools.partial(last_layer_stats, backend="cuda")


def run(case: Case, **options):
    return score(*case.args, **{**case.options, **options})


def exact_scores(exact) -> torch.Tensor:
    return (exact.count * exact.alignment - exact.grad_sqnorm) / (exact.count - 1)


def check(case: Case, tolerance: float, **options) -> None:
    exact = closed_form_stats(*case.args, **case.options)
    stats = run(case, **options)
    assert_stats_match(stats, exact, tolerance, floor=1e-7)
    if exact.count > 1:
        expected = exact_scores(exact)
        scores = stats.scores().reshape(expected.shape)
        assert_close(scores, expected, tolerance, floor=1e-7, what="scores")


# --- every kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, dim", [(10, 1104), (24, 530), (70, 200), (100, 136)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instantiation(gpu, emulator, dtype, exact, classes, dim) -> None:
    precision = "highest" if exact else "high" if dtype == torch.float32 else "medium"
    emulator.set_options(classes == 24, False)  # warps in either order
    gpu.bulk = classes != 70  # cp.async there, and single numbers in rows of 530
    check(random_case("ids", n=37, c=classes, d=dim, dtype=dtype), ERROR[precision],
          precision=precision)  # fmt: skip
    first, second = gpu.job("few_classes_first"), gpu.job("few_classes_second")
    assert first["tiles"] == second["tiles"] == {10: 1, 24: 2, 70: 5, 100: 7}[classes]
    assert first["exact"] == second["exact"] == exact
    assert first["bulk"] == (classes in (10, 100))
    assert first["aligned"] == (classes != 24)


@pytest.mark.parametrize(
    "n, c, d",
    [(1, 1, 1), (1, 3, 8), (2, 2, 33), (63, 15, 65), (64, 16, 64), (65, 17, 100), (129, 8, 31),
     (70, 33, 16), (70, 80, 129)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_off_every_tile(gpu, dtype, n, c, d) -> None:
    check(random_case("ids", n=n, c=c, d=d, dtype=dtype, seed=n), 1e-5, precision="highest")


@pytest.mark.parametrize("staging", [(64, 2), (32, 3), (32, 2), (16, 3), (16, 2), (16, 1)])
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_staging(gpu, emulator, monkeypatch, dtype, bulk, staging) -> None:
    gpu.bulk = bulk
    plan = emulator.few_classes_plan

    def with_staging(feature, exact, classes, dim, limit):
        chosen = plan(feature, exact, classes, dim, limit)
        rows, stages = staging
        terms = 3 if exact else 2 if feature == 0 else 1
        item = 4 if feature == 0 else 2
        layout = emulator.first_layout(item, terms, chosen["tiles"], classes, dim, rows, stages)
        return {**chosen, "tile_rows": rows, "stages": stages, "first_bytes": layout["bytes"]}

    monkeypatch.setattr(emulator, "few_classes_plan", with_staging)
    case = random_case("ids", n=140, c=9, d=72, dtype=dtype)
    case.features[77] = float("nan")  # its tile is cleared by ordinary stores
    case.labels[77] = -100
    gpu.multiprocessors = 1  # every stage is used again
    exact = closed_form_stats(*case.args)
    assert_stats_match(run(case, precision="highest"), exact, 1e-5)
    assert gpu.launches[0][1]["bulk"] == bulk


@pytest.mark.parametrize(
    "n, c, d",
    [(37, 10, 512), (70, 16, 500), (1, 1, 1), (33, 9, 136), (65, 8, 31), (129, 13, 264)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_instantiation(gpu, dtype, n, c, d) -> None:
    check(random_case("ids", n=n, c=c, d=d, dtype=dtype, seed=n), 1e-2)
    job = gpu.launches[0][1]
    assert job["narrow"] and job["tile_rows"] >= 32


@pytest.mark.parametrize("kind", ["ids", "ids_smoothed"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 20, 29, 32])
def test_one_head_of_any_width(gpu, kind, classes) -> None:
    """Four lanes a row take the classes in turn; some have one less than others, or none."""
    check(random_case(kind, n=37, c=classes, d=24, seed=classes), 1e-5)


def test_two_blocks_a_multiprocessor(gpu) -> None:
    case = random_case("ids", n=1000, c=10, d=512, dtype=torch.bfloat16)
    exact = closed_form_stats(*case.args)
    assert_stats_match(run(case), exact, ERROR["medium"])
    assert gpu.launches[0][1]["blocks"] == 2 * gpu.multiprocessors


def test_more_rows_than_the_walk_counts_are_refused(gpu, emulator) -> None:
    run(random_case("ids", n=20))
    job = {**gpu.launches[0][1], "rows": 2**30 + 1, "device": 0, "stream": 0}
    with pytest.raises(ValueError, match=r"2\^30 rows"):
        emulator.few_classes_first(job)


def first_pass_of(gpu, case: Case, **options):
    problem = build_problem(*case.args, **case.options, **options)
    out = _allocate(problem)
    prepared(gpu, problem, problem.rows).first(slice(0, problem.rows), out)
    return out


@pytest.mark.parametrize("dim", [40, 512, 2048])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norms_where_sums_are_cut_off(gpu, emulator, dtype, precision, dim) -> None:
    emulator.set_options(False, True)
    case = random_case("ids", n=40, c=4, d=dim, dtype=dtype)
    norms = first_pass_of(gpu, case, precision=precision).feature_sqnorm.double()
    exact = case.features.double().square().sum(1)
    assert float(((norms - exact) / exact).abs().max()) < (1e-6 if dim <= 512 else 2e-6)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_stay_in_their_row(gpu, dtype, precision, shift) -> None:
    """Rows in every place of an operand: products with them reach no other norm or residual."""
    case = random_case("ids", n=64, c=10, d=70, dtype=dtype, nonfinite="exclude")
    kept = torch.arange(64) % 4 != shift
    bad = (~kept).nonzero().flatten().tolist()
    for at, row in enumerate(bad):
        column = (7 * row) % 70
        case.features[row, column] = (math.inf, math.nan, -math.inf)[at % 3]
        case.features[row, (column + 31) % 70] = (math.inf, 1.0)[at % 2]
    out = first_pass_of(gpu, case, precision=precision)
    assert out.counted.bool().tolist() == kept.tolist()
    exact = case.features[kept].double().square().sum(1)
    assert_close(out.feature_sqnorm[kept], exact, 1e-6, what="norms")
    assert bool((out.feature_sqnorm[~kept] == 0).all())
    exact = closed_form_stats(*case.args, **case.options)
    assert_stats_match(
        run(case, precision=precision), exact, 1e-2 if precision == "medium" else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_that_overflow_are_not_holes(gpu, dtype) -> None:
    """Every number is finite, their squares are not: the row is refused for its logits alone."""
    case = random_case("ids", n=40, c=4, d=40, dtype=dtype)
    case.features[19] = 1e25
    with pytest.raises(ValueError, match=r"row 19 overflow float32"):
        score(*case.args)


def test_no_rows(gpu) -> None:
    case = random_case("ids", n=0)
    assert run(case).count == 0 and moso_scores(*case.args, backend="cuda").shape == (0,)


# --- loss, labels, weights ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ids", "ids_smoothed"])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_heads(gpu, kind, heads, bias) -> None:
    case = random_case(kind, n=70, c=7, d=40, heads=heads, bias=bias)
    weight = torch.rand(70, generator=generator(3)) + 0.5
    for options in ({}, {"chunk_size": 32}, {"sample_weight": weight}):
        stats = run(case, **options)
        exact = closed_form_stats(
            *case.args,
            **{**case.options, **{k: v for k, v in options.items() if k != "chunk_size"}},
        )
        assert_stats_match(stats, exact, 1e-5, floor=1e-6)


def test_stacked_heads_equal_single_ones_bitwise(gpu) -> None:
    case = random_case("ids", n=70, c=6, d=40, heads=2)
    together = run(case)
    for head in range(2):
        alone = score(case.features, case.weight[head], case.labels, case.bias[head])
        for name in ("loss", "el2n", "margin", "entropy", "grad_sqnorm"):
            assert_close(getattr(together, name)[head], getattr(alone, name), 1e-6, what=name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_label_dtypes(gpu, dtype) -> None:
    case = random_case("ids", n=40)
    check(Case(case.features, case.weight, case.labels.to(dtype), case.bias, case.options), 1e-5)


def test_confident_model(gpu) -> None:
    case = confident_case(n=400)
    exact = closed_form_stats(*case.args)
    stats = score(*case.args)
    assert_stats_match(stats, exact, 1e-5)
    for value, truth in (
        (stats.loss, exact.loss[0]),
        (stats.grad_sqnorm, exact.grad_sqnorm[0]),
        (stats.scores(), exact_scores(exact)[0]),
    ):
        assert rank_correlation(value, truth) > 0.9999
    assert float(exact.loss.min()) < 1e-8


def test_own_gradient_is_taken_from_the_score_exactly(gpu) -> None:
    """Rows orthogonal to each other: N a - q is 0, and 2^-9 q if rounding residuals stays in a."""
    features = (torch.rand(16, generator=generator(4)) + 0.5).diag().bfloat16()
    weight = torch.randn(9, 16, generator=generator(5)).bfloat16().float()
    stats = score(features, weight, torch.arange(16) % 9)
    assert gpu.launches[0][1]["exact"] is False
    left = 16 * stats.alignment.double() - stats.grad_sqnorm.double()
    assert float((left / stats.grad_sqnorm).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(gpu, dtype) -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[1e4, 0.0], [0.0, 200.0], [0.0, 200.0]])
    labels = torch.tensor([0, 0, 1, 0, 2])
    check(Case(features.to(dtype), weight, labels, None), 1e-5, precision="highest")
    gap = score(features.to(dtype), weight, labels, precision="highest").loss
    assert float(gap[3]) == pytest.approx(1e4 + math.log(2.0), rel=1e-6)


def test_sequences(gpu) -> None:
    offsets = torch.tensor([0, 7, 7, 30, 90])
    case = random_case("ids", n=90, c=5, d=24, cu_seqlens=offsets)
    exact = explicit_stats(*case.args, **case.options)
    for options in ({}, {"chunk_size": 40}):
        assert_stats_match(run(case, **options), exact, 1e-5)


# --- rows that do not count, bad input ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_ignored_rows_may_hold_anything(gpu, chunk_size, dtype) -> None:
    case = random_case("ids", n=30, dtype=dtype)
    labels, features = case.labels.clone(), case.features.clone()
    labels[[3, 29]] = -100
    features[3], features[29, 2] = float("nan"), float("inf")
    kept = labels != -100
    exact = closed_form_stats(features[kept], case.weight, labels[kept], case.bias)
    stats = score(features, case.weight, labels, case.bias, chunk_size=chunk_size,
                  precision="highest")  # fmt: skip
    for name in FIELDS:
        value = getattr(stats, name)
        assert value[~kept].isnan().all(), name
        assert_close(value[kept], getattr(exact, name)[0], 1e-5, what=name)


@pytest.mark.parametrize("heads", [None, 2])
def test_rows_that_do_not_count_have_no_residual_and_no_alignment(gpu, heads) -> None:
    case = random_case("ids", n=20, heads=heads)
    case.labels[[0, 7]] = -100
    case.features[7, 3] = float("nan")
    problem = build_problem(*case.args)
    out = _allocate(problem)
    passes = prepared(gpu, problem)
    first = passes.first(slice(0, 20), out)
    assert out.counted.tolist() == [i not in (0, 7) for i in range(20)]
    assert bool((first.residual[[0, 7]] == 0).all())
    alignment = torch.full_like(out.loss, float("nan"))
    passes.begin_second(torch.ones_like(problem.weight), torch.ones_like(problem.bias))
    passes.second(slice(0, 20), out, first.residual, alignment)
    assert bool((alignment[:, [0, 7]] == 0).all()) and bool(torch.isfinite(alignment).all())


def test_all_rows_ignored(gpu) -> None:
    case = random_case("ids", n=20)
    stats = score(case.features, case.weight, torch.full((20,), -100), case.bias)
    assert stats.count == 0 and stats.alignment.isnan().all() and stats.mean_grad_sqnorm == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 2])
def test_excluded_rows(gpu, dtype, heads) -> None:
    case = random_case("ids", n=70, heads=heads, dtype=dtype, nonfinite="exclude")
    case.features[4, 1], case.features[69, 6] = float("nan"), float("-inf")
    exact = closed_form_stats(*case.args, **case.options)
    assert exact.count == 68
    for options in ({}, {"chunk_size": 24}):
        assert_stats_match(run(case, precision="highest", **options), exact, 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_bad_rows_are_named(gpu, chunk_size) -> None:
    case = random_case("ids", n=30)
    for label in (5, -1, 2**40):
        labels = case.labels.clone()
        labels[21] = labels[25] = label
        with pytest.raises(ValueError, match=rf"^labels\[21\] is {label}, outside \[0, 5\)"):
            score(case.features, case.weight, labels, case.bias, chunk_size=chunk_size)
    features = case.features.clone()
    features[17, 2] = features[20, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^features\[17, 2\] is nan; row 17 is the first"):
        score(features, *case.args[1:], chunk_size=chunk_size)
    features = case.features.clone()
    features[19] = 3e38
    with pytest.raises(ValueError, match=r"row 19 overflow float32"):
        score(features, *case.args[1:], chunk_size=chunk_size)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignments(gpu, dtype) -> None:
    case = random_case("ids", n=40, c=5, d=48, dtype=dtype)
    exact = closed_form_stats(*case.args)
    wide = torch.full((40, 133), float("nan"), dtype=dtype)
    views = []
    for start in (0, 8, 1):  # aligned rows need a stride of whole 16 bytes, which 133 is not
        wide[:, start : start + 48] = case.features
        views.append(wide[:, start : start + 48].clone(memory_format=torch.preserve_format))
        padded = torch.full((40, 64 + start), float("nan"), dtype=dtype)
        padded[:, start : start + 48] = case.features
        views.append(padded[:, start : start + 48])
    every_second = torch.full((40, 96), float("nan"), dtype=dtype)
    every_second[:, ::2] = case.features
    views += [every_second[:, ::2], case.features.T.contiguous().T]
    aligned = set()
    for features in views:
        gpu.launches.clear()
        stats = score(features, *case.args[1:], precision="highest")
        assert_stats_match(stats, exact, 1e-5)
        aligned.add(gpu.launches[0][1]["aligned"])
    assert aligned == {0, 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [29, 31, 48])
def test_rows_that_end_inside_16_bytes(gpu, dtype, dim) -> None:
    """What lies behind the columns of an aligned row belongs to somebody else."""
    case = random_case("ids", n=40, c=5, d=dim, dtype=dtype)
    wide = torch.full((40, 64), float("nan"), dtype=dtype)
    wide[:, :dim] = case.features
    stats = score(wide[:, :dim], *case.args[1:], precision="highest")
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)
    job = gpu.launches[0][1]
    assert (job["aligned"], job["bulk"]) == (1, int(dim == 48))


def test_equal_rows_behind_one_address(gpu) -> None:
    row = torch.randn(1, 40, generator=generator(5))
    case = Case(row.expand(200, 40), torch.randn(3, 40, generator=generator(6)),
                torch.arange(200) % 3, None)  # fmt: skip
    check(case, 1e-5)


@pytest.mark.raw_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_32_bits(gpu, dtype) -> None:
    """Three rows 2^30 numbers apart; the pages between them are never touched."""
    case = random_case("ids", n=3, c=3, d=8, dtype=dtype)
    memory = torch.empty(2 * 2**30 + 8, dtype=dtype)
    far = memory.as_strided((3, 8), (2**30, 1))
    far.copy_(case.features)
    stats = score(far, *case.args[1:], precision="highest")
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("bulk", [True, False])
def test_features_are_read_once_a_pass(gpu, emulator, bulk) -> None:
    """By bulk copies or cp.async in the first pass, straight to registers in the second."""
    gpu.bulk = bulk
    case = random_case("ids", n=128, c=10, d=512, dtype=torch.bfloat16)
    emulator.take_counts()
    run(case)
    counts = emulator.take_counts()
    chunks = 128 * 512 * 2 // 16
    assert counts["bulk 16 bytes" if bulk else "cp.async"] == chunks
    assert counts["cp.async" if bulk else "bulk 16 bytes"] == 0
    assert counts["global 16 bytes"] == chunks
    assert [name for name, _ in gpu.launches] == [*WHOLE]


def test_second_pass_walks_from_the_last_rows_to_the_first(gpu) -> None:
    """What the first pass left in the L2 cache is used. Warp w of 16 takes tiles 31 - w, 15 - w."""
    gpu.multiprocessors = 1
    case = random_case("ids", n=512, c=10, d=64, dtype=torch.bfloat16)
    run(case)
    assert gpu.job("few_classes_second")["blocks"] == 2
    start = case.features.data_ptr()
    loads = gpu.wide_loads["few_classes_second"]
    tiles = [(address - start) // (16 * 64 * 2) for address in loads]
    order = list(dict.fromkeys(tiles))
    pairs = set(zip(order[::2], order[1::2], strict=True))
    assert pairs == {(31 - warp, 15 - warp) for warp in range(16)}


# --- order and rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_whatever_the_gpu(gpu, emulator, dtype) -> None:
    case = random_case("ids", n=500, c=6, d=40, dtype=dtype)
    first = run(case)
    for multiprocessors, reverse in ((1, False), (2, True), (100, True)):
        gpu.multiprocessors = multiprocessors
        emulator.set_options(reverse, False)
        again = run(case)
        for name in FIELDS:
            assert torch.equal(getattr(again, name), getattr(first, name)), name
        assert torch.equal(again.scores(), first.scores())
    assert len({job["blocks"] for name, job in gpu.launches if name == "few_classes_first"}) == 4


each_mode = pytest.mark.parametrize("dtype, precision", [
    (torch.float32, "highest"), (torch.bfloat16, "highest"), (torch.float16, "highest"),
    (torch.float32, "high"), (torch.bfloat16, "medium"), (torch.float16, "medium"),
])  # fmt: skip


@each_mode
def test_long_slabs_on_tensor_cores_that_cut_sums_off(
    gpu, emulator, monkeypatch, dtype, precision
) -> None:
    """Equal rows, whose errors do not average out, in one slab as long as they come."""
    emulator.set_options(False, True)
    monkeypatch.setattr(emulator, "few_classes_slab_rows", lambda rows, limit: limit)
    plan = emulator.few_classes_plan(0, precision == "highest", 3, 6, gpu.shared)
    rows = plan["slab_limit"]
    row = torch.randn(1, 6, generator=generator(1)).to(dtype)
    weight = torch.randn(3, 6, generator=generator(2))
    case = Case(row.expand(rows, 6), weight, torch.zeros(rows, dtype=torch.long), torch.ones(3))
    stats = score(*case.args, precision=precision)
    assert gpu.launches[1][1]["slabs"] == 1
    assert_stats_match(stats, closed_form_stats(*case.args), CUT_ERROR[precision])


@each_mode
def test_wide_features_on_tensor_cores_that_cut_sums_off(gpu, emulator, dtype, precision) -> None:
    """Equal terms over as many columns as there may be: logits, and alignments."""
    emulator.set_options(False, True)
    features = (1 + torch.rand(20, 1, generator=generator(1))).to(dtype).repeat(1, 2048)
    weight = torch.randn(10, 1, generator=generator(2)).repeat(1, 2048) / 2048
    case = Case(features, weight, torch.zeros(20, dtype=torch.long), torch.ones(10))
    stats = score(*case.args, precision=precision)
    assert_stats_match(stats, closed_form_stats(*case.args), CUT_ERROR[precision])


@pytest.mark.parametrize(
    "name",
    [
        *("few_classes_first", "few_classes_second", "few_classes_reduce"),
        *("closing_finish", "closing_judge", "closing_score"),
    ],
)
def test_fields_of_a_cuda_job_are_all_there_and_known(emulator, name) -> None:
    launch, job = getattr(emulator, name), {"row": 0}
    with pytest.raises(ValueError, match=r"^the job has a field 'row' that no kernel takes$"):
        for _ in range(100):
            try:
                launch(job)
            except KeyError as error:
                lacking = re.fullmatch(r"the job lacks the field '(\w+)'", error.args[0])
                job[lacking[1]] = 0
    assert len(job) > 8


# --- the emulator finds mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, words",
    [
        ("race", "race: write after a read"),
        ("late write", "race: read after a write"),
        ("unwritten", "nobody wrote"),
        ("beyond shared memory", "is beyond 1024"),
        ("misaligned", "misaligned"),
        ("beyond the array", "not part of any array"),
        ("write to an input", "write to an address"),
        ("copy not waited for", "copy that is under way"),
        ("copy left under way", "ended with copies under way"),
        ("copy not published", "race: read after a write|nobody wrote"),
        ("lanes part ways", "waits for threads that never come"),
        ("different instructions", "different instructions"),
        ("barrier missed", "waits for threads that never come"),
        ("bulk not waited for", "bulk copy is under way|did not wait for"),
        ("bulk touched under way", "a bulk copy is under way"),
        ("bulk wrong parity", "a bulk copy is under way"),
        ("bulk waited for by others", "this thread did not wait for"),
        ("bulk without a fence", "not fenced"),
        ("bulk barrier unknown", "race|not yet known|no barrier"),
        ("bulk bytes missing", "waits for threads that never come"),
        ("bulk beyond the array", "not part of any array"),
        ("bulk left under way", "ended with copies under way"),
    ],
)
def test_emulator_reports(emulator, fault, words) -> None:
    numbers = torch.zeros(64)
    emulator.register_array(numbers.data_ptr(), 256, False)
    try:
        for right in ("none", "bulk without fault", "bulk without fault, half waits"):
            assert emulator.run_fault(right, numbers.data_ptr()) == ""
        report = emulator.run_fault(fault, numbers.data_ptr())
    finally:
        emulator.forget_arrays()
    assert any(part in report for part in words.split("|")), report


def test_backend_is_listed(gpu) -> None:
    assert list_backends()["cuda"].available
