"""What a run is told: checked once, passed whole, and never changed afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scorer_cases import N, SmallNet, images, scorer

from moso_fast import MoSoScorer
from moso_fast.core.losses import LOSSES
from moso_fast.scoring import settings as settings_module
from moso_fast.scoring.run import JOBS, make_job
from moso_fast.scoring.settings import GRADIENTS, Call, ScoredModel, Settings


def test_there_is_one_job_for_every_gradient() -> None:
    assert tuple(JOBS) == GRADIENTS
    for gradient, kind in JOBS.items():
        given = Settings(gradient=gradient)
        model = ScoredModel.of(SmallNet(), None, given)
        assert type(make_job(model, given, Call(data=images()))) is kind


def test_settings_cannot_be_changed_and_a_run_leaves_them() -> None:
    model = SmallNet()
    scored = scorer(model, class_weight=[1.0, 2.0, 1.0, 1.0], device="cpu", per="sample")
    before = dict(vars(scored.settings))
    first = scored.score(images())
    assert vars(scored.settings) == before
    assert torch.equal(scored.score(images()).scores, first.scores)
    assert (scored.model, scored.head, scored.head_name) == (model, model.fc, "fc")
    assert scored.settings.device == torch.device("cpu")
    assert scored.settings.class_weight.dtype == torch.float64
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored.settings.per = "token"  # type: ignore[misc]
    whole = scorer(model, gradient="full")
    assert (whole.head, whole.head_name) == (None, "")


def test_the_defaults_are_those_of_the_scorer() -> None:
    scored, alone = vars(MoSoScorer(SmallNet()).settings), vars(Settings())
    assert scored == alone
    assert scored["options"].per == "token"


def test_options_are_checked_when_the_settings_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = settings_module.Options.among

    def among(arguments: Any) -> Any:
        made.append(arguments["loss"])
        return real(arguments)

    monkeypatch.setattr(settings_module.Options, "among", among)
    scored = scorer(SmallNet())
    assert made == ["cross_entropy"]
    scored.score(images(), partition=2)
    assert made == ["cross_entropy"]
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        Settings(label_smoothing=2.0)


def test_a_call_owns_its_tensors() -> None:
    index, weights = torch.arange(N), torch.ones(N)
    call = Call(data=images(), index=index, sample_weight=weights).checked("last_layer")
    index[0] = 99
    weights[0] = 99
    assert int(call.index[0]) == 0 and float(call.sample_weight[0]) == 1.0
    table = scorer(SmallNet()).score(images(), index=torch.arange(N))
    table.index[0] = 5
    assert call.combine == "mean" and call.num_steps is None


OF_THE_OTHER = [
    ("last_layer", {"scope": "fc"}, "full"),
    ("last_layer", {"views": 2}, "full"),
    ("last_layer", {"autocast": torch.bfloat16}, "full"),
    ("full", {"precision": "high"}, "last_layer"),
    ("full", {"backend": "torch"}, "last_layer"),
    ("full", {"feature_cache": "float32"}, "last_layer"),
    ("full", {"class_weight": [1.0]}, "last_layer"),
    ("full", {"head": "fc"}, "last_layer"),
]


@pytest.mark.parametrize(("gradient", "given", "other"), OF_THE_OTHER)
def test_arguments_of_the_other_gradient(gradient: str, given: dict, other: str) -> None:
    (name,) = given
    with pytest.raises(ValueError) as caught:
        MoSoScorer(SmallNet(), gradient=gradient, **given)
    message = f"{name} goes with gradient={other!r}, not with {gradient!r}"
    assert str(caught.value) == message


def test_sample_weights_of_the_other_gradient() -> None:
    with pytest.raises(ValueError) as caught:
        scorer(SmallNet(), gradient="full").score(images(), sample_weight=torch.ones(N))
    assert str(caught.value) == (
        "sample_weight goes with gradient='last_layer', not with 'full'; there, put the weights "
        "beside the labels and give a loss of your own that multiplies by them"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient": "last_layer", "views": 0}, "views must be a positive int, got 0"),
        ({"gradient": "full", "views": True}, "views must be a positive int, got True"),
        ({"gradient": "full", "views": 1.5}, "views must be a positive int, got 1.5"),
        ({"batch_size": -1}, "batch_size must be a positive int, got -1"),
        ({"batch_size": True}, "batch_size must be a positive int, got True"),
        ({"batch_size": 8.0}, "batch_size must be a positive int, got 8.0"),
        (
            {"gradient": "full", "autocast": torch.float32},
            "autocast must be None, bfloat16 or float16, got torch.float32",
        ),
        ({"shift_labels": 1}, "shift_labels must be 'auto', True or False, got 1"),
        ({"shift_labels": "AUTO"}, "shift_labels must be 'auto', True or False, got 'AUTO'"),
        ({"dtype": "float32"}, "dtype must be a floating-point torch.dtype or None, got 'float32'"),
        (
            {"gradient": "full", "loss": "hinge"},
            f"loss must be a callable or one of {', '.join(LOSSES)}; got 'hinge'",
        ),
        (
            {"gradient": "full", "chunk_size": 0},
            "chunk_size must be a positive number of rows, got 0",
        ),
        ({"gradient": "full", "label_smoothing": -1}, "label_smoothing must be in [0, 1), got -1"),
    ],
)
def test_values_that_are_refused(given: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "given",
    [
        {"gradient": "full", "views": 2, "autocast": torch.float16, "scope": "fc"},
        {"gradient": "full", "loss": lambda outputs, labels: outputs[:, 0]},
        {"batch_size": 1, "shift_labels": False, "dtype": torch.bfloat16},
        {"precision": "high", "backend": "torch", "feature_cache": "float32"},
        {"device": "cpu:0", "loss": "mse"},
    ],
)
def test_values_that_are_taken_are_kept(given: dict) -> None:
    found = Settings(**given)
    for name, value in given.items():
        assert getattr(found, name) == (torch.device(value) if name == "device" else value)
    loss = given.get("loss", "cross_entropy")
    assert found.options.loss == ("cross_entropy" if callable(loss) else loss)
