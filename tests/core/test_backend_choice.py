"""Which backend scores, who asked for it, and what `explain` says of it."""

from __future__ import annotations

import pytest
import torch
from core_support import random_case
from torch._subclasses.fake_tensor import FakeTensorMode

import moso_fast
from moso_fast.backends import _REGISTRY, Availability, Backend, choose, get
from moso_fast.core.logit_map import LogitMap
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


class Made(Backend):
    """A backend that answers as it was told."""

    streams = maps = True

    def __init__(self, name: str, *, gone: str = "", not_for: str = "", passed: str = "") -> None:
        self.name, self._gone, self._not_for, self._passed = name, gone, not_for, passed

    def availability(self) -> Availability:
        return Availability(not self._gone, self._gone or f"{self.name} is here", "")

    def supports(self, problem):
        return self._not_for or None

    def not_by_default(self, problem):
        return self._passed or None

    def prepare(self, problem, plan):
        raise AssertionError("nobody asked for that")


@pytest.fixture
def registry(monkeypatch):
    """Put backends of these answers in the place of all that there are."""

    def set_up(**answers):
        made = {name: Made(name, **answers.get(name, {})) for name in _REGISTRY}
        for name, backend in made.items():
            monkeypatch.setitem(_REGISTRY, name, backend)
        return made

    monkeypatch.delenv("MOSO_FAST_BACKEND", raising=False)
    return set_up


def problem_on(device: str):
    with FakeTensorMode():
        features, labels = torch.zeros(6, 3, device=device), torch.zeros(6, device=device).long()
        return build_problem(features, torch.zeros(4, 3, device=device), labels)


def test_the_first_that_can_is_taken_and_the_others_say_why_not(registry):
    made = registry()
    assert choose(problem_on("cpu")) == (made["cpu"], ["cpu: chosen, cpu is here"])
    assert choose(problem_on("cuda")) == (made["cuda"], ["cuda: chosen, cuda is here"])
    assert choose(problem_on("meta")) == (made["torch"], ["torch: chosen, torch is here"])
    made = registry(cuda={"gone": "not built"}, triton={"passed": "never timed"},
                    cpu={"not_for": "wants ids"})  # fmt: skip
    assert choose(problem_on("cuda")) == (
        made["torch"],
        ["cuda: not used, not built", "triton: not used, never timed",
         "torch: chosen, torch is here"],
    )  # fmt: skip
    assert choose(problem_on("cpu")) == (
        made["torch"], ["cpu: not used, wants ids", "torch: chosen, torch is here"]
    )  # fmt: skip
    # By name it runs although auto passes it over.
    assert choose(problem_on("cuda"), "triton") == (
        made["triton"], ["triton: asked for by backend='triton'"]
    )  # fmt: skip
    registry(cpu={"gone": "not built", "not_for": "?"}, torch={"not_for": "is Sunday"})
    with pytest.raises(RuntimeError) as caught:
        choose(problem_on("cpu"))
    assert str(caught.value) == (
        "no backend can run this problem: cpu: not used, not built; torch: not used, is Sunday"
    )


def test_who_asked_for_a_backend_is_said(registry, monkeypatch):
    made = registry(cuda={"not_for": "wants ids", "passed": "never timed"})
    monkeypatch.setenv("MOSO_FAST_BACKEND", "triton")
    assert choose(problem_on("cpu")) == (
        made["triton"], ["triton: asked for by MOSO_FAST_BACKEND=triton"]
    )  # fmt: skip
    assert choose(problem_on("cpu"), "torch")[1] == ["torch: asked for by backend='torch'"]
    for asked, source in (("cuda", "backend='cuda'"), ("auto", "MOSO_FAST_BACKEND=cuda")):
        monkeypatch.setenv("MOSO_FAST_BACKEND", "cuda")
        with pytest.raises(ValueError) as caught:
            choose(problem_on("cpu"), asked)
        assert str(caught.value) == f"{source} cannot run this problem: wants ids"
    monkeypatch.setenv("MOSO_FAST_BACKEND", "")
    assert choose(problem_on("cpu"))[1] == ["cpu: chosen, cpu is here"]
    with pytest.raises(ValueError) as caught:
        get("Torch")
    assert str(caught.value) == (
        "backend must be one of auto, cpu, triton, cuda, torch; got 'Torch'"
    )


def test_what_a_backend_does_not_do_is_not_asked_of_it(registry, monkeypatch):
    made = registry()
    factor = LogitMap("scale", (torch.tensor(0.5, dtype=torch.float64),))
    with FakeTensorMode():
        features, labels = torch.zeros(6, 3), torch.zeros(6).long()
        streamed = build_problem(features, torch.zeros(4, 3, device="cuda"), labels)
    mapped = build_problem(*random_case("ids").args, logit_map=factor)
    assert choose(streamed)[0] is made["cuda"] and choose(mapped)[0] is made["cpu"]
    monkeypatch.setattr(Made, "streams", False)
    monkeypatch.setattr(Made, "maps", False)
    why = "features lie in main memory, and it streams none to cuda:0"
    assert choose_error(streamed, "cuda") == f"backend='cuda' cannot run this problem: {why}"
    why = "the logits are a factor of 0.5 of the head's output z"
    assert choose_error(mapped, "cpu") == f"backend='cpu' cannot run this problem: {why}"
    assert choose(build_problem(*random_case("ids").args))[0] is made["cpu"]


def choose_error(problem, name):
    with pytest.raises(ValueError) as caught:
        choose(problem, name)
    return str(caught.value)


def test_the_table_of_backends():
    found = moso_fast.backends()
    assert list(found) == ["cpu", "triton", "cuda", "torch"]
    for name, availability in found.items():
        assert availability == get(name).availability() and get(name).name == name
