"""The rate of the last step of a Trainer, by a stand-in for the schedules of transformers."""

from __future__ import annotations

import enum
import importlib.util
import sys
from pathlib import Path
from typing import Any

import library_stand_ins as stand_ins
import pytest
import torch

from moso_fast.sources.checkpoints.trainer_schedule import SETTINGS, rate_of_last_step

BASE, TOTAL = 0.4, 8


class Kind(enum.Enum):
    LINEAR, RISING, OTHER, PLATEAU = "linear", "rising", "other", "plateau"


class Settings:
    def __init__(self, **facts: Any) -> None:
        self.__dict__.update({"lr_scheduler_type": Kind.LINEAR, "warmup_steps": 0, **facts})


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", stand_ins.transformers())


def rate(
    folder: Path, step: Any = 3, settings: Any = None, trainer: Any = None, **scheduler: Any
) -> float | None:
    """Rate of the last step in a folder where 8 steps fall from 0.4 to 0 in a line."""
    torch.save(Settings() if settings is None else settings, folder / SETTINGS)
    facts = {"global_step": step, "max_steps": TOTAL, **(trainer or {})}
    saved = BASE * (TOTAL - step) / TOTAL if isinstance(step, int) else 0.1
    state = {"lr_lambdas": [None], "base_lrs": [BASE], "_last_lr": [saved], "last_epoch": step}
    return rate_of_last_step(folder, facts, {**state, **scheduler})


def test_it_is_the_rate_of_the_step_before(tmp_path: Path) -> None:
    for step in (1, 3, 8):
        expected = BASE * (TOTAL - step + 1) / TOTAL
        assert rate(tmp_path, step) == pytest.approx(expected, rel=1e-12)
    twice = {"base_lrs": (BASE, BASE), "_last_lr": [0.25, 0.25]}
    assert rate(tmp_path, 3, **twice) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize(
    ("facts", "step", "expected"),
    [
        ({"warmup_steps": 4}, 3, BASE * 2 / 4),
        ({"warmup_steps": 0.5}, 3, BASE * 2 / 4),  # a share of all steps
        ({"warmup_steps": 0.3}, 2, BASE * 1 / 3),  # 2.4 steps are 3
        ({"warmup_steps": 1}, 1, 0.0),
        ({"warmup_ratio": 0.5}, 3, BASE * 2 / 4),
        ({"warmup_steps": 2, "warmup_ratio": 0.5}, 2, BASE * 1 / 2),
        ({"warmup_steps": None, "warmup_ratio": None}, 3, 0.3),
        ({"lr_scheduler_kwargs": {"power": 2}}, 3, BASE * (6 / 8) ** 2),
        ({"lr_scheduler_kwargs": None}, 3, 0.3),
        ({"lr_scheduler_type": "linear"}, 3, 0.3),
        ({"lr_scheduler_type": Kind.RISING}, 3, 0.3),
    ],
)
def test_settings_say_the_schedule(tmp_path: Path, facts: Any, step: int, expected: float) -> None:
    warmup, power = facts.get("warmup_steps") or 0, (facts.get("lr_scheduler_kwargs") or {})
    if 0 < warmup < 1 or facts == {"warmup_ratio": 0.5}:
        warmup = {0.3: 3}.get(warmup, 4)
    factor = step / warmup if step < warmup else (TOTAL - step) / (TOTAL - warmup)
    saved = [BASE * factor ** power.get("power", 1)]
    found = rate(tmp_path, step, Settings(**facts), _last_lr=saved)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_what_was_logged_must_fit(tmp_path: Path) -> None:
    """The log has the rate of its step or, in older versions, that of the next one."""

    def logged(*entries: Any) -> float | None:
        return rate(tmp_path, 3, trainer={"log_history": list(entries)})

    own, following = BASE * 6 / 8, BASE * 7 / 8
    assert logged({"learning_rate": own, "step": 2}, {"loss": 3.0, "step": 2}) is not None
    assert logged({"learning_rate": following, "step": 2}) is not None
    assert logged({"learning_rate": own * (1 + 5e-7), "step": 2}) is not None
    assert logged({"learning_rate": own * (1 + 5e-6), "step": 2}) is None
    assert logged({"learning_rate": own, "step": 2}, {"learning_rate": 9.0, "step": 3}) is None
    assert logged({"learning_rate": 9.0}, {"step": 2}) is not None
    assert rate(tmp_path, 3, trainer={"log_history": None}) is not None


def test_rates_near_nothing_are_close() -> None:
    from moso_fast.sources.checkpoints.trainer_schedule import _close

    assert _close(0.0, 1e-15) and _close(1e-15, 0.0) and not _close(0.0, 2e-15)
    assert _close(1e-3, -1e-3) is False and _close(2.0, 2.0 + 1e-6) and not _close(2.0, 2.00001)


@pytest.mark.parametrize(
    "how",
    [
        {"step": "3"},
        {"step": 0},
        {"trainer": {"max_steps": None}},
        {"last_epoch": 4},
        {"base_lrs": [BASE, 0.2]},
        {"base_lrs": []},
        {"base_lrs": None},
        {"_last_lr": [0.25, 0.2]},
        {"_last_lr": ["x"]},
        {"_last_lr": [0.2]},  # another schedule left it
        {"settings": Settings(lr_scheduler_type=Kind.OTHER)},
        {"settings": Settings(lr_scheduler_type=Kind.PLATEAU)},
        {"settings": Settings(lr_scheduler_type=None)},
        {"settings": Settings(lr_scheduler_kwargs=[1])},
        {"settings": {"lr_scheduler_type": "linear"}},
        {"settings": torch.ones(2)},
    ],
)
def test_where_it_cannot_be_told_there_is_none(tmp_path: Path, how: dict) -> None:
    assert rate(tmp_path, **how) is None


def test_without_settings_scheduler_or_library_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rate(tmp_path) is not None
    facts = {"global_step": 3, "max_steps": TOTAL}
    state = {"lr_lambdas": [None], "base_lrs": [BASE], "_last_lr": [0.25], "last_epoch": 3}
    assert rate_of_last_step(tmp_path, facts, state) is not None
    assert rate_of_last_step(tmp_path, facts, None) is None
    lacking = {key: value for key, value in state.items() if key != "lr_lambdas"}
    assert rate_of_last_step(tmp_path, facts, lacking) is None
    (tmp_path / SETTINGS).write_bytes(b"damaged")
    assert rate_of_last_step(tmp_path, facts, state) is None
    (tmp_path / SETTINGS).unlink()
    assert rate_of_last_step(tmp_path, facts, state) is None
    torch.save(Settings(), tmp_path / SETTINGS)
    assert rate_of_last_step(tmp_path, facts, state) is not None
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name))
    assert rate_of_last_step(tmp_path, facts, state) is None and asked == ["transformers"]
