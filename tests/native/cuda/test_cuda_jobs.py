"""What the CUDA kernels are handed, field by field, with a module in their place that counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import Case, random_case

from moso_fast.backends.cuda import device as gpu
from moso_fast.backends.cuda import jobs, whole
from moso_fast.backends.cuda.backend import CudaPasses
from moso_fast.core.engine import _allocate
from moso_fast.core.formulas import FORMULAS
from moso_fast.core.memory import make_plan
from moso_fast.core.passes import Passes
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.status import STATUS_SLOTS

ROWS, CLASSES, DIM, HEADS = 20, 5, 12, 2
PLAN = {
    "tiles": 1, "narrow": 0, "parts": 2, "together": 3, "slab_limit": 8, "first_bytes": 1000,
    "second_bytes": 2000, "tile_rows": 32, "stages": 4,
}  # fmt: skip
SLAB_ROWS = {(ROWS, 8): 7, (16, 8): 4, (3000, 8): 9}
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 5 multiprocessors whose blocks may have 9,000 bytes, and what is launched on it."""
    module = SimpleNamespace(
        few_classes_slab_rows=lambda rows, limit: SLAB_ROWS[rows, limit],
        few_classes_partial_columns=lambda dim: {DIM: 16}[dim],
        few_classes_whole="the launcher of everything",
        closing_threads=16, closing_head_facts=6, closing_count_blocks=64, closing_row_sums=3,
    )  # fmt: skip
    made = SimpleNamespace(module=module, launches=[], facts=[], bulk=True)

    def of_device(answer: Any) -> Any:
        def asked(device: torch.device) -> Any:
            assert device == CPU
            return answer()

        return asked

    monkeypatch.setattr(gpu, "module", lambda: module)
    monkeypatch.setattr(gpu, "multiprocessors", of_device(lambda: 5))
    monkeypatch.setattr(gpu, "shared_limit", of_device(lambda: 9000))
    monkeypatch.setattr(gpu, "bulk_copies", of_device(lambda: made.bulk))
    monkeypatch.setattr(gpu, "launch", lambda *given: made.launches.append(given))
    facts = torch.zeros(100, dtype=torch.float64)
    monkeypatch.setattr(
        gpu, "facts", lambda *given: made.facts.append(given[1:]) or facts[: given[1]]
    )
    return made


def problem_of(rows: int = ROWS, **options: Any) -> Problem:
    case = random_case("ids", n=rows, c=CLASSES, d=DIM, heads=HEADS, bias=options.pop("bias", True))
    return build_problem(*case.args, **{**case.options, **options})


FEATURES = {
    "feature": 0, "exact": True, "tiles": 1, "narrow": 0, "row_stride": DIM, "dim": DIM,
    "heads": HEADS, "classes": CLASSES, "aligned": 1,
}  # fmt: skip


def test_the_job_of_the_first_pass(machine) -> None:
    weights = torch.rand(ROWS)
    problem = problem_of(sample_weight=weights, nonfinite="exclude", ignore_index=3,
                         label_smoothing=0.25)  # fmt: skip
    chunk = jobs.Chunk(problem, slice(4, ROWS), PLAN)
    assert chunk.count == 16 and chunk.slab_rows() == 4
    job = chunk.first({"loss": 77, "rows": "of the features"})
    assert job == {
        **FEATURES,
        "rows": "of the features",  # results come last
        "loss": 77,
        "features": problem.features.data_ptr() + 4 * 4 * DIM,
        "bulk": 1,
        "blocks": 8,  # 4 slabs, 7 tiles at once of 5 x 3 blocks, two blocks a tile
        "shared_bytes": 1000,
        "first_row": 4,
        "weight": problem.weight.data_ptr(),
        "bias": problem.bias.data_ptr(),
        "labels": problem.labels.data_ptr() + 8 * 4,
        "sample_weight": problem.sample_weight.data_ptr() + 4 * 4,
        "ignore_index": 3,
        "smoothing": 0.25,
        "exclude_nonfinite": 1,
        "slab_rows": 4,
        "tile_rows": 32,
        "stages": 4,
    }


def test_blocks_are_no_more_than_the_gpu_runs_at_once(machine) -> None:
    job = jobs.Chunk(problem_of(3000), slice(0, 3000), PLAN).first({})
    assert job["blocks"] == 5 * 3 // 2 * 2
    assert (job["bias"] != 0, job["sample_weight"], job["exclude_nonfinite"]) == (True, 0, 0)
    assert jobs.Chunk(problem_of(bias=False), slice(0, ROWS), PLAN).first({})["bias"] == 0


def test_the_job_of_the_second_pass(machine) -> None:
    """Two blocks a multiprocessor where both fit beside what the system keeps of each."""
    problem = problem_of(3000)
    for needed, together in ((100, 2), (3988, 2), (3989, 1), (9000, 1)):
        chunk = jobs.Chunk(problem, slice(0, 3000), {**PLAN, "second_bytes": needed})
        job = chunk.second({"count": 5})
        assert job["blocks"] == 5 * together and job["shared_bytes"] == needed, needed
    few = jobs.Chunk(problem, slice(0, 129), PLAN).second({"count": 5, "dim": "of the rows"})
    assert few == {
        **FEATURES, "rows": 129, "features": problem.features.data_ptr(), "blocks": 2,
        "shared_bytes": 2000, "count": 5, "dim": "of the rows",
    }  # fmt: skip
    assert jobs.Chunk(problem, slice(0, 128), PLAN).second({})["blocks"] == 1


def test_when_rows_can_be_read_16_bytes_at_a_time(machine) -> None:
    """In one bulk copy only if the last bytes of a row are whole ones, too."""
    memory = torch.zeros(ROWS * 40 + 8)
    for start, stride, dim, aligned, bulk in (
        (0, 16, 12, 1, 1),
        (0, 16, 11, 1, 0),
        (1, 16, 12, 0, 0),
        (4, 16, 12, 1, 1),
        (0, 18, 12, 0, 0),
    ):
        features = memory.as_strided((ROWS, dim), (stride, 1), start)
        labels = torch.zeros(ROWS, dtype=torch.long)
        problem = build_problem(features, torch.zeros(CLASSES, dim), labels)
        job = jobs.Chunk(problem, slice(0, ROWS), PLAN).first({})
        assert (job["aligned"], job["bulk"]) == (aligned, bulk), (start, stride, dim)
        assert job["row_stride"] == stride
    machine.bulk = False
    assert jobs.Chunk(problem_of(), slice(0, ROWS), PLAN).first({})["bulk"] == 0


def test_what_is_borrowed_stays_until_the_launch(machine) -> None:
    case = random_case("ids", n=ROWS, c=CLASSES, d=DIM)
    turned = Case(case.features.T.contiguous().T, *case.args[1:])
    chunk = jobs.Chunk(build_problem(*turned.args), slice(0, ROWS), PLAN)
    assert chunk.features.is_contiguous() and torch.equal(chunk.features, case.features)
    assert chunk.address(None) == 0 and chunk.borrowed == []
    address = chunk.address(case.weight.T)
    (copied,) = chunk.borrowed
    assert copied.data_ptr() == address != case.weight.data_ptr() and copied.is_contiguous()
    assert chunk.address(case.weight) == case.weight.data_ptr()
    column = torch.zeros(ROWS, 5)[:, :1]
    assert jobs.unit_columns(column[:, ::2]) and not jobs.unit_columns(turned.features)


def test_where_rows_go_and_come_from(machine) -> None:
    problem = problem_of()
    out, rows = _allocate(problem), slice(4, ROWS)
    partial, bias_partial = jobs.partial_sums(problem, 3)
    assert partial.shape == (3, HEADS * CLASSES, 16) and bias_partial.shape == (3, HEADS * CLASSES)
    residual, alignment = torch.empty(16, HEADS, CLASSES), torch.empty(HEADS, 40)[:, :16]
    fields = ("loss", "residual_sqnorm", "margin", "entropy", "feature_sqnorm")
    written = {name: getattr(out, name).data_ptr() + 4 * 4 for name in fields}
    expected = {
        **written,
        "stat_stride": ROWS,
        "counted": out.counted.data_ptr() + 4,
        "status": out.status.data_ptr(),
        "residual": residual.data_ptr(),
        "partial": partial.data_ptr(),
        "bias_partial": bias_partial.data_ptr(),
    }
    found = jobs.row_results(out, rows, residual, partial, bias_partial)
    assert found == expected
    assert jobs.row_results(out, rows, None, partial, bias_partial) == expected | {"residual": 0}
    nothing = dict.fromkeys(expected, 0) | {"residual": residual.data_ptr()}
    assert jobs.no_results(residual) == nothing
    assert jobs.row_inputs(out, rows, residual, alignment) == {
        "residual": residual.data_ptr(),
        "feature_sqnorm": out.feature_sqnorm.data_ptr() + 4 * 4,
        "counted": out.counted.data_ptr() + 4,
        "alignment": alignment.data_ptr(),
        "alignment_stride": 40,
        "count": 0,
        "behind": 0,
    }
    sums, bias_sums = torch.empty(HEADS, CLASSES, DIM), torch.empty(HEADS, CLASSES)
    assert jobs.reduce_job(partial, bias_partial, sums, bias_sums) == {
        "partial": partial.data_ptr(), "bias_partial": bias_partial.data_ptr(), "slabs": 3,
        "classes": HEADS * CLASSES, "dim": DIM, "grad_sum": sums.data_ptr(),
        "bias_grad_sum": bias_sums.data_ptr(), "mean": 0, "bias_mean": 0, "counted": 0, "rows": 0,
        "counts": 0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whose_digits_are_kept(dtype) -> None:
    """float32 ones at "highest"; 16-bit features wherever weights are not rounded to their size."""
    case = random_case("ids", dtype=dtype)
    keeps = {"highest": True, "high": dtype != torch.float32, "medium": False}
    for precision, expected in keeps.items():
        assert jobs.exact(build_problem(*case.args, precision=precision)) == expected


SIZES = {
    "residual": 4 * ROWS * 10, "feature_sqnorm": 4 * ROWS, "partial": 4 * 3 * 10 * 16,
    "bias_partial": 4 * 3 * 10, "grad_sum": 8 * 10 * DIM, "bias_grad_sum": 8 * 10,
    "mean": 4 * 10 * DIM, "bias_mean": 4 * 10, "counts": 8 * 64, "sums": 8 * HEADS * 1 * 3,
    "status": 8 * STATUS_SLOTS,
}  # fmt: skip


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("formula", [None, "official"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_job_of_everything_in_one_go(machine, monkeypatch, read, formula, bias) -> None:
    cut: list[Any] = []
    carve = gpu.carve

    def noted(problem: Problem, alignment: int, **sizes: int) -> Any:
        cut.append((alignment, sizes))
        return carve(problem, alignment, **sizes)

    monkeypatch.setattr(gpu, "carve", noted)
    problem = problem_of(bias=bias, sample_weight=torch.ones(ROWS))
    done = whole.run_whole(problem, PLAN, formula, 0.5, read=read)
    assert cut == [(128, SIZES)] and machine.facts == [(STATUS_SLOTS + 1 + HEADS * 6, read)]
    ((device, launcher, job, first, second),) = machine.launches
    assert (device, launcher) == (CPU, machine.module.few_classes_whole)
    assert job["first"] is first and job["second"] is second and job["wait"] is read
    assert list(job) == ["first", "reduce", "second", "finish", "judge", "score", "wait"]
    results = done.results
    at = {name: job["finish"][name] for name in SIZES}
    named = {
        **{name: getattr(results, name).data_ptr() for name in
           ("loss", "margin", "entropy", "alignment", "grad_sqnorm", "mean_grad_sqnorm", "count")},
        "residual_sqnorm": results.el2n.data_ptr(),
        "counted": done.counted.data_ptr(),
        "facts": done.facts.data_ptr(),
    }  # fmt: skip
    shared = at | named
    for part in ("first", "reduce", "finish", "judge"):
        assert job[part].items() >= shared.items(), part
    # The second pass knows no count beforehand.
    assert second.items() >= {**shared, "count": 0}.items()
    assert job["reduce"] == shared | {"slabs": 3, "classes": 10, "dim": DIM, "rows": ROWS}
    assert first["stat_stride"] == ROWS and first["slab_rows"] == 7
    assert (second["alignment_stride"], second["behind"]) == (ROWS, ROWS)
    assert second["mean_grad"] == at["mean"]
    assert second["mean_bias_grad"] == (at["bias_mean"] if bias else 0)
    assert second["blocks"] == 1 and first["blocks"] == 6
    assert job["finish"] == shared | {
        "rows": ROWS, "heads": HEADS, "blocks_a_head": 1, "rescale": 1,
        "sample_weight": first["sample_weight"], "squared_one": 1.0 if bias else 0.0,
    }  # fmt: skip
    assert first["sample_weight"] != 0 and (first["bias"] != 0) == bias
    assert job["judge"] == shared | {
        "heads": HEADS, "blocks_a_head": 1, "classes": CLASSES, "dim": DIM,
        "weight": first["weight"], "bias": first["bias"],
    }  # fmt: skip
    if formula is None:
        assert job["score"] is None and results.score is None
    else:
        assert job["score"] == shared | {
            "rows": ROWS, "heads": HEADS, "formula": FORMULAS.index(formula), "scale": 0.5,
            "score": results.score.data_ptr(),
        }  # fmt: skip
        assert results.score.shape == (HEADS, ROWS)
    for name in ("loss", "margin", "entropy", "alignment", "grad_sqnorm", "el2n"):
        assert getattr(results, name).shape == (HEADS, ROWS)
        assert getattr(results, name).dtype == torch.float32
    assert (results.mean_grad_sqnorm.shape, results.mean_grad_sqnorm.dtype) == (
        (HEADS,), torch.float64
    )  # fmt: skip
    assert (results.count.shape, results.count.dtype) == ((), torch.int64)
    assert (done.counted.shape, done.counted.dtype) == ((ROWS,), torch.bool)


def test_in_one_go_only_where_residuals_stay() -> None:
    passes = object.__new__(CudaPasses)
    Passes.__init__(passes, problem_of(), make_plan(problem_of(), 5))
    assert passes.whole("moso", 1.0, read=True) is None


def test_blocks_of_the_last_sweep(machine) -> None:
    """Four rows a thread of 16, and 512 blocks of all heads together."""
    problem = problem_of(3000)
    for threads, blocks in ((16, 47), (2, 256), (1000, 1), (10**6, 1)):
        machine.module.closing_threads = threads
        machine.launches.clear()
        whole.run_whole(problem, PLAN, None, 1.0, read=False)
        job = machine.launches[0][2]
        assert job["finish"]["blocks_a_head"] == job["judge"]["blocks_a_head"] == blocks
        assert isinstance(job["judge"]["blocks_a_head"], int)
