"""What the C++ kernels are handed, and what is decided before: a module in their place notes it."""

from __future__ import annotations

import multiprocessing
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import Case, prepared, random_case
from triton_cases import shape

from moso_fast import backends
from moso_fast.backends.cpu import SIMD_VARIABLE, CpuBackend
from moso_fast.core import memory
from moso_fast.core.engine import _allocate
from moso_fast.core.problem import build_problem
from moso_fast.util.native import NativeModule

CPU = sys.modules[CpuBackend.__module__]


class Kernels:
    """A module for processors of two kinds, the newer of which multiplies bfloat16 quickly."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, str, dict[str, Any]]] = []
        self.asked: list[tuple[Any, ...]] = []

    def variants(self) -> list[str]:
        return ["new", "old"]

    def prefers_bf16_products(self, variant: str) -> bool:
        return variant == "new"

    def few_classes(self, variant: str, dtype: int, rounding: bool) -> int:
        self.asked.append((variant, dtype, rounding))
        return 16 if rounding else 32

    def first_pass(self, variant: str, job: dict[str, Any]) -> None:
        self.jobs.append(("first", variant, job))

    def second_pass(self, variant: str, job: dict[str, Any]) -> None:
        self.jobs.append(("second", variant, job))

    head_facts = 6

    def whole(self, variant: str, job: dict[str, Any]) -> None:
        self.jobs.append(("whole", variant, job))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    monkeypatch.setattr(CPU, "load_native", lambda name: {"_cpu": NativeModule(made, "", "")}[name])
    monkeypatch.delenv(SIMD_VARIABLE, raising=False)
    monkeypatch.setattr(memory, "residual_budget", lambda device: 2**60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    return made


def problem_of(case: Case, **options: Any) -> Any:
    return build_problem(*case.args, **case.options, **options)


def test_which_instruction_set(kernels, monkeypatch) -> None:
    backend, case = CpuBackend(), random_case("ids")
    for asked, variant in (("", "new"), ("old", "old"), ("new", "new")):
        monkeypatch.setenv(SIMD_VARIABLE, asked)
        found = backend.availability()
        assert (found.available, found.reason, found.how) == (True, f"C++ kernels, {variant}", "")
        assert prepared(backend, problem_of(case)).describe().startswith(f"cpu: {variant}, ")
    monkeypatch.setenv(SIMD_VARIABLE, "neon")
    found = backend.availability()
    assert (found.available, found.reason, found.how) == (
        False, "MOSO_FAST_SIMD=neon is not among what this processor runs",
        "unset MOSO_FAST_SIMD or set it to one of new, old",
    )  # fmt: skip
    missing = NativeModule(None, "no compiler", "get one")
    monkeypatch.setattr(CPU, "load_native", lambda name: missing)
    found = backend.availability()
    assert (found.available, found.reason, found.how) == (False, "no compiler", "get one")


def test_what_it_does_not_take() -> None:
    backend = CpuBackend()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.supports(problem_of(random_case("ids", dtype=dtype))) is None
    for kind in ("soft", "binary", "mse"):
        assert backend.supports(problem_of(random_case(kind))) is None
    why = "float64 features need float64 accumulators, which only torch has"
    assert backend.supports(problem_of(random_case("ids", dtype=torch.float64))) == why
    problem = problem_of(random_case("ids"))
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda:1"), loss="mse",
                                     features=problem.features)  # fmt: skip
    why = "features are on cuda:1; the C++ kernels read main memory"
    assert backend.supports(elsewhere) == why
    other: Any = SimpleNamespace(device=problem.device, loss="hinge", features=problem.features)
    why = "the C++ kernels know cross_entropy, binary_cross_entropy, mse"
    assert backend.supports(other) == why
    assert (backend.name, backend.streams, backend.maps) == ("cpu", False, False)


FEW, MANY = "classes in registers", "packed row tiles"
ROUNDED, BLOCKS = ", bfloat16 products", ", mean gradient in blocks from stored residuals"


def test_which_kernels_take_a_job(kernels, monkeypatch) -> None:
    """By classes of all heads together, loss, precision, and the size of the head."""
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", 0)
    ids = {"precision": "highest", "rows": 1}
    medium = {"precision": "medium", "rows": 1}
    for problem, words in (
        (shape(32, 100, **ids), FEW),
        (shape(33, 100, **ids), MANY),
        (shape(16, 100, 2, **ids), FEW),
        (shape(11, 100, 3, **ids), MANY),
        (shape(16, 100, **medium), FEW),
        (shape(17, 100, **medium), MANY + ROUNDED),
        (shape(17, 100, precision="high"), FEW),
        (shape(33, 100, dtype=torch.bfloat16), MANY + ROUNDED),
        (shape(2**9, 2**10, **ids), MANY + BLOCKS),
        (shape(2**9, 2**10 - 1, **ids), MANY),
        (shape(2**8, 2**9, **medium), MANY + ROUNDED + BLOCKS),
        (shape(2**8, 2**9 - 1, **medium), MANY + ROUNDED),
        (shape(2**7, 2**9, 2, **medium), MANY + ROUNDED + BLOCKS),
        (shape(16, 2**16, **ids), FEW),
        (problem_of(random_case("soft", c=3)), MANY),
        (problem_of(random_case("mse", c=3)), MANY),
        (problem_of(random_case("binary", c=3)), MANY),
    ):
        assert prepared("cpu", problem).describe() == f"cpu: new, {words}, 1 thread(s)", words
    assert set(kernels.asked) == {("new", 0, False), ("new", 0, True), ("new", 1, True)}


def test_few_rows_leave_no_slabs_to_share_out(kernels) -> None:
    words = "7 thread(s)"
    for rows, blocks in ((1024, BLOCKS), (1025, "")):
        problem = shape(33, 100, rows=rows)
        assert prepared("cpu", problem).describe() == f"cpu: new, {MANY}{blocks}, {words}"
    assert prepared("cpu", shape(32, 100, rows=1024)).describe() == f"cpu: new, {FEW}, {words}"


def test_no_rounding_where_it_gains_nothing(kernels, monkeypatch) -> None:
    monkeypatch.setenv(SIMD_VARIABLE, "old")
    problem = shape(40, 100, precision="medium")
    assert prepared("cpu", problem).describe() == f"cpu: old, {MANY}{BLOCKS}, 1 thread(s)"
    kernels.asked.clear()
    prepared("cpu", shape(4, 3, dtype=torch.float16))
    assert kernels.asked == [("old", 2, False)]


def test_threads_for_work_that_is_worth_them(kernels) -> None:
    """From two million multiply-adds on: rows x heads x classes x columns."""
    for rows, threads in ((2**21 // 60 + 1, 7), (2**21 // 60, 1)):
        problem = shape(5, 4, 3, rows=rows)
        assert prepared("cpu", problem).describe() == f"cpu: new, {FEW}, {threads} thread(s)"
    assert CPU._threads(shape(2**10, 2**11), 1) == 7


def test_rows_at_a_time(kernels, monkeypatch) -> None:
    """All, unless temporaries would grow with them: copies of strided rows, norms of sequences."""
    case = random_case("ids", n=20)
    assert prepared("cpu", problem_of(case)).chunk_rows == 20
    assert prepared("cpu", problem_of(random_case("ids", n=1))).chunk_rows == 1
    assert prepared("cpu", problem_of(random_case("ids", n=0))).chunk_rows == 1
    assert prepared("cpu", problem_of(case, cu_seqlens=torch.tensor([0, 20]))).chunk_rows == 8192
    turned = Case(case.features.T.contiguous().T, *case.args[1:], case.options)
    assert prepared("cpu", problem_of(turned)).chunk_rows == 8192
    column = random_case("ids", n=20, d=1)
    far = Case(torch.zeros(20, 5)[:, ::5], *column.args[1:], column.options)
    assert far.features.stride(1) == 5 and prepared("cpu", problem_of(far)).chunk_rows == 20
    monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    for classes, heads, rows in ((1000, 1, 67_108), (1000, 3, 22_369), (300_000, 1, 256)):
        problem = shape(classes, 1, heads, rows=10**6)
        assert prepared("cpu", problem).chunk_rows == rows


def test_what_both_passes_read(kernels) -> None:
    """Fields of the rows of a chunk, each at the address where they lie; 0 for what is not."""
    case = random_case("ids", n=20, c=5, d=7, heads=2, sample_weight=torch.rand(20))
    problem = problem_of(case, nonfinite="exclude", ignore_index=3)
    rows, out = slice(4, 20), _allocate(problem)
    passes = prepared("cpu", problem)
    part = passes.first(rows, out)
    assert part.residual is not None and part.residual.shape == (16, 2, 5)
    assert part.residual.stride() == (1, 5 * 16, 16)  # row after row of one class
    assert (part.grad_sum.shape, part.bias_grad_sum.shape) == ((2, 5, 7), (2, 5))
    assert part.grad_sum.dtype == part.bias_grad_sum.dtype == torch.float64
    assert not part.grad_sum.any() and not part.bias_grad_sum.any()
    ((name, variant, job),) = kernels.jobs
    assert (name, variant) == ("first", "new")
    assert {
        key: job.pop(key) for key in ("features", "weight", "bias", "labels", "sample_weight")
    } == {
        "features": problem.features.data_ptr() + 4 * 7 * 4,
        "weight": problem.weight.data_ptr(),
        "bias": problem.bias.data_ptr(),
        "labels": problem.labels.data_ptr() + 8 * 4,
        "sample_weight": problem.sample_weight.data_ptr() + 4 * 4,
    }
    written = {
        **{key: getattr(out, field).data_ptr() + 4 * 4 for key, field in STATISTICS.items()},
        "counted": out.counted.data_ptr() + 4,
        "status": out.status.data_ptr(),
        "residual": part.residual.data_ptr(),
        "grad_sum": part.grad_sum.data_ptr(),
        "bias_grad_sum": part.bias_grad_sum.data_ptr(),
    }
    assert {key: job.pop(key) for key in written} == written
    assert job == SETTINGS | {"stat_stride": 20}
    gradient, shift = (
        torch.ones(2, 5, 7).transpose(1, 2).contiguous().transpose(1, 2),
        torch.ones(2, 5),
    )
    passes.begin_second(gradient, shift)
    alignment = torch.empty(2, 16)
    passes.second(rows, out, part.residual, alignment)
    name, variant, job = kernels.jobs[1]
    assert (name, variant) == ("second", "new") and passes.mean_grad.is_contiguous()
    read = {
        "mean_grad": passes.mean_grad.data_ptr(),
        "mean_bias_grad": shift.data_ptr(),
        "counted": out.counted.data_ptr() + 4,
        "residual": part.residual.data_ptr(),
        "alignment": alignment.data_ptr(),
    }
    assert {key: job.pop(key) for key in read} == read
    for key in INPUTS:
        job.pop(key)
    assert job == SETTINGS | {"alignment_stride": 16, "self_term_scale": 0.0}


@pytest.mark.parametrize("formula", [None, "official"])
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_what_is_read_where_all_is_done_in_one_go(kernels, formula, chunk_size) -> None:
    """Every result has memory of its own, so that who keeps one keeps no other."""
    case = random_case("ids", n=20, c=5, d=7, heads=2, sample_weight=torch.rand(20))
    problem = problem_of(case, nonfinite="exclude", ignore_index=3)
    done = prepared("cpu", problem, chunk_size).whole(formula, 2, read=True)
    ((name, variant, job),) = kernels.jobs
    assert (name, variant) == ("whole", "new") and done is not None
    results = done.results
    written = {
        **{name: getattr(results, name) for name in ("el2n", "margin", "entropy", "alignment",
           "grad_sqnorm", "mean_grad_sqnorm", "count")},
        "loss_out": results.loss, "counted": done.counted, "facts": done.facts,
    }  # fmt: skip
    assert {name: job.pop(name) for name in written} == {
        name: tensor.data_ptr() for name, tensor in written.items()
    }
    assert len({tensor.untyped_storage().data_ptr() for tensor in written.values()}) == 10
    assert done.facts.shape == (4 + 1 + 2 * 6,) and done.facts.dtype == torch.float64
    assert (results.score is None) == (formula is None)
    assert job.pop("score") == (0 if results.score is None else results.score.data_ptr())
    for key in INPUTS:
        assert job.pop(key) == getattr(problem, key).data_ptr(), key
    assert job == SETTINGS | {
        "first_row": 0, "rows": 20, "keep_residual": chunk_size is None, "scale": 2.0,
        "formula": 2 if formula else 4,
    }  # fmt: skip


INPUTS = ("features", "weight", "bias", "labels", "sample_weight")
STATISTICS = {
    "loss_out": "loss", "residual_sqnorm": "residual_sqnorm", "margin": "margin",
    "entropy": "entropy", "feature_sqnorm": "feature_sqnorm",
}  # fmt: skip
SETTINGS = {
    "dtype": 0, "row_stride": 7, "first_row": 4, "rows": 16, "dim": 7, "heads": 2, "classes": 5,
    "targets": 0, "loss": 0, "label_smoothing": 0.0, "target_tolerance": 0.01, "ignore_index": 3,
    "exclude_nonfinite": True, "threads": 1, "own_threads": False, "few_classes": True,
    "bf16_products": False, "split_grad": False,
}  # fmt: skip


def first_job(kernels: Kernels, case: Case, chunk_size: int | None = None, **options: Any) -> Any:
    """The job of a first pass over all rows, and what the pass returned."""
    problem = problem_of(case, **options)
    part = prepared("cpu", problem, chunk_size).first(slice(0, problem.rows), _allocate(problem))
    return kernels.jobs[-1][2], part


def test_kinds_of_targets_and_of_features(kernels) -> None:
    for kind, number in (("soft", 0), ("binary", 1), ("mse", 2)):
        job, _ = first_job(kernels, random_case(kind))
        assert (job["loss"], job["labels"], bool(job["targets"])) == (number, 0, True)
    for dtype, number in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)):
        job, _ = first_job(kernels, random_case("ids_smoothed", dtype=dtype, bias=False))
        assert (job["dtype"], job["label_smoothing"], job["bias"]) == (number, 0.1, 0)
        assert (job["sample_weight"], job["exclude_nonfinite"]) == (0, False)
    case = random_case("ids", n=20, d=7)
    turned = Case(case.features.T.contiguous().T, *case.args[1:], case.options)
    job, _ = first_job(kernels, turned)
    assert job["row_stride"] == 7 and job["features"] != turned.features.data_ptr()
    wide = torch.zeros(20, 30)[:, 2:9]
    job, _ = first_job(kernels, Case(wide, *case.args[1:], case.options))
    assert (job["row_stride"], job["features"]) == (30, wide.data_ptr())


def test_residuals_are_made_where_somebody_wants_them(kernels, monkeypatch) -> None:
    """The caller of the pass, or the mean gradient in blocks, which keeps them to itself."""
    case = random_case("ids", n=20, c=40)
    offsets = torch.tensor([0, 20])
    monkeypatch.setattr(CPU, "_SPLIT_GRAD_ROWS", 0)
    for blocks in (False, True):
        most = 1 if blocks else 2**30
        monkeypatch.setattr(CPU, "_SPLIT_GRAD_ELEMENTS", {"float32": most, "bfloat16": most})
        for chunk_size, options, returned in (
            (None, {}, True),
            (20, {}, False),
            (20, {"cu_seqlens": offsets}, True),
        ):
            job, part = first_job(kernels, case, chunk_size, **options)
            assert (part.residual is not None) == returned
            assert bool(job["residual"]) == (returned or blocks) and job["split_grad"] == blocks
            if returned:
                assert part.residual.is_contiguous() and part.residual.shape == (20, 1, 40)


def test_the_own_term_of_a_row_is_put_right_where_operands_are_rounded(kernels) -> None:
    case = random_case("ids", n=20, c=40)
    offsets = torch.tensor([0, 20])
    for precision, options, count, scale in (
        ("medium", {}, 8, 1 / 8),
        ("medium", {}, 0, 1.0),
        ("medium", {"cu_seqlens": offsets}, 8, 0.0),
        ("highest", {}, 8, 0.0),
    ):
        problem = problem_of(case, precision=precision, **options)
        passes, out = prepared("cpu", problem), _allocate(problem)
        out.counted[:] = torch.arange(20) < count
        passes.begin_second(torch.zeros(1, 40, 7), None)
        passes.second(slice(0, 20), out, None, torch.empty(1, 20))
        job = kernels.jobs[-1][2]
        assert job["self_term_scale"] == scale
        assert (job["residual"], job["mean_bias_grad"]) == (0, 0)


def test_in_a_child_process_threads_are_its_own(kernels, monkeypatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert first_job(kernels, random_case("ids"))[0]["own_threads"] is True
    assert backends()["cpu"].reason == "C++ kernels, new"
