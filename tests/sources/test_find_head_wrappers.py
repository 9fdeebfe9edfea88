"""The head inside wrappers of peft and torch, 1 x 1 convolutions, and what its weight is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_cases import TinyForCausalLM, net
from library_stand_ins import Lora, ModulesToSaveWrapper, PeftModel
from torch import nn
from torch.nn.utils import parametrize

from moso_fast.sources.find_head import (
    describe_head,
    find_head,
    is_convolution,
    predicts_next_token,
    unwrapped,
)


class LMHeadModel(nn.Module):
    pass


class Derived(LMHeadModel):
    pass


def lora(**state: bool) -> Lora:
    wrapper = Lora(nn.Linear(4, 3))
    for name, value in state.items():
        setattr(wrapper, f"_{name}", value)
    return wrapper


def test_a_layer_under_a_merged_or_disabled_adapter_is_the_head() -> None:
    for state in ({"merged": True}, {"disabled": True}):
        wrapper = lora(**state)
        model = PeftModel(net(body=nn.Linear(4, 4), fc=wrapper))
        for head in ("base_model.fc", wrapper, "base_model.fc.base_layer", wrapper.base_layer):
            found = find_head(model, head)
            assert found == ("base_model.fc.base_layer", wrapper.base_layer)
    alone = lora(merged=True)
    assert find_head(alone, "base_layer") == ("base_layer", alone.base_layer)


def test_a_head_under_an_adapter_in_force_is_refused() -> None:
    model = PeftModel(net(fc=lora()))
    for head in ("base_model.fc", "base_model.fc.base_layer"):
        with pytest.raises(ValueError) as caught:
            find_head(model, head)
        assert str(caught.value) == (
            "head 'base_model.fc' has an adapter (peft's Lora), whose weights are trained instead "
            "of its own, so the last layer has no gradient by itself; use gradient='full', or call "
            "merge_and_unload() first"
        )
    # An adapter beside the head is no matter of its own.
    beside = PeftModel(net(body=lora(), fc=nn.Linear(3, 2)))
    assert find_head(beside) == ("base_model.fc", beside.base_model.fc)


@pytest.mark.parametrize("active", ["default", ["default", "other"], ["other"]])
def test_of_a_layer_that_is_trained_whole_the_copy_in_force_is_the_head(active: Any) -> None:
    wrapper = ModulesToSaveWrapper(nn.Linear(4, 3), active)
    name = active if isinstance(active, str) else active[0]
    model = PeftModel(net(fc=wrapper))
    expected = (f"base_model.fc.modules_to_save.{name}", wrapper.modules_to_save[name])
    assert find_head(model, wrapper) == expected
    # The layer that it stands for is none of these.
    original = ("base_model.fc.original_module", wrapper.original_module)
    assert find_head(model, "base_model.fc.original_module") == original


def test_what_lies_in_a_wrapper_of_peft_must_be_linear_too() -> None:
    wrapper = lora(merged=True)
    wrapper.base_layer = nn.Embedding(4, 3)
    with pytest.raises(TypeError) as caught:
        find_head(net(fc=wrapper), "fc")
    assert str(caught.value) == "head 'fc.base_layer' must be an nn.Linear, got Embedding"


@pytest.mark.parametrize(
    ("layer", "good"),
    [
        (nn.Conv1d(4, 3, 1), True),
        (nn.Conv2d(4, 3, 1), True),
        (nn.Conv3d(4, 3, 1, padding="same"), True),
        (nn.Conv2d(4, 3, (1, 2)), False),
        (nn.Conv2d(4, 3, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 3, 1, padding=(0, 1)), False),
    ],
)
def test_convolutions_of_one_position_may_be_heads(layer: nn.Module, good: bool) -> None:
    assert is_convolution(layer) and not is_convolution(nn.Linear(4, 3))
    model = net(body=nn.Linear(4, 4), fc=layer)
    if good:
        assert find_head(model) == find_head(model, "fc") == ("fc", layer)
        return
    with pytest.raises(ValueError) as caught:
        find_head(model)
    kind = type(layer).__name__
    assert str(caught.value) == (
        f"head cannot be found: the last module with parameters is 'fc' ({kind}); choose one with "
        "head=; its nn.Linear modules are 'body' (4 -> 4)"
    )
    with pytest.raises(TypeError, match=f"^head 'fc' must be an nn.Linear, got {kind}$"):
        find_head(model, "fc")


def test_a_parametrized_layer_is_found_by_its_owner() -> None:
    model = net(a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    parametrize.register_parametrization(model.b, "weight", nn.Identity())
    assert find_head(model) == ("b", model.b)
    alone = nn.Linear(4, 3)
    parametrize.register_parametrization(alone, "weight", nn.Identity())
    assert find_head(alone) == ("", alone)


def test_a_layer_with_two_names_is_known_by_both() -> None:
    model = net(a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.again = model.a
    assert find_head(model, "again") == ("again", model.a)
    assert find_head(model, model.a) == ("a", model.a)


@pytest.mark.parametrize("count", [4, 5])
def test_the_last_four_linear_layers_are_named(count: int) -> None:
    model = net(**{f"l{k}": nn.Linear(k + 1, 2) for k in range(count)}, norm=nn.LayerNorm(2))
    with pytest.raises(ValueError) as caught:
        find_head(model)
    names = ", ".join(f"'l{k}' ({k + 1} -> 2)" for k in range(count - 4, count))
    more = "..., " if count > 4 else ""
    assert str(caught.value).endswith(f"; its nn.Linear modules are {more}{names}")


def test_a_model_that_answers_with_several_or_with_another_is_not_taken_at_its_word() -> None:
    model = net(a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.get_classifier = lambda: [model.a, model.b]  # type: ignore[assignment]
    with pytest.raises(ValueError) as caught:
        find_head(model)
    assert str(caught.value) == (
        "head: get_classifier() gives 2 modules; choose one with head=; its nn.Linear modules are "
        "'a' (4 -> 4), 'b' (4 -> 3)"
    )
    model.get_classifier = lambda: nn.Linear(1, 1)  # type: ignore[assignment]
    assert find_head(model)[0] == "b"
    model.get_classifier = "fc"  # type: ignore[assignment]
    assert find_head(model)[0] == "b"


def test_wrappers_are_opened_in_any_order() -> None:
    inner = TinyForCausalLM()
    compiled = nn.Module()
    compiled._orig_mod = nn.DataParallel(inner)
    for model in (inner, compiled, nn.DataParallel(compiled)):
        assert unwrapped(model) is inner and predicts_next_token(model)
    assert find_head(compiled) == ("_orig_mod.module.lm_head", inner.lm_head)
    assert predicts_next_token(Derived()) and not predicts_next_token(nn.Linear(1, 1))


def test_a_weight_that_is_computed_is_said_to_be() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    said = "computed from other parameters; the score is of the weight in force, not of these"
    assert describe_head(net(fc=layer), layer) == {"weight": said}


def test_every_other_name_of_the_heads_weight_is_told() -> None:
    model = net(embed=nn.Embedding(3, 4), mix=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    assert describe_head(model, model.fc) == {}
    model.embed.weight = model.fc.weight
    model.copy = nn.Linear(4, 3, bias=False)
    model.copy.weight = nn.Parameter(model.fc.weight.detach())  # the same memory
    model.register_parameter("shift", model.fc.bias)
    assert describe_head(model, model.fc) == {
        "tied": "weight is shared with shift, embed.weight, copy.weight; the score is of the "
        "head's own use of it"
    }


def test_weights_without_memory_of_their_own_are_no_tied_ones() -> None:
    with torch.device("meta"):
        model = net(a=nn.Linear(4, 4, bias=False), fc=nn.Linear(4, 4, bias=False))
    assert describe_head(model, model.fc) == {}
    empty = net(a=nn.Linear(4, 4), fc=nn.Linear(4, 4))
    for layer in empty:
        layer.weight = nn.Parameter(torch.empty(0, 4))
    assert describe_head(empty, empty.fc) == {}
    # The first rows of a larger weight are not that weight.
    part = net(a=nn.Linear(4, 8, bias=False), fc=nn.Linear(4, 4, bias=False))
    part.fc.weight = nn.Parameter(part.a.weight.detach()[:4])
    assert describe_head(part, part.fc) == {}
