"""What is wrong with the data is said in the same words, judged at once or at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from core_support import CPU_BACKENDS, random_case

from moso_fast.backends import _REGISTRY
from moso_fast.backends.torch import TorchBackend, TorchPasses
from moso_fast.core.passes import Plan
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.status import STATUS_LABEL, STATUS_SLOTS
from moso_fast.core.verdict import Reading, Verdict
from moso_fast.functional import moso_scores

# The kernels for CPUs never run on anything that works behind the host's back.
BACKENDS = tuple(name for name in CPU_BACKENDS if name != "cpu")
ROWS = 17
NAN, INF = float("nan"), float("inf")


class Bad(NamedTuple):
    """A call that is refused: how the message begins, and what is written where to spoil it."""

    begins: str
    edits: tuple[tuple[str, Any, float], ...]  # argument, index, value
    kind: str = "ids"
    heads: int | None = None


EVERYWHERE = slice(None)
BUT_ONE = slice(1, None)

BAD = {
    "weight nan": Bad("weight[3, 2] is nan;", (("weight", (3, 2), NAN),)),
    "weight -inf": Bad("weight[1, 0, 6] is -inf;", (("weight", (1, 0, 6), -INF),), heads=2),
    "all weights nan": Bad("weight[0, 0] is nan;", (("weight", EVERYWHERE, NAN),)),
    "bias inf": Bad("bias[4] is inf;", (("bias", 4, INF),)),
    "sample weight nan": Bad("sample_weight[5] is nan;", (("sample_weight", 5, NAN),)),
    "label too large": Bad("labels[6] is 5, outside", (("labels", 6, 5),)),
    "label far out": Bad("labels[0] is 4611686018427387904, outside", (("labels", 0, 2**62),)),
    "label negative": Bad("labels[16] is -1, outside", (("labels", 16, -1),)),
    "feature nan": Bad("features[7, 3] is nan;", (("features", (7, 3), NAN),)),
    "feature inf": Bad("features[8, 0] is inf;", (("features", (8, 0), INF),)),
    "all features nan": Bad("features[0, 0] is nan;", (("features", EVERYWHERE, NAN),)),
    "target negative": Bad(
        "labels[9] holds -0.5 at class 1;", (("labels", (9, 1), -0.5),), kind="soft"
    ),
    "target nan": Bad("labels[9] holds nan at class 0;", (("labels", (9, 0), NAN),), kind="binary"),
    "targets sum to 5": Bad("labels[10] sums to 5;", (("labels", 10, 1),), kind="soft"),
    "target infinite": Bad(
        "labels[11] holds a non-finite target", (("labels", (11, 4), INF),), kind="mse"
    ),
    "logits overflow": Bad(
        "logits, loss or gradient of row 12 overflow float32",
        (("weight", 0, 1e30), ("features", 12, 1e30)),
    ),
    "one sample": Bad(
        "formula='moso' compares a sample with the others, but only 1 sample counts;",
        (("labels", BUT_ONE, -100),),
    ),
    # The first of several, in the order in which they are judged.
    "weight before label": Bad(
        "weight[0, 0] is inf;",
        (("weight", EVERYWHERE, INF), ("labels", EVERYWHERE, 77), ("features", EVERYWHERE, NAN)),
    ),
    "bias before sample weight": Bad(
        "bias[0] is nan;", (("bias", EVERYWHERE, NAN), ("sample_weight", EVERYWHERE, INF))
    ),
    "label before feature": Bad(
        "labels[14] is 9, outside", (("labels", slice(14, 17), 9), ("features", 2, INF))
    ),
    "feature before overflow": Bad(
        "features[3, 1] is nan;",
        (("weight", 0, 1e30), ("features", 2, 1e30), ("features", (3, 1), NAN)),
    ),
    "feature before count": Bad(
        "features[0, 0] is nan;", (("labels", BUT_ONE, -100), ("features", 0, NAN))
    ),
}


def message_of(name: str, backend: str, chunk_size: int | None = None) -> str:
    wrong = BAD[name]
    case = random_case(wrong.kind, n=ROWS, heads=wrong.heads)
    arguments = dict(zip(("features", "weight", "labels", "bias"), case.args, strict=True))
    if any(argument == "sample_weight" for argument, *_ in wrong.edits):
        case.options["sample_weight"] = arguments["sample_weight"] = torch.ones(ROWS)
    for argument, index, value in wrong.edits:
        arguments[argument][index] = value
    with pytest.raises(ValueError) as error:
        moso_scores(*case.args, backend=backend, chunk_size=chunk_size, **case.options)
    return str(error.value)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_is_said_in_the_same_words(name, backend, chunk_size, monkeypatch) -> None:
    """The second pass has run over it by then, with residuals kept or made again."""
    said = []
    for late in (False, True):
        monkeypatch.setattr(Problem, "asynchronous", late)
        said.append(message_of(name, backend, chunk_size))
    assert said[0] == said[1] and said[0].startswith(BAD[name].begins)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("late", [False, True])
def test_data_that_are_wrong_cost_no_pass_where_reading_is_free(late, name, monkeypatch) -> None:
    passes = []

    class Watched(TorchBackend):
        name = "watched"

        def prepare(self, problem: Problem, plan: Plan) -> WatchedPasses:
            return WatchedPasses(problem, plan)

    class WatchedPasses(TorchPasses):
        def first(self, *args: Any) -> Any:
            passes.append("first")
            return super().first(*args)

        def second(self, *args: Any) -> None:
            passes.append("second")
            super().second(*args)

    monkeypatch.setitem(_REGISTRY, "watched", Watched())
    monkeypatch.setattr(Problem, "asynchronous", late)
    message_of(name, "watched")
    known_before = BAD[name].begins.startswith(("weight", "bias", "sample_weight"))
    assert passes == (["first", "second"] if late else [] if known_before else ["first"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_finite_parameters_may_have_a_sum_that_is_not(backend, sign, late, monkeypatch) -> None:
    """3e38 four times is beyond float32; what is not finite beside them is found all the same."""
    if late and backend not in BACKENDS:
        pytest.skip("never runs behind the host's back")
    monkeypatch.setattr(Problem, "asynchronous", late)
    features, labels = torch.full((6, 2), 1e-38), torch.tensor([0, 1, 2, 0, 1, 2])
    weight, bias = torch.full((3, 2), 3e38 * sign), torch.zeros(3)
    scores = moso_scores(features, weight, labels, bias, backend=backend)
    assert torch.isfinite(scores).all()
    bias[1] = INF
    with pytest.raises(ValueError, match=r"^bias\[1\] is inf;"):
        moso_scores(features, weight, labels, bias, backend=backend)
    weight[1, 1] = -INF * sign
    with pytest.raises(ValueError, match=r"^weight\[1, 1\] is -?inf;"):
        moso_scores(features, weight, labels, bias, backend=backend)


def test_row_numbers_and_counts_come_over_exactly() -> None:
    """Beyond 2**24, where float32 has no odd numbers, and beside parameters in float32."""
    rows = 2**24 + 3
    labels = torch.zeros((), dtype=torch.long).expand(rows)
    problem = build_problem(torch.zeros(1, 1).expand(rows, 1), torch.zeros(2, 1), labels)
    results: Any = SimpleNamespace(
        alignment=torch.zeros(1, 3),
        grad_sqnorm=torch.zeros(1, 3),
        mean_grad_sqnorm=torch.zeros(1, dtype=torch.float64),
    )
    status = torch.full((STATUS_SLOTS,), rows)

    def judged() -> Verdict:
        verdict = Verdict(problem, "moso", Reading.TOGETHER)
        verdict.parameters()
        verdict.rows(status, torch.tensor(rows))
        assert verdict.count is None
        verdict.results(results, torch.ones(3, dtype=torch.bool))
        return verdict

    assert judged().count == rows
    status[STATUS_LABEL] = rows - 2
    with pytest.raises(ValueError, match=rf"^labels\[{rows - 2}\] is 0"):
        judged()
