"""What the engine hands to the passes of a backend, in which order, and what it makes of it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import FIELDS, Case, random_case

from moso_fast.backends.torch import TorchBackend, TorchPasses
from moso_fast.core import engine, memory
from moso_fast.core.passes import Passes, Plan, Whole
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.reference import closed_form_stats
from moso_fast.core.status import STATUS_SLOTS


class Watched(TorchBackend):
    """The torch backend, which notes what is asked of it."""

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows  # of a chunk
        self.asked: list[Any] = []
        self.finished: Whole | None = None

    def prepare(self, problem: Problem, plan: Plan) -> WatchedPasses:
        passes = WatchedPasses(problem, plan)
        passes.backend, passes.made = self, {}
        passes.chunk_rows = self.rows or passes.chunk_rows
        return passes


class WatchedPasses(TorchPasses):
    backend: Watched
    made: dict[int, Any]

    def whole(self, formula: str | None, scale: float, *, read: bool) -> Whole | None:
        self.backend.asked.append(("whole", formula, scale, read))
        return self.backend.finished

    def first(self, rows: slice, out: Any) -> Any:
        self.backend.asked.append(("first", rows.start, rows.stop))
        part = super().first(rows, out)
        self.made[rows.start] = part.residual
        return part

    def begin_second(self, mean_grad: torch.Tensor, mean_bias_grad: torch.Tensor | None) -> None:
        given = [(tuple(one.shape), one.dtype) for one in (mean_grad, mean_bias_grad)
                 if one is not None]  # fmt: skip
        self.backend.asked.append(("begin", *given))
        super().begin_second(mean_grad, mean_bias_grad)

    def second(self, rows: slice, out: Any, residual: Any, alignment: torch.Tensor) -> None:
        held = residual is not None and residual is self.made[rows.start]
        self.backend.asked.append(("second", rows.start, rows.stop, held))
        assert residual is None or held, "residuals of another chunk"
        assert not torch.is_grad_enabled()
        assert alignment.shape == (self.problem.heads, rows.stop - rows.start)
        assert int(out.count) == self.problem.samples  # known by now; none is left out here
        super().second(rows, out, residual, alignment)


def problem_of(case: Case, **options: Any) -> Problem:
    return build_problem(*case.args, **case.options, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_the_passes_of_a_job_in_one_chunk(dtype, bias) -> None:
    backend, case = Watched(), random_case("ids", heads=2, dtype=dtype, bias=bias)
    engine.run(problem_of(case), backend, formula="one_step", scale=0.25)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert backend.asked == [
        ("whole", "one_step", 0.25, True),
        ("first", 0, 17),
        ("begin", ((2, 5, 7), wide), *([((2, 5), wide)] if bias else [])),
        ("second", 0, 17, True),
    ]
    backend.asked.clear()
    engine.run(problem_of(case), backend)
    assert backend.asked[0] == ("whole", None, 1.0, True)


def test_residuals_come_back_where_they_are_kept_and_only_there(monkeypatch) -> None:
    case = random_case("ids")
    sequences = torch.tensor([0, 4, 9, 17])

    def asked(chunk_size: int | None = None, rows: int = 17, **options: Any) -> list[Any]:
        backend = Watched(rows)
        engine.run(problem_of(case, **options), backend, chunk_size)
        return [entry for entry in backend.asked if entry[0] != "begin"]

    def steps(bounds: list[int], held: bool) -> list[Any]:
        pairs = list(pairwise(bounds))
        return [*(("first", *pair) for pair in pairs), *(("second", *pair, held) for pair in pairs)]

    in_one_go = ("whole", None, 1.0, True)
    assert asked() == [in_one_go, *steps([0, 17], True)]
    assert asked(rows=7) == steps([0, 7, 14, 17], True)
    assert asked(7) == steps([0, 7, 14, 17], False)
    assert asked(17) == [in_one_go, *steps([0, 17], False)]
    # Norms of sequences need residuals at once; they do not stay for that.
    assert asked(cu_seqlens=sequences) == steps([0, 17], True)
    assert asked(9, cu_seqlens=sequences) == steps([0, 9, 17], False)
    monkeypatch.setattr(memory, "residual_budget", lambda device: 0)
    assert asked(rows=7) == steps([0, 7, 14, 17], False)
    assert asked() == [in_one_go, *steps([0, 17], False)]


def test_what_a_backend_did_in_one_go_is_the_result() -> None:
    """Judged all the same: its facts are the status, the count, and six numbers a head."""
    case = random_case("ids", n=4)
    backend, reference = Watched(), closed_form_stats(*case.args)
    results = engine.Results(
        **{name: getattr(reference, name).float() for name in FIELDS},
        mean_grad_sqnorm=reference.mean_grad_sqnorm,
        count=torch.tensor(4),
    )
    mean, total = float(results.mean_grad_sqnorm), float(results.alignment.double().sum())
    norms = float(results.grad_sqnorm.sqrt().sum())
    facts = [*[4.0] * STATUS_SLOTS, 4.0, mean, total, norms, 1.0, 1.0, 0.0]
    facts = torch.tensor(facts, dtype=torch.float64)
    counted = torch.ones(4, dtype=torch.bool)
    backend.finished = Whole(results, counted, facts)
    assert engine.run(problem_of(case), backend, formula="moso") is results
    assert backend.asked == [("whole", "moso", 1.0, True)]

    def refused(message: str, at: int, value: float, weights: torch.Tensor | None = None) -> None:
        backend.finished = Whole(results, counted, facts.index_fill(0, torch.tensor(at), value))
        with pytest.raises((ValueError, RuntimeError), match=message):
            engine.run(problem_of(case, sample_weight=weights), backend, formula="moso")

    inf = float("inf")
    refused("^formula='moso' compares a sample with the others, but only 1", 4, 1)
    refused("^self-check failed for head 0", 5, mean + 1.0)
    refused("^self-check failed for head 0", 6, total + 1.0)
    refused("^self-check failed for head 0", 7, 0.0)
    case.labels[2] = 9
    refused(r"^labels\[2\] is 9, outside", 0, 2)
    case.weight[1, 2] = inf
    refused(r"^weight\[1, 2\] is inf", 8, inf)
    case.weight[1, 2] = 0.0
    case.bias[3] = inf
    refused(r"^bias\[3\] is inf", 9, inf)
    case.bias[3] = 0.0
    refused(r"^sample_weight\[1\] is inf", 10, inf, torch.tensor([1.0, inf, 1.0, 1.0]))


def test_only_the_lone_sum_of_a_large_head_on_a_gpu_stays_as_it_is(monkeypatch) -> None:
    """To widen one costs a GPU a sweep over it; on a CPU, or of several, it is widened."""
    for is_cuda, numbers, stays in (
        (True, 2**24, True),
        (True, 2**24 - 1, False),
        (False, 2**24, False),
    ):
        part: Any = SimpleNamespace(is_cuda=is_cuda, numel=lambda n=numbers: n)
        assert engine._too_large_to_widen(part) == stays
    problem = problem_of(random_case("ids", n=6, heads=2))
    for stays, chunks in ((True, 1), (False, 1), (True, 3)):
        monkeypatch.setattr(engine, "_too_large_to_widen", lambda part, s=stays: s)
        passes = Watched().prepare(problem, Plan(6 // chunks, False, 0, 0))
        feed = engine.Feed(
            problem, [slice(at, at + 6 // chunks) for at in range(0, 6, 6 // chunks)]
        )
        swept = engine._first_passes(feed, passes, engine._allocate(problem), None)
        assert swept.grad_sum is not None and swept.bias_grad_sum is not None
        single = stays and chunks == 1
        assert swept.grad_sum.dtype == (torch.float32 if single else torch.float64)
        assert swept.bias_grad_sum.dtype == torch.float64
        assert swept.kept == [None] * chunks and swept.sequence_norms == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_rows_leave_what_they_find(dtype) -> None:
    problem = problem_of(random_case("ids", n=6, heads=2, dtype=dtype))
    rows = engine._allocate(problem)
    for name in ("loss", "residual_sqnorm", "margin", "entropy"):
        assert getattr(rows, name).shape == (2, 6) and getattr(rows, name).dtype == dtype
    assert rows.feature_sqnorm.shape == (6,) and rows.feature_sqnorm.dtype == dtype
    assert rows.counted.shape == (6,) and rows.counted.dtype == torch.bool
    assert rows.status.tolist() == [6] * STATUS_SLOTS and rows.status.dtype == torch.int64
    assert rows.count is None
    rows.counted[:] = torch.tensor([True, False, True, True, False, True])
    assert int(rows.number_counted()) == 4
    rows.count = torch.tensor(3)  # of samples, once that is known
    assert int(rows.number_counted()) == 3


def test_a_job_says_one_line_of_itself_unless_it_has_more_to_say() -> None:
    passes = Watched().prepare(problem_of(random_case("ids")), Plan(None, True, 0, 0))
    assert Passes.explain(passes, 5) == ["torch: chunked closed form"]
    assert Passes.whole(passes, "moso", 1.0, read=True) is None


@pytest.mark.parametrize("kind", ["ids_smoothed", "soft", "binary", "mse"])
def test_everything_is_made_where_the_job_is(kind, monkeypatch) -> None:
    """On a device without memory, whose tensors meet no others; nothing is read of them."""
    monkeypatch.setattr(engine, "_capturing", lambda problem: True)
    meta = torch.device("meta")
    for rows, heads, bias, chunk_size, dtype, nonfinite in (
        (17, 2, True, None, torch.float32, "exclude"),
        (17, 1, False, 5, torch.float64, "raise"),
        (0, 3, True, None, torch.float32, "raise"),
        (5000, 2, True, 5000, torch.float32, "raise"),  # several slabs
    ):
        case = random_case(kind, n=rows, heads=heads, bias=bias, dtype=dtype)
        args = [None if one is None else one.to(meta) for one in case.args]
        options = {**case.options, "sample_weight": torch.ones(rows, device=meta)}
        problem = build_problem(*args, **options, nonfinite=nonfinite)
        results = engine.run(problem, TorchBackend(), chunk_size, "moso")
        for name in (*FIELDS, "mean_grad_sqnorm", "count"):
            assert getattr(results, name).device == meta, name
        for name in FIELDS:
            assert getattr(results, name).shape == (heads, rows)
            assert getattr(results, name).dtype == problem.compute_dtype
        for name, value in vars(engine._allocate(problem)).items():
            assert value is None or value.device == meta, name
        for total in engine._mean_gradient(problem, engine._Swept(), results.count):
            assert (total.device, total.dtype) == (meta, torch.float64)
