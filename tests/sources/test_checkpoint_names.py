"""Names of a file and names of a model: what may be missing, too many or another, and prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_layouts import STATE, network, under
from checkpoint_reading import assert_holds, into
from torch import Tensor, nn

from moso_fast.sources.checkpoints.contents import contents_of
from moso_fast.sources.checkpoints.names import MANY, Target, mappings, target_of
from moso_fast.sources.checkpoints.weights import digest

LAYER = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}


def target(*names: str, passing: Any = None, **how: Any) -> Target:
    tensors = {name: torch.zeros(2) for name in names}
    return Target({name: name for name in names}, tensors, passing or {}, **how)


def ways(content: Any, model: Target, entry: str | None = None) -> list[Any]:
    return mappings(contents_of(content, "x"), model, entry)


def best(content: Any, model: Target) -> tuple[Any, ...]:
    found = ways(content, model)[0]
    return found.prefix, found.missing, found.unexpected, found.misshapen


TWO = torch.ones(2)


def test_what_is_missing_too_many_and_of_another_shape() -> None:
    model = target("a.w", "a.b", "c.w")
    assert best({"a.w": TWO, "a.b": TWO, "c.w": TWO}, model) == ("", (), (), ())
    short = torch.ones(1)
    assert best({"x": {"a.w": TWO, "a.b": short, "d": TWO}}, model) == (
        "x.",
        ("c.w",),
        ("x.d",),
        ("a.b",),
    )
    # Beside the container, and outside the prefix, others may lie.
    assert best({"x": {"a.w": TWO, "a.b": TWO, "c.w": TWO}, "d": TWO}, model) == ("x.", (), (), ())
    inside = {"n.a.w": TWO, "n.a.b": TWO, "n.c.w": TWO, "d": TWO}
    assert best(inside, model) == ("n.", (), (), ())
    assert ways({"q": TWO}, model) == []


def test_ways_are_sorted_by_how_far_they_are_from_fitting() -> None:
    model = target("a", "b")
    content = {
        "two": {"a": torch.ones(1)},
        "one": {"a": TWO, "x": TWO},
        "fits": {"a": TWO, "b": TWO},
        "less": {"a": TWO},
    }
    found = ways(content, model)
    assert [(way.prefix, way.fits, way.errors) for way in found] == [
        ("fits.", True, 0),
        ("less.", False, 1),
        ("one.", False, 1),
        ("two.", False, 2),
    ]


def test_no_more_than_many_are_looked_for() -> None:
    model = target("a")
    content = {f"l{k}": {"a": TWO} for k in range(MANY + 4)}
    assert len(ways(content, model)) == MANY == 16
    assert [way.prefix for way in ways(content, model, "l3")] == ["l3."]
    assert [way.prefix for way in ways(content, model, "l3.")] == ["l3."]
    assert ways(content, model, "l") == []
    gradients = {"grads": {"a": TWO}, "w": {"a": TWO}}
    assert [way.prefix for way in ways(gradients, model)] == ["w."]
    assert [way.prefix for way in ways(gradients, model, "grads")] == ["grads."]


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("num_batches_tracked", torch.tensor(3), True),
        ("b.n_averaged", torch.tensor(3), True),
        ("my_n_averaged", torch.tensor(3), False),
        ("position_ids", torch.arange(3), True),
        ("emb.position_ids", torch.arange(4)[None], True),
        ("position_ids", torch.arange(1, 4), False),
        ("position_ids", torch.arange(3.0), False),
        ("my_position_ids", torch.arange(3), False),
        ("rope.freq", torch.ones(2), False),
    ],
)
def test_what_may_be_too_many(name: str, value: Tensor, fits: bool) -> None:
    found = best({"a": TWO, name: value}, target("a"))
    assert found == ("", (), () if fits else (name,), ())
    lenient = target("a", may_exceed=("freq$", "ids$", "avera"))
    assert best({"a": TWO, name: value}, lenient)[2] == ()


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("b.num_batches_tracked", True),
        ("n_averaged", True),
        ("emb.position_ids", True),
        ("my_position_ids", False),
        ("running_mean", False),
        ("mask", True),
    ],
)
def test_what_may_be_missing(name: str, fits: bool) -> None:
    model = target("a", name, may_lack=("^mask$",))
    assert best({"a": TWO}, model) == ("", () if fits else (name,), (), ())
    # One of another length keeps the model's own value, where such may be too many too.
    wrong = () if fits else (name,)
    unexpected = (name,) if name == "mask" else ()
    assert best({"a": TWO, name: torch.arange(3)}, model) == ("", (), unexpected, wrong)


@pytest.mark.parametrize(
    ("own", "stored", "same"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 4e-6]), False),
        (torch.tensor([1e6, 2.0]), torch.tensor([1e6 + 0.5, 2.0]), True),
        (torch.tensor([0.0, 2.0]), torch.tensor([1e-12, 2.0]).double(), True),
        (torch.tensor([0.0, 2.0]), torch.tensor([1e-11, 2.0]).double(), False),
        (torch.tensor([1 / 3, 2.0]), torch.tensor([1 / 3, 2.0]).half(), True),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), True),
        (torch.tensor([True, False]), torch.tensor([1, 0]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.empty(2, device="meta"), torch.tensor([1.0, 1.0]), False),
    ],
)
def test_buffers_in_no_state_dict_are_those_of_the_model_up_to_rounding(
    own: Tensor, stored: Tensor, same: bool
) -> None:
    for name in ("table", "net.table"):
        found = best({"a": TWO, "table": stored}, target("a", passing={name: own}))
        assert found[2] == (() if same else ("table",))
    assert best({"a": TWO, "table": stored}, target("a", passing={"notable": own}))[2] == ("table",)


def test_what_the_library_of_a_model_ignores() -> None:
    class Library(nn.Module):
        _keys_to_ignore_on_load_missing = ("table", "weight", "table")
        _keys_to_ignore_on_load_unexpected = ("old", "old")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.register_buffer("table", torch.ones(2))
            self.register_buffer("hidden", torch.ones(2), persistent=False)

    model = nn.Sequential(Library())
    state = model.state_dict(keep_vars=True)
    found = target_of(model, {name: name for name in state}, state)
    assert found.may_lack == ("table",), "a pattern that names weights is none"
    assert found.may_exceed == ("old",)
    assert list(found.passing) == ["0.hidden"]
    fitted = into(model, {"0.layer.weight": torch.ones(3, 2), "0.layer.bias": torch.ones(3)})
    assert torch.equal(fitted.tensors["0.table"], torch.ones(2))
    assert target_of(nn.Linear(2, 3), {}, {}).may_lack == ()


@pytest.mark.parametrize(
    "wrapper",
    [
        "_orig_mod",
        "_forward_module",
        "_original_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "module",
    ],
)
def test_wrappers_in_the_middle_of_a_name(wrapper: str) -> None:
    within = {name.replace(".", f".{wrapper}.", 1): t for name, t in STATE.items()}
    assert_holds(into(network(), within))
    model = nn.Module()
    model.add_module("net", nn.Module())
    model.net.add_module(wrapper, network())
    assert_holds(into(model, under("net.")), prefix=f"net.{wrapper}.")


def test_a_layer_that_is_called_module_is_one_where_it_must_be() -> None:
    model = nn.Module()
    model.module, model.other = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {**{f"module.{n}": t for n, t in LAYER.items()},
             **{f"other.{n}": 2 * t for n, t in LAYER.items()}}  # fmt: skip
    found = into(model, state).tensors
    assert torch.equal(found["module.bias"], LAYER["bias"])
    assert torch.equal(found["other.bias"], 2 * LAYER["bias"])


def test_deep_models_share_a_prefix_that_files_lack() -> None:
    inner = nn.Module()
    inner.c = nn.Linear(2, 3)
    model = nn.Module()
    model.a = nn.Module()
    model.a.b = inner
    for prefix in ("", "c.", "b.c.", "a.b.c.", "x.y."):
        found = into(model, {f"{prefix}{n}": t for n, t in LAYER.items()})
        assert torch.equal(found.tensors["a.b.c.weight"], LAYER["weight"]), prefix
        expected = "" if prefix.startswith(("a.", "b.", "c.")) else prefix
        assert found.entry.rstrip(".") in (expected.rstrip("."), prefix.rstrip("."))


def test_extra_state_below_the_weights_is_too_many() -> None:
    content = {"m": {"a": TWO, "x_extra_state": "text"}, "o": {"y_extra_state": "text"}}
    assert best(content, target("a"))[2] == ("m.x_extra_state",)
    assert best({"a": TWO, "x_extra_state": "text"}, target("a"))[2] == ()


class Masked(nn.Module):
    """Keeps a mask for itself: it is not among the weights, but older versions saved it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))
        mask = torch.tensor([0.0, -torch.inf, 1.0])
        self.register_buffer("mask", mask, persistent=False)


@pytest.mark.parametrize(
    ("stored", "fits"),
    [
        ((0.0, -torch.inf, 1.0), True),
        ((0.0, -torch.inf, 1.0 + 1e-7), True),
        ((0.0, 0.0, 1.0), False),
        ((0.0, torch.inf, 1.0), False),
        ((-torch.inf, -torch.inf, 1.0), False),
        ((0.0, -torch.inf, 1.1), False),
    ],
)
def test_a_stored_mask_is_the_models_own_at_every_place(stored: tuple, fits: bool) -> None:
    model = Masked()
    names = {name: name for name in model.state_dict()}
    found = best(
        {"a": TWO, "mask": torch.tensor(stored)}, target_of(model, names, dict(model.state_dict()))
    )
    assert found == ("", (), () if fits else ("mask",), ())


def test_the_name_of_weights_knows_no_strides() -> None:
    alone = torch.tensor([1 + 1j]).conj().imag
    assert alone.stride() != (1,)
    assert digest({"a": alone}) == digest({"a": torch.tensor([-1.0])})
    assert digest({"a": torch.eye(3)[:, 1]}) == digest({"a": torch.tensor([0.0, 1.0, 0.0])})
