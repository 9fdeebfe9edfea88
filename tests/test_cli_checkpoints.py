"""Checkpoints and learning rates on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import OTHER_STATE, STATE, stepped
from safetensors.torch import save_file

from moso_fast.cli import main
from moso_fast.table import ScoreTable

MODULE = """
import torch
from checkpoint_layouts import network

def data():
    inputs = torch.arange(40.0).reshape(8, 5) / 40
    return torch.utils.data.TensorDataset(inputs, torch.arange(8) % 3)
"""
SCORE = "score --model checkpoint_user_module:network --data checkpoint_user_module:data"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "checkpoint_user_module", raising=False)
    Path("checkpoint_user_module.py").write_text(MODULE)
    torch.save({"student": STATE, "teacher": OTHER_STATE}, "two.pth")
    torch.save({"model": STATE, "optimizer": stepped(0.0)}, "last.pth")
    torch.save({"model": STATE, "optimizer": stepped(1e-4, 0.5, momentum=0.0)}, "groups.pth")
    torch.save(OTHER_STATE, "teacher.pth")
    head = {"weight": STATE["3.weight"], "bias": STATE["3.bias"]}
    save_file(head, "h.safetensors")
    save_file({"x": torch.ones(8, 8), "y": torch.arange(8) % 3}, "data.safetensors")
    return tmp_path


def run(words: str, code: int = 0) -> None:
    assert main(words.split()) == code


def test_an_entry_is_chosen(folder: Path) -> None:
    run(f"{SCORE} --checkpoint two.pth --entry teacher -o a.npz")
    run(f"{SCORE} --checkpoint teacher.pth -o b.npz")
    one, other = ScoreTable.load("a.npz"), ScoreTable.load("b.npz")
    assert torch.equal(one.scores, other.scores)
    assert one.provenance["checkpoints"][0]["entry"] == "teacher"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{SCORE} --checkpoint two.pth", "fit the model under 'student' and 'teacher'"),
        (f"{SCORE} --entry teacher", "--entry teacher goes with --checkpoint"),
        (f"{SCORE} --checkpoint last.pth", "learning rates are all 0"),
        (f"{SCORE} --checkpoint last.pth --lr 0", "learning rates are all 0"),
        (f"{SCORE} --checkpoint groups.pth", "or --lr on the command line"),
        (
            "score --features data.safetensors:x --labels data.safetensors:y "
            "--head h.safetensors --lr 0",
            "learning rates are all 0",
        ),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture, words: str, message: str
) -> None:
    run(f"{words} -o o.npz", code=2)
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error
    assert not Path("o.npz").exists()


def test_a_given_rate_is_enough(folder: Path) -> None:
    run(f"{SCORE} --checkpoint groups.pth --checkpoint last.pth --lr .5 --lr .25 -o o.npz")
    facts = ScoreTable.load("o.npz").provenance["checkpoints"]
    assert [fact["lr"] for fact in facts] == [0.5, 0.25]
