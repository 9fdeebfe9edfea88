"""Weights under names that only transformers can turn, by a stand-in for it."""

from __future__ import annotations

import copy
import logging
import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from checkpoint_reading import into
from library_stand_ins import PreTrainedModel
from torch import Tensor, nn

from moso_fast.sources.checkpoints.contents import contents_of
from moso_fast.sources.checkpoints.libraries import converted, pretrained_network

SAVED = {"dense.gamma": torch.ones(3, 2), "dense.bias": torch.tensor([1.0, 2.0, 3.0])}
LOGGER = logging.getLogger("transformers")


class Config:
    """Whether the library can load, what it says of it, and what it was called with."""

    loads: ClassVar[list[dict[str, Any]]] = []  # shared by copies

    def __init__(self, fails: Exception | None = None, **report: list[str]) -> None:
        self.fails, self.report = fails, report


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a module in the place of transformers' own logging; return what it was told."""
    told: list[str] = []
    library: Any = ModuleType("transformers.utils.logging")
    library.is_progress_bar_enabled = lambda: True
    library.disable_progress_bar = lambda: told.append("off")
    library.enable_progress_bar = lambda: told.append("on")
    utils: Any = ModuleType("transformers.utils")
    utils.logging = library
    whole: Any = ModuleType("transformers")
    whole.utils = utils
    for module in (whole, utils, library):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Config, "loads", [])
    return told


def load(model: nn.Module, content: Any = SAVED) -> dict[str, Tensor] | None:
    return converted(model, contents_of(content, "x"))


def test_the_library_turns_the_names_and_nothing_else_is_touched(bars: list[str]) -> None:
    model = PreTrainedModel(Config())
    before, random, level = copy.deepcopy(model.state_dict()), torch.get_rng_state(), LOGGER.level
    for content in (SAVED, {"state_dict": SAVED}, {"a": {"b": SAVED}, "n": 3}):
        found = load(nn.Sequential(model), content)
        assert found is not None and found.keys() == {"dense.weight", "dense.bias"}
        assert torch.equal(found["dense.weight"], SAVED["dense.gamma"])
        assert not any(tensor.requires_grad for tensor in found.values())
        given = Config.loads[-1]
        assert given["state_dict"].keys() == SAVED.keys() and given["dtype"] == torch.float32
        assert given["config"] is not model.config, "the library may write to it"
    assert bars == ["off", "on"] * 3 and LOGGER.level == level
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_numbers_of_every_width_are_kept() -> None:
    wide = {**SAVED, "dense.bias": SAVED["dense.bias"].double() / 3}
    found = load(PreTrainedModel(Config()), wide)
    assert found is not None and Config.loads[-1]["dtype"] == torch.float64
    assert torch.equal(found["dense.bias"], wide["dense.bias"])


def test_what_the_library_does_not_take_as_a_whole_is_left(bars: list[str]) -> None:
    for error in (RuntimeError(), ValueError(), KeyError()):
        assert load(PreTrainedModel(Config(error))) is None
    with pytest.raises(OSError):
        load(PreTrainedModel(Config(OSError())))
    assert bars == ["off", "on"] * 4, "also where it fails"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert load(PreTrainedModel(Config(None, **{kind: ["x"]}))) is None
    assert load(PreTrainedModel(Config()), {"two": SAVED, "apart": SAVED}) is None
    assert load(nn.Linear(2, 3)) is None
    quantised = PreTrainedModel(Config())
    quantised.config.quantization_config = {"bits": 4}
    assert load(quantised) is None and len(Config.loads) == 8


@pytest.mark.parametrize("enabled", [None, lambda: False])
def test_progress_bars_that_were_off_stay_off(bars: list[str], enabled: Any) -> None:
    library = sys.modules["transformers.utils.logging"]
    if enabled is None:
        del library.is_progress_bar_enabled  # type: ignore[attr-defined]
    else:
        library.is_progress_bar_enabled = enabled  # type: ignore[attr-defined]
    LOGGER.setLevel(logging.ERROR)
    try:
        assert load(PreTrainedModel(Config())) is not None
        assert bars == [] and LOGGER.level == logging.ERROR
    finally:
        LOGGER.setLevel(logging.NOTSET)


def test_the_library_is_silent_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    original = PreTrainedModel.from_pretrained

    def loud(*given: Any, **named: Any) -> Any:
        levels.append(LOGGER.level)
        return original(*given, **named)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loud)
    assert load(PreTrainedModel(Config())) is not None and levels == [logging.CRITICAL]


def test_a_checkpoint_goes_through_the_library_where_its_names_do_not_fit() -> None:
    model = PreTrainedModel(Config())
    fitted = into(model, {"model": SAVED})
    assert fitted.entry == "names converted by transformers"
    assert torch.equal(fitted.tensors["dense.weight"], SAVED["dense.gamma"])
    own = {"dense.weight": torch.zeros(3, 2), "dense.bias": torch.zeros(3)}
    before = len(Config.loads)
    assert into(model, own).entry == "" and len(Config.loads) == before
    # An entry that the caller names is taken as it is.
    with pytest.raises(ValueError, match=r"1 missing \(dense\.weight\); 1 unexpected"):
        into(model, {"model": SAVED}, "model")
    with pytest.raises(ValueError, match=r"1 missing \(dense\.bias\)"):
        into(model, {"dense.weight": torch.zeros(3, 2)})


def test_models_of_the_library_by_their_class() -> None:
    model = PreTrainedModel(Config())
    assert pretrained_network(nn.Sequential(model)) is model
    outer = PreTrainedModel(Config())
    outer.inner = model
    assert pretrained_network(outer) is outer, "the outermost"
    assert pretrained_network(nn.Linear(1, 1)) is None
    alike = type("PreTrainedModel", (nn.Module,), {"__module__": "my.models"})()
    other = type("Other", (nn.Module,), {"__module__": "transformers.models"})()
    assert pretrained_network(alike) is None and pretrained_network(other) is None
