"""The CUDA kernels' own source, run in the emulator, against the definition in float64."""

from __future__ import annotations

import re

import cuda_emulator
import pytest
import torch
from core_support import FIELDS, Case, assert_stats_match, generator, random_case
from cuda_cases import DTYPES, check, first_pass_of, run, score

from moso_fast import backends as list_backends
from moso_fast.core.reference import closed_form_stats
from moso_fast.functional import moso_scores

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]

ERROR = {"highest": 1e-5, "high": 2e-3, "medium": 1e-2}
CUT_ERROR = {"highest": 1e-6, "high": 1e-4, "medium": 1e-2}  # 5e-6 were sums to stay in there


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


@pytest.mark.parametrize("dim", [40, 512, 2048])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norms_where_sums_are_cut_off(gpu, emulator, dtype, precision, dim) -> None:
    emulator.set_options(False, True)
    case = random_case("ids", n=40, c=4, d=dim, dtype=dtype)
    norms = first_pass_of(gpu, case, precision=precision).feature_sqnorm.double()
    exact = case.features.double().square().sum(1)
    assert float(((norms - exact) / exact).abs().max()) < (1e-6 if dim <= 512 else 2e-6)


def test_no_rows(gpu) -> None:
    case = random_case("ids", n=0)
    assert run(case).count == 0 and moso_scores(*case.args, backend="cuda").shape == (0,)


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


def test_backend_is_listed(gpu) -> None:
    assert list_backends()["cuda"].available
