"""Which module of a model is taken for its head."""

from __future__ import annotations

from typing import Any

import pytest
from feature_cases import LanguageModel, TinyForCausalLM, net
from torch import nn

from moso_fast.sources.find_head import find_head, predicts_next_token


class Timm(nn.Module):
    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.head = classifier
        self.norm = nn.LayerNorm(3)

    def get_classifier(self) -> Any:
        return self.head


class NoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)

    def get_output_embeddings(self) -> None:
        raise NotImplementedError


def test_last_linear_is_the_head() -> None:
    model = net(conv=nn.Conv2d(1, 2, 3), flat=nn.Flatten(), fc=nn.Linear(2, 4), drop=nn.Dropout())
    assert find_head(model) == ("fc", model.fc)
    assert find_head(nn.Linear(3, 2))[0] == ""
    assert find_head(nn.DataParallel(model)) == ("module.fc", model.fc)


def test_the_model_is_asked_first() -> None:
    timm = Timm(nn.Linear(3, 2))
    assert find_head(timm) == ("head", timm.head)
    language = LanguageModel()
    assert find_head(language) == ("lm_head", language.lm_head)
    assert find_head(NoEmbeddings())[0] == "classifier"


def test_head_by_name_and_module() -> None:
    model = net(a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    assert find_head(model, "a") == ("a", model.a)
    assert find_head(model, model.a) == ("a", model.a)


LAST_IS_NORM = net(a=nn.Linear(3, 3), b=nn.Linear(3, 2), norm=nn.LayerNorm(2))


@pytest.mark.parametrize(
    ("model", "head", "error", "message"),
    [
        (
            LAST_IS_NORM,
            None,
            ValueError,
            "head cannot be found: the last module with parameters is 'norm' (LayerNorm); choose "
            "one with head=; its nn.Linear modules are 'a' (3 -> 3), 'b' (3 -> 2)",
        ),
        (
            net(conv=nn.Conv2d(1, 1, 3)),
            None,
            ValueError,
            "head cannot be found: the last module with parameters is 'conv' (Conv2d); choose one "
            "with head=; the model has no nn.Linear",
        ),
        (
            net(flat=nn.Flatten()),
            None,
            ValueError,
            "head cannot be found: no module has parameters; choose one with head=; "
            "the model has no nn.Linear",
        ),
        (
            Timm(nn.Conv2d(3, 2, 3)),
            None,
            TypeError,
            "head found by get_classifier() 'head' must be an nn.Linear, got Conv2d",
        ),
        (
            Timm(nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])),
            None,
            TypeError,
            "head found by get_classifier() 'head' must be an nn.Linear, got ModuleList",
        ),
        (
            LAST_IS_NORM,
            "c",
            ValueError,
            "head 'c' is no module of the model; its nn.Linear modules are 'a' (3 -> 3), "
            "'b' (3 -> 2)",
        ),
        (LAST_IS_NORM, "norm", TypeError, "head 'norm' must be an nn.Linear, got LayerNorm"),
        (LAST_IS_NORM, nn.Linear(1, 1), ValueError, "head (Linear) is no module of the model"),
        (LAST_IS_NORM, 3, TypeError, "head must be a name, a module or None, got int"),
    ],
)
def test_heads_that_are_refused(model: nn.Module, head: Any, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        find_head(model, head)
    assert str(caught.value) == message


def test_two_classifiers_are_ambiguous() -> None:
    model = net(head=nn.Linear(3, 2), head_dist=nn.Linear(3, 2))
    model.get_classifier = lambda: (model.head, model.head_dist)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"get_classifier\(\) gives 2 modules.*'head_dist'"):
        find_head(model)


def test_causal_models_by_name() -> None:
    assert predicts_next_token(TinyForCausalLM())
    assert not predicts_next_token(LanguageModel())
