"""The two passes: cutting, what is kept, the self-check, and buffers nobody may forget to write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import (
    CPU_BACKENDS,
    FIELDS,
    KINDS,
    Case,
    assert_close,
    assert_stats_match,
    chunk_rows,
    generator,
    prepared,
    random_case,
    score_with,
)

from moso_fast.backends import _REGISTRY, get
from moso_fast.backends.torch import TorchBackend, TorchPasses
from moso_fast.core import engine, memory
from moso_fast.core import sums as core_sums
from moso_fast.core.precision import own_precision
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import last_layer_stats, moso_scores

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


def problem_of(case: Case, **options: Any):
    return build_problem(*case.args, **case.options, **options)


def test_plan_keeps_residuals_only_within_the_budget(monkeypatch):
    problem = problem_of(random_case("ids", heads=3))
    bytes_needed = 17 * 3 * 5 * 4
    monkeypatch.setattr(memory, "residual_budget", lambda device: bytes_needed)
    passes = prepared("torch", problem)
    assert passes.plan.keep_residual and passes.plan.residual_bytes == bytes_needed
    assert chunk_rows("torch", problem) == passes.chunk_rows
    monkeypatch.setattr(memory, "residual_budget", lambda device: bytes_needed - 1)
    assert not memory.make_plan(problem, None).keep_residual
    assert not memory.make_plan(problem, 5).keep_residual
    assert chunk_rows("torch", problem, 5) == 5


def test_budget_is_a_share_of_the_memory():
    budget = memory.residual_budget(torch.device("cpu"))
    assert 2**26 < budget < 2**50


def test_memory_that_earlier_work_left_with_pytorch_counts_as_free(monkeypatch):
    device, gib = torch.device("cuda", 0), 2**30
    held: dict[str, int] = {}
    free = 80 * gib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device=None: held)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = memory.residual_budget(device), memory.resident_budget(device, gib)
    # A call has taken 60 GiB from the driver and given them back to PyTorch's pool.
    free = 20 * gib
    held.update({"reserved_bytes.all.current": 60 * gib, "active_bytes.all.current": 0})
    assert (memory.residual_budget(device), memory.resident_budget(device, gib)) == before
    # What is in use, or shares a block with what is, cannot be had.
    held["active_bytes.all.current"] = 50 * gib
    held["inactive_split_bytes.all.current"] = 4 * gib
    assert memory.residual_budget(device) == 13 * gib


@each_backend
def test_default_chunks_are_bounded(backend):
    """At most 8192 rows a float32 partial, and few rows for a vocabulary head."""
    if get(backend).supports(problem_of(random_case("ids"))) is not None:
        pytest.skip("does not run such problems")
    small = problem_of(random_case("ids"))
    assert 1 <= chunk_rows(backend, small) <= 8192
    vocabulary = Case(
        torch.zeros(4, 8), torch.zeros(1, 8).expand(100_000, 8), torch.zeros(4).long(), None
    )
    rows = chunk_rows(backend, problem_of(vocabulary))
    assert rows >= 1 and rows * 100_000 * 4 <= 2**28


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
@pytest.mark.parametrize("kind", ["ids", "soft", "binary", "mse"])
@each_backend
def test_chunk_borders(backend, kind, chunk_size, rows):
    case = random_case(kind, n=rows, heads=2)
    stats = score_with(backend, case, chunk_size=chunk_size)
    assert_stats_match(stats, closed_form_stats(*case.args, **case.options), 1e-5, floor=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@each_backend
def test_kept_and_recomputed_residuals_agree(backend, kind, monkeypatch):
    # The Triton backend chooses by whether they are kept; here it is one way in both cases.
    monkeypatch.setenv("MOSO_FAST_TRITON_REGIME", "blas")
    case = random_case(kind, n=70, heads=2)
    kept = score_with(backend, case)
    monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    again = score_with(backend, case)
    for name in FIELDS:
        assert_close(getattr(again, name), getattr(kept, name), 1e-6, what=name)
    assert again.mean_grad_sqnorm.equal(kept.mean_grad_sqnorm)


@pytest.mark.parametrize("offset", [-1, 0, 1])
@each_backend
def test_around_the_backends_own_chunk(backend, offset, monkeypatch):
    rows = chunk_rows(backend, problem_of(random_case("ids"))) + offset
    case = random_case("ids", n=rows)
    stats = score_with(backend, case)
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)


def test_chunks_cover_every_row_once_and_keep_sequences_whole():
    assert list(engine._chunks(0, 4, None)) == []
    assert list(engine._chunks(9, 4, None)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    offsets = torch.tensor([0, 0, 3, 4, 4, 11, 12, 14, 14])
    chunks = list(engine._chunks(14, 4, offsets))
    assert chunks == [slice(0, 4), slice(4, 11), slice(11, 14)]
    assert list(engine._chunks(14, 100, offsets)) == [slice(0, 14)]


class _Wrong(TorchBackend):
    """The torch backend with one mistake of the kinds that kernels make."""

    name = "wrong"

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def prepare(self, problem, plan):
        passes = _WrongPasses(problem, plan)
        passes.mistake = self.mistake
        return passes


class _WrongPasses(TorchPasses):
    mistake = ""

    def first(self, rows, out):
        part = super().first(rows, out)
        if self.mistake == "partial lost" and rows.start > 0:
            part.grad_sum = torch.zeros_like(part.grad_sum)
        if self.mistake == "partial added twice" and rows.start == 0:
            part.grad_sum = 2 * part.grad_sum
        if self.mistake == "bias halved":
            part.bias_grad_sum = part.bias_grad_sum / 2
        return part

    def begin_second(self, mean_grad, mean_bias_grad):
        if self.mistake == "mean gradient of another head":
            mean_grad = mean_grad.flip(0)
        if self.mistake == "columns swapped":
            mean_grad = mean_grad.roll(1, -1)
        if self.mistake == "no bias in the second pass":
            mean_bias_grad = None
        super().begin_second(mean_grad, mean_bias_grad)

    def second(self, rows, out, residual, alignment):
        super().second(rows, out, residual, alignment)
        if self.mistake == "row not written" and rows.start == 0:
            alignment[:, 3] = float("nan")
        if self.mistake == "row zero" and rows.start == 0:
            alignment[:, 3] = 0.0
        if self.mistake == "scaled":
            alignment *= 1.01
        if self.mistake == "garbage where nothing counts":
            alignment[:, ~out.counted[rows]] = float("inf")
            out.residual_sqnorm[:, rows][:, ~out.counted[rows]] = float("nan")


MISTAKES = (
    "partial lost",  # takes two chunks
    "partial added twice",
    "bias halved",
    "mean gradient of another head",
    "columns swapped",
    "no bias in the second pass",
    "row not written",
    "row zero",
    "scaled",
)


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "mistake, chunk_size",
    [(mistake, 16) for mistake in MISTAKES] + [(mistake, None) for mistake in MISTAKES[1:]],
)
def test_self_check_stops_a_wrong_backend(monkeypatch, mistake, chunk_size, late, ignored):
    case = random_case("ids", n=40, heads=2)
    case.labels[20 : 20 + ignored] = -100
    monkeypatch.setitem(_REGISTRY, "wrong", _Wrong(mistake))
    monkeypatch.setattr(Problem, "asynchronous", late)
    with pytest.raises(RuntimeError, match=r"^self-check failed for head \d: "):
        last_layer_stats(*case.args, backend="wrong", chunk_size=chunk_size)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("mistake", ["none", "garbage where nothing counts"])
def test_a_backend_with_no_mistake_passes_the_self_check(monkeypatch, mistake, ignored, late):
    case = random_case("ids", n=40, heads=2)
    case.labels[5 : 5 + ignored] = -100
    monkeypatch.setitem(_REGISTRY, "wrong", _Wrong(mistake))
    monkeypatch.setattr(Problem, "asynchronous", late)
    got = last_layer_stats(*case.args, backend="wrong", chunk_size=16)
    assert_stats_match(got, closed_form_stats(*case.args), 1e-5)


def self_check(problem: Any, results: Any, counted: torch.Tensor | None = None) -> None:
    sums = [n for fact in core_sums.result_sums(results, counted) for n in fact.flatten().tolist()]
    core_sums.self_check(problem, results, counted, int(results.count), sums)


@pytest.mark.parametrize(
    "precision, dtype, slip",
    [
        ("highest", torch.float32, 1e-3),
        ("high", torch.float32, 2e-2),
        ("medium", torch.float32, 0.2),
        ("highest", torch.float64, 1e-8),
    ],
)
def test_self_check_is_as_strict_as_the_precision(precision, dtype, slip):
    """Of aligned gradients a slip above the bound is an error and one far below it is not."""
    gradient = torch.ones(1, 50, dtype=dtype)
    problem = replace(problem_of(random_case("ids", dtype=dtype)), precision=precision)

    def results(factor: float) -> Any:
        return SimpleNamespace(
            alignment=gradient * factor,
            grad_sqnorm=gradient,
            mean_grad_sqnorm=torch.ones(1, dtype=torch.float64),
            count=torch.tensor(50),
        )

    self_check(problem, results(1 + slip / 1000))
    with pytest.raises(RuntimeError, match="self-check failed for head 0"):
        self_check(problem, results(1 + slip))
    with pytest.raises(RuntimeError, match="self-check failed for head 0"):
        self_check(problem, results(float("inf")))


@pytest.mark.parametrize("left_out", [0, 1])
def test_self_check_counts_values_that_are_missing(left_out):
    """A sample that counts has a value, however little it would add to the sum."""
    garbage = torch.full((left_out,), float("nan"))
    results = SimpleNamespace(
        alignment=torch.cat([torch.tensor([1.0, 1e-20, 1.0]), garbage])[None],
        grad_sqnorm=torch.cat([torch.tensor([1.0, 1e-20, 1.0]), garbage])[None],
        mean_grad_sqnorm=torch.full((1,), 2 / 3, dtype=torch.float64),
        count=torch.tensor(3),
    )
    counted = torch.arange(4) < 3 if left_out else None
    problem = problem_of(random_case("ids", n=3 + left_out))
    self_check(problem, results, counted)
    for name in ("alignment", "grad_sqnorm"):
        values = getattr(results, name)
        values[0, 1] = float("nan")
        with pytest.raises(RuntimeError, match="self-check failed for head 0: 1 of the 3 samples"):
            self_check(problem, results, counted)
        values[0, 1] = 1e-20


@pytest.mark.parametrize("counted", [0, 2])
@each_backend
def test_all_ignored_but_few(backend, counted):
    case = random_case("ids", n=50)
    labels = torch.full_like(case.labels, -100)
    labels[[9, 41][:counted]] = case.labels[[9, 41][:counted]]
    args = case.features, case.weight, labels, case.bias
    stats = last_layer_stats(*args, backend=backend, chunk_size=8)
    assert stats.count == counted
    assert_stats_match(stats, closed_form_stats(*args), 1e-5)
    scores = moso_scores(*args, backend=backend)
    if counted == 2:
        # The value is the dot product of the two, the same for both.
        torch.testing.assert_close(scores[9], scores[41], rtol=1e-5, atol=1e-6)
        assert scores.isnan().sum() == 48
    else:
        assert stats.mean_grad_sqnorm == 0.0 and scores.isnan().all()


@each_backend
def test_partials_of_many_rows_keep_float32_accuracy(backend):
    """A chunk above 8192 rows is still summed in short float32 partials."""
    g = generator(8)
    features = torch.rand(60_000, 3, generator=g) + 1.0  # all of one sign: sums grow
    labels = torch.zeros(60_000, dtype=torch.long)
    case = Case(features, torch.zeros(2, 3), labels, torch.zeros(2), {})
    exact = closed_form_stats(*case.args)
    stats = score_with(backend, case, chunk_size=60_000)
    assert_close(torch.tensor([stats.mean_grad_sqnorm]), exact.mean_grad_sqnorm, 3e-7)
    assert_close(stats.alignment[None], exact.alignment, 1e-6)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN (or large garbage): whoever reads before writing shows it."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else 77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
@each_backend
def test_every_buffer_is_written(poisoned, backend, kind, chunk_size, sequences):
    options = {"cu_seqlens": torch.tensor([0, 4, 4, 17])} if sequences else {}
    case = random_case(kind, heads=2, **options)
    if KINDS[kind][1] == "ids":
        case.labels[2] = -100
    stats = score_with(backend, case, chunk_size=chunk_size)
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)


@each_backend
def test_simultaneous_problems_do_not_disturb_each_other(backend):
    cases = [random_case(("ids", "soft", "mse")[i % 3], n=300 + i, c=20, seed=i) for i in range(12)]
    alone = [score_with(backend, case) for case in cases]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda case: score_with(backend, case, chunk_size=64), cases))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for left, right in zip(together, alone, strict=True):
        for name in FIELDS:
            assert_close(getattr(left, name), getattr(right, name), 5e-6, what=name)
    assert len({float(stats.mean_grad_sqnorm) for stats in together}) == 12


def test_matmul_precision_holds_until_the_last_thread_leaves():
    problem = problem_of(random_case("ids"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = own_precision(problem), own_precision(problem)
        first.__enter__()
        with second:
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "highest"
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), own_precision(problem):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
