"""Weights of an adapter alone into a model with one, by a stand-in for peft."""

from __future__ import annotations

import enum
import sys
from typing import Any

import library_stand_ins as stand_ins
import pytest
import torch
from library_stand_ins import Lora, PeftModel
from torch import Tensor, nn

from moso_fast.sources.checkpoints.libraries import adapted_network, adapter_tensors

START = "checkpoint (x.pt) holds a peft adapter without its base model"


class Type(enum.Enum):
    LORA = "LORA"


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", stand_ins.peft())


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.a, self.b = Lora(nn.Linear(4, 3)), Lora(nn.Linear(3, 3))


SAVED = {"saved.a.lora.weight": torch.ones(3, 4), "saved.b.lora.weight": torch.ones(3, 3)}
CONFIG = {"r": 2, "lora_alpha": 8, "use_dora": False, "rank_pattern": None, "task": "any"}


def loaded(
    model: nn.Module, tensors: Any = SAVED, config: Any = CONFIG, names: Any = None
) -> dict[str, Tensor]:
    names = names or {name: name for name in model.state_dict()}
    return adapter_tensors(model, tensors, config, names, "x.pt")


def test_an_adapter_goes_to_its_places_by_the_models_names() -> None:
    model = nn.Sequential(PeftModel(Body()))
    assert adapted_network(model) is model[0] and adapted_network(nn.Linear(1, 1)) is None
    names = {name: f"own {name}" for name in model.state_dict()}
    found = loaded(model, names=names)
    assert found == {
        "own 0.base_model.a.lora.weight": SAVED["saved.a.lora.weight"],
        "own 0.base_model.b.lora.weight": SAVED["saved.b.lora.weight"],
    }
    kept = {**SAVED, "saved.embed.weight": torch.ones(5, 4)}
    assert len(loaded(model, kept)) == 3, "embeddings are saved with some"


def refused(model: nn.Module, *call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        loaded(model, *call)
    return str(caught.value)


def test_a_model_that_cannot_have_it_is_told_why() -> None:
    assert refused(Body()) == (
        f"{START}; give the scorer the adapted model: "
        "peft.PeftModel.from_pretrained(base_model, folder)"
    )
    several: Any = PeftModel(Body())
    several.active_adapters = ["default", "other"]
    assert refused(several) == f"{START}, and the model has 2 active adapters; set one"
    several.active_adapters = ["default"]
    assert len(loaded(several)) == 2
    several.active_adapters = []
    assert len(loaded(several)) == 2


def test_an_adapter_out_of_force_is_refused() -> None:
    model = PeftModel(Body())
    model.base_model.b._merged = True
    assert refused(model) == (
        f"{START}, and the model's adapter is merged into its base weights, which would be scored "
        "in place of the checkpoint's; call unmerge_adapter() of the PeftModel first"
    )
    model.base_model.b._merged, model.base_model.a._disabled = False, True
    assert refused(model) == (
        f"{START}, and the model's adapter is disabled, so that it would not be scored; call "
        "enable_adapter_layers() of the PeftModel's base_model, or leave disable_adapter()"
    )
    # What is no wrapper of peft may have such a name for something else.
    model.base_model.a._disabled = False
    model.base_model.embed.merged = True
    assert len(loaded(model)) == 2


@pytest.mark.parametrize(
    ("own", "stored", "said"),
    [
        ({"r": 4}, {}, "r of the adapter is 2 there and 4 in the model"),
        ({}, {"lora_alpha": 1}, "lora_alpha of the adapter is 1 there and 8 in the model"),
        ({}, {"use_dora": True}, "use_dora of the adapter is True there and False in the model"),
        (
            {"peft_type": Type.LORA},
            {"peft_type": "IA3"},
            "peft_type of the adapter is IA3 there and LORA in the model",
        ),
        (
            {"rank_pattern": {"a": 1}},
            {},
            "rank_pattern of the adapter is None there and {'a': 1} in the model",
        ),
        (
            {},
            {"fan_in_fan_out": True},
            "fan_in_fan_out of the adapter is True there and None in the model",
        ),
    ],
)
def test_another_kind_of_adapter_is_refused(own: dict, stored: dict, said: str) -> None:
    model = PeftModel(Body(), **own)
    assert refused(model, SAVED, {**CONFIG, **stored}) == (
        f"{START}, and {said}; build the model with the adapter's own configuration"
    )


def test_settings_that_say_the_same_fit() -> None:
    model = PeftModel(Body(), peft_type=Type.LORA, alpha_pattern=[], use_rslora=True, task="x")
    stored = {"peft_type": "LORA", "alpha_pattern": None}  # and says nothing of the others
    assert len(loaded(model, SAVED, stored)) == 2


def test_names_and_shapes_that_are_not_those_of_the_model() -> None:
    model = PeftModel(Body())
    fit = f"{START}, and does not fit the model's adapter: "
    narrow = {**SAVED, "saved.b.lora.weight": torch.ones(1, 3)}
    assert refused(model, narrow) == f"{fit}1 missing or of another shape (saved.b.lora.weight)"
    more = {**SAVED, **{f"more{k}": torch.ones(1) for k in range(4)}}
    assert refused(model, more) == f"{fit}4 unexpected (more0, more1, more2)"
    del more["saved.a.lora.weight"]
    assert refused(model, more) == (
        f"{fit}1 missing or of another shape (saved.a.lora.weight); "
        "4 unexpected (more0, more1, more2)"
    )
    assert refused(PeftModel(nn.Linear(2, 2)), {}) == fit
