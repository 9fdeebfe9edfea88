"""Learning rates as files state them, one by one, and in full what is said where it is unclear."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from moso_fast.sources.checkpoints.pickled import StandIn
from moso_fast.sources.checkpoints.rates import (
    ParameterGroup,
    ScoredParameters,
    Stated,
    groups_of,
    learning_rate,
)
from moso_fast.sources.checkpoints.rates_together import check_presence, check_rates, settle

WAY = "give the rate with Checkpoint(source, lr=...), or --lr on the command line"
NOTHING: frozenset[tuple[int, ...]] = frozenset()


def shapes(*of_parameters: Any) -> tuple[frozenset[tuple[int, ...]], ...]:
    return tuple(NOTHING if one is None else frozenset({one}) for one in of_parameters)


def group(rate: Any, *members: Any, names: Any = None) -> ParameterGroup:
    return ParameterGroup(rate, names, shapes(*members), "optimizer.param_groups[0]")


def scored(in_model: Any = None, **of_names: Any) -> ScoredParameters:
    held = {name.replace("_", "."): shape for name, shape in of_names.items()}
    return ScoredParameters(held, "the head", in_model or {})


def error_of(call: Any, *arguments: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (2, 2.0),
        ("nought", None),
        ([0.5, 0.25], 0.25),
        ((0.5, torch.tensor(0.125)), 0.125),
        (torch.tensor([[0.5]]), 0.5),
        (np.float32(0.5), 0.5),
        (True, None),
        ("0.5", None),
        (None, None),
        ([], None),
        (torch.ones(2), None),
    ],
)
def test_one_rate(value: Any, expected: float | None) -> None:
    if expected is not None:
        found = learning_rate(value, "rate")
        assert type(found) is float and found == expected
        return
    said = error_of(learning_rate, value, "rate", kind=TypeError)
    assert said == f"rate must be a number >= 0, got {value!r}"


def test_rates_that_cannot_be() -> None:
    for value, shown in ((-1, "-1.0"), (math.inf, "inf"), ([math.nan], "nan")):
        said = error_of(learning_rate, value, "rate")
        assert said == f"rate must be a number >= 0, got {shown}"


def test_groups_of_an_optimiser() -> None:
    momentum, step = torch.ones(3, 2), torch.tensor(1.0)
    state = {0: {"momentum": momentum, "step": step, "n": 3}, "1": {"exp": torch.ones(4)}, 2: None}
    groups = [
        {"lr": 0.5, "params": [0, 1, 2, 9]},
        {"params": [1]},
        {"lr": None, "params": [1]},
        "none",
        {"lr": 0.25, "params": ["a", "b"]},
        {"lr": 0.125, "params": [0], "param_names": ["c"]},
        {"lr": 1, "params": 3},
    ]
    found = groups_of({"param_groups": groups, "state": state}, "optim")
    assert [(one.rate, one.names, one.name) for one in found] == [
        (0.5, None, "optim.param_groups[0]"),
        (0.25, ("a", "b"), "optim.param_groups[4]"),
        (0.125, ("c",), "optim.param_groups[5]"),
        (1, None, "optim.param_groups[6]"),
    ]
    assert [one.shapes for one in found] == [
        shapes((3, 2), (4,), None, None),
        shapes(None, None),
        shapes((3, 2)),
        (),
    ]
    by_number = {"1": {"lr": 2.0}, "0": {"lr": 1.0}}
    assert [one.rate for one in groups_of({"param_groups": by_number, "state": 3}, "x")] == [1, 2]
    assert groups_of({}, "x") == groups_of({"param_groups": "none"}, "x") == []


def test_what_is_stated_comes_in_order() -> None:
    groups = (group(0.25, (2,)),)
    assert Stated("x", 0.5, groups, (0.125,)).rate(None) == 0.5
    assert Stated("x", None, groups, (0.125,)).rate(None) == 0.25
    assert Stated("x", None, (), (0.125, 0.125)).rate(None) == 0.125
    assert Stated("x").rate(None) is None and not Stated("x").any()
    assert not Stated("x", later=Stated("y", 0.5)).any()
    assert all(one.any() for one in (Stated("x", 0), Stated("x", None, groups), Stated("x", 1)))
    assert Stated("x", None, (), (0.125,)).any()
    for one in (Stated("x", "?"), Stated("x", None, (group("?"),)), Stated("x", None, (), ("?",))):
        said = error_of(one.rate, None, kind=TypeError)
        assert said == "learning rate in x must be a number >= 0, got '?'"


def test_several_rates_and_not_whose() -> None:
    assert error_of(Stated("x", None, (), (0.5, 0.25, 0.5)).rate, None) == (
        "checkpoint (x) states learning rates 0.5, 0.25 for several parameter groups, and not "
        f"which is whose; {WAY}"
    )
    groups = (group(0.5, (2, 2)), group(0.25, (3,)), group(0.5, (9,)))
    several = "checkpoint (x) has 3 parameter groups with learning rates 0.5, 0.25"
    stated = Stated("x", None, groups)
    assert error_of(stated.rate, None) == f"{several}; {WAY}"
    assert stated.rate(scored(w=(2, 2))) == 0.5 and stated.rate(scored(w=(3,))) == 0.25
    assert stated.rate(scored(w=(2, 2), b=(9,))) == 0.5
    assert error_of(stated.rate, scored(w=(2, 2), b=(3,))) == (
        f"{several}, and parameters that are scored (the head) have different ones; a score has "
        f"one rate: {WAY}"
    )
    # What no group remembers was not trained, or is not known.
    assert error_of(stated.rate, scored(w_a=(7,))) == (
        f"{several}, and it cannot be told which of them holds 'w.a' (the head); {WAY}"
    )


def test_shapes_that_several_parameters_have() -> None:
    groups = (group(0.5, (2, 2), (3,)), group(0.25, (2, 2)))
    several = "checkpoint (x) has 2 parameter groups with learning rates 0.5, 0.25"
    stated = Stated("x", None, groups)
    assert error_of(stated.rate, scored(w=(2, 2))) == (
        f"{several}, and it cannot be told which of them holds the head (other parameters have its "
        f"shape); {WAY}"
    )
    assert stated.rate(scored(w=(2, 2), b=(3,))) == 0.5, "the weight goes with the bias"
    # A group with a parameter of which nothing is remembered may hold it as well.
    unsure = Stated("x", None, (group(0.5, (2, 2)), group(0.25, None)))
    assert unsure.rate(scored({(2, 2): 1}, w=(2, 2))) == 0.5
    assert unsure.rate(scored({}, w=(2, 2))) == 0.5, "once, as far as is known"
    assert "cannot be told" in error_of(unsure.rate, scored({(2, 2): 2}, w=(2, 2)))
    assert error_of(stated.rate, scored()) == (
        f"{several}, and parameters that are scored (the head) have different ones; a score has "
        f"one rate: {WAY}"
    )


def test_names_decide_where_all_groups_have_them() -> None:
    one, other = group(0.5, (2,), names=("net.a",)), group(0.25, (3,), names=("b", "aux.b"))
    stated = Stated("x", None, (one, other))
    for name, rate in (("net.a", 0.5), ("a", 0.5), ("m.net.a", 0.5), ("b", 0.25), ("m.b", 0.25)):
        assert stated.rate(ScoredParameters({name: (9,)}, "it", {})) == rate
    for name in ("ta", "net_a", "c"):
        said = error_of(stated.rate, ScoredParameters({name: (2,)}, "it", {}))
        assert f"which of them holds {name!r} (it)" in said
    # Without names in one of them the shapes are all that is known.
    mixed = Stated("x", None, (one, group(0.25, (3,))))
    assert mixed.rate(ScoredParameters({"b": (2,)}, "it", {})) == 0.5


def test_numbers_of_numpy_in_a_file_are_numbers() -> None:
    number = StandIn(kind_of("f8"), np.float64(0.5).tobytes())
    number.path = "numpy._core.multiarray.scalar"
    assert learning_rate(number, "rate") == learning_rate([1.0, number], "rate") == 0.5


def kind_of(name: str) -> Any:
    kind = StandIn(name, False, True)
    kind.path, kind.state = "numpy.dtype", (3, "<", None)
    return kind


def presence(*rates: float | None, option: str = "") -> str:
    where = {k: f"{'abcdefghi'[k]}.pt" for k in range(len(rates))}
    return error_of(check_presence, dict(enumerate(rates)), where, option)


def test_all_have_a_rate_or_none() -> None:
    check_presence({0: 0.5, 1: 0.0}, {0: "a", 1: "b"})
    check_presence({0: None, 1: None}, {0: "a", 1: "b"})
    start = "checkpoints: either all have a learning rate or none, but checkpoint"
    end = "give Checkpoint(source, lr=...) for each"
    assert presence(None, 0.5) == (
        f"{start} 1 has one and checkpoint 0 has none; {end} (without: a.pt)"
    )
    assert presence(0.0, None, 0.5, None) == (
        f"{start} 0 has one and checkpoints 1, 3 have none; {end} (without: b.pt, d.pt)"
    )
    assert presence(0.5, *[None] * 8) == (
        f"{start} 0 has one and checkpoints 1, 2, 3, 4, 5, 6 and 2 more have none; {end} "
        "(without: b.pt, c.pt, d.pt, e.pt, f.pt, g.pt and 2 more)"
    )
    either = "not: either all have one or none; give one --lr for each"
    assert presence(0.5, None, option="--lr") == (
        f"a.pt states a learning rate and b.pt does {either}"
    )
    assert presence(None, 0.5, None, option="--lr") == (
        f"b.pt states a learning rate and a.pt, c.pt do {either}"
    )


ENDS = (
    "a schedule that ends at 0 leaves this in its last checkpoint, since what is saved is the rate "
    "of the next step"
)


def told(rates: Any, combine: str = "mean", option: str = "") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_rates(rates, [f"{'abcdefghi'[k]}.pt" for k in range(len(rates))], combine, option)
    return [str(one.message) for one in caught]


def test_rates_of_nought() -> None:
    assert told([0.5, None]) == told([0.5, 0.0], "zscore") == []
    assert error_of(told, [0, 0.0]) == (
        f"learning rates are all 0, which would make every score 0: {ENDS}; give the rate of the "
        "last step that was taken with Checkpoint(source, lr=...), or any positive one for a "
        "single checkpoint, whose ranking does not depend on it"
    )
    assert "was taken with --lr, or any" in error_of(told, [0.0], "mean", "--lr")
    assert told([0.0], "zscore") == [
        f"learning rates are all 0 ({ENDS}): self_influence is 0; Checkpoint(source, lr=...) gives "
        "others"
    ]
    assert told([0.5, 0.0]) == [
        f"checkpoint 1 (b.pt) has learning rate 0 and counts nothing in the scores: {ENDS}; "
        "Checkpoint(source, lr=...) gives another"
    ]
    named = ", ".join(f"{k} ({'abcdefghi'[k]}.pt)" for k in range(6))
    assert told([*[0.0] * 7, 1.0], "mean", "--lr") == [
        f"checkpoints {named} have learning rate 0 and count nothing in the scores: {ENDS}; --lr "
        "gives another"
    ]


def test_rates_of_all_checkpoints() -> None:
    later = Stated("b", later=Stated("b.opt", 0.25))
    one = Stated("a", 0.5)
    whose = scored(w=(2,))
    assert settle([one, later], whose, "mean") == [0.5, 0.25]
    assert settle([later, later], whose, "mean") == [0.25, 0.25]
    assert settle([Stated("a"), Stated("b")], whose, "mean") == [None, None]
    two = Stated("c", None, (group(0.5, (2,)), group(0.25, (3,))))
    each: list[ScoredParameters | None] = [whose, scored(w=(3,))]
    assert settle([two, two], each, "mean") == [0.5, 0.25]
    assert "either all have one or none; give one --lr" in error_of(
        settle, [one, Stated("b")], whose, "mean", "--lr"
    )
    unclear = Stated("c", None, (group(0.5, (2,)), group(0.25, (2,))))
    with pytest.warns(UserWarning) as caught:
        assert settle([unclear, one], whose, "zscore") == [None, None]
    said = error_of(settle, [unclear, one], whose, "mean")
    assert [str(one.message) for one in caught] == [
        f"{said} (combine='zscore' needs none; self_influence is taken with rate 1)"
    ]
