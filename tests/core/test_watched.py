"""Who is to see the operator, and what goes straight to the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_support import random_case

from moso_fast.core import operator
from moso_fast.core.options import Options
from moso_fast.core.problem import build_problem

ARGUMENTS = ("features", "weight", "labels", "bias", "sample_weight", "cu_seqlens")


class Own(torch.Tensor):
    """A kind of tensor that may do anything with an operation."""


def problem_of(**changed: Any) -> Any:
    case = random_case("ids", heads=2)
    given = dict(zip(ARGUMENTS, case.args, strict=False))
    given |= {"sample_weight": torch.ones(17), "cu_seqlens": torch.tensor([0, 17])}
    return build_problem(**{**given, **changed})


def test_plain_tensors_are_nobodys_business() -> None:
    assert not operator._watched(problem_of())
    for name in ("bias", "sample_weight", "cu_seqlens"):
        assert not operator._watched(problem_of(**{name: None}))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_may_be_of_another_kind(name) -> None:
    problem = problem_of()
    object.__setattr__(problem, name, getattr(problem, name).as_subclass(Own))
    assert operator._watched(problem)
    negated = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert negated.is_neg() and not operator._plain(negated)
    assert not operator._plain(torch.ones(3, device="meta")) and operator._plain(torch.ones(3))


def test_what_is_told_to_the_operator_and_to_the_engine(monkeypatch) -> None:
    """The same problem, backend, rows of a chunk and formula, by either road."""
    asked: list[Any] = []
    results = tuple(torch.full((), float(k)) for k in range(8))

    def run(problem: Any, backend: Any, *given: Any) -> Any:
        asked.append((problem, backend.name, *given))
        return results, "scores"

    monkeypatch.setattr(operator, "_run", run)
    problem = problem_of(label_smoothing=0.25, ignore_index=3, precision="high")
    found = operator.score(problem, "torch", 5, "one_step", 0.5)
    assert found == (results, "scores", "torch") and asked == [
        (problem, "torch", 5, "one_step", 0.5)
    ]
    asked.clear()
    monkeypatch.setattr(operator, "_watched", lambda problem: True)
    found, scores, name = operator.score(problem, "torch", 5, "one_step", 0.5)
    assert (scores, name) == (None, "torch") and [float(one) for one in found] == [*range(8)]
    ((through, *rest),) = asked
    assert rest == ["torch", 5, "one_step", 1.0]
    for field in (*operator.OPTION_NAMES, "heads", "rows", "stacked"):
        assert getattr(through, field) == getattr(problem, field), field
    for argument in ARGUMENTS:
        pair = getattr(through, argument), getattr(problem, argument)
        assert torch.equal(*pair) and pair[0].data_ptr() == pair[1].data_ptr(), argument
    assert Options.among({}).per == through.per


def test_results_come_in_the_order_of_the_operator(monkeypatch) -> None:
    names = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy", "mean_grad_sqnorm",
             "count", "score")  # fmt: skip
    made: list[Any] = []

    def run(*given: Any) -> Any:
        made.append(given)
        return type("Results", (), {name: name for name in names})

    monkeypatch.setattr(operator.engine, "run", run)
    problem = problem_of()
    found = operator._run(problem, "backend", 5, "moso", 0.5)  # type: ignore[arg-type]
    assert found == (names[:-1], "score")
    assert made == [(problem, "backend", 5, "moso", 0.5)]
