"""Which backend scores, who asked for it, and what `explain` says of it."""

from __future__ import annotations

import pytest
from core_support import random_case

import moso_fast
from moso_fast.backends import Availability, choose, get
from moso_fast.core.problem import build_problem
from moso_fast.functional import explain, last_layer_stats, moso_scores


def test_environment_variable_chooses_the_backend(monkeypatch):
    case = random_case("ids")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "torch")
    assert last_layer_stats(*case.args).backend == "torch"
    assert "torch: asked for by MOSO_FAST_BACKEND=torch" in explain(*case.args)
    monkeypatch.setenv("MOSO_FAST_BACKEND", "")
    default = last_layer_stats(*case.args).backend
    monkeypatch.setenv("MOSO_FAST_BACKEND", "nonsense")
    message = r"^backend must be one of auto, .*torch.*; got 'nonsense'$"
    with pytest.raises(ValueError, match=message):
        moso_scores(*case.args)
    assert last_layer_stats(*case.args, backend="torch").backend == "torch"  # argument first
    monkeypatch.delenv("MOSO_FAST_BACKEND")
    assert (
        last_layer_stats(*case.args).backend == default == choose(build_problem(*case.args))[0].name
    )


@pytest.mark.parametrize("bad", ["nonsense", "Torch", "", None])
@pytest.mark.parametrize("call", [moso_scores, last_layer_stats, explain])
def test_unknown_backend(call, bad):
    case = random_case("ids")
    with pytest.raises(ValueError, match=r"^backend must be one of auto, .*torch.*; got "):
        call(*case.args, backend=bad)


def test_a_backend_asked_for_by_name_is_never_replaced(monkeypatch):
    case = random_case("ids")
    backend = get("torch")
    monkeypatch.setattr(type(backend), "supports", lambda self, problem: "it is Sunday")
    with pytest.raises(ValueError, match=r"^backend='torch' cannot run this problem: it is Sunday"):
        moso_scores(*case.args, backend="torch")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "torch")
    with pytest.raises(ValueError, match=r"^MOSO_FAST_BACKEND=torch cannot run this problem"):
        moso_scores(*case.args)
    monkeypatch.setattr(
        type(backend), "availability", lambda self: Availability(False, "it is gone", "look")
    )
    with pytest.raises(ValueError, match="it is gone"):
        moso_scores(*case.args, backend="torch")


def test_backends_say_why():
    table = moso_fast.backends()
    assert table["torch"].available and "PyTorch" in table["torch"].reason
    for availability in table.values():
        assert availability.reason
        assert bool(availability.how) != availability.available


def test_explain_tells_the_plan_without_running(monkeypatch):
    case = random_case("ids", n=1000, heads=2)
    monkeypatch.setattr("moso_fast.core.engine.run", None)  # calling it would fail
    text = explain(*case.args, formula="one_step", scale=0.1, backend="torch", chunk_size=300)
    assert "N=1000" in text and "D=7" in text and "C=5" in text and "K=2" in text
    assert "backend   torch" in text and "asked for by backend='torch'" in text
    assert "4 chunk(s) of up to 300 rows" in text and "computed again" in text
    assert "kept between the passes" in explain(*case.args)
    with pytest.raises(ValueError, match="formula must be one of"):
        explain(*case.args, formula="x")
