"""What a run is told: checked once, passed whole, and never changed afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scorer_cases import N, SmallNet, images, scorer

from moso_fast import MoSoScorer
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
