"""Checkpoints and learning rates on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import OTHER_STATE, STATE, stepped
from safetensors.torch import save_file

from moso_fast.cli import main
from moso_fast.tables.table import ScoreTable

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


FILES = "score --features data.safetensors:x --labels data.safetensors:y -o o.npz"


@pytest.mark.parametrize("name", ["h.pth", "h.pyth", "h.pkl", "h.th"])
def test_a_head_in_any_file_of_torch_with_a_rate_that_is_given(folder: Path, name: str) -> None:
    head = {"weight": STATE["3.weight"], "bias": STATE["3.bias"]}
    torch.save({"model": head, "lr": "cosine"}, name)
    run(f"{FILES} --head {name} --lr 0.5")
    assert ScoreTable.load("o.npz").provenance["checkpoints"][0]["lr"] == 0.5
    run(f"{FILES} --head {name}", code=2)


def test_rates_of_heads_speak_of_the_option(folder: Path, capsys: pytest.CaptureFixture) -> None:
    head = {"weight": STATE["3.weight"], "bias": STATE["3.bias"]}
    torch.save({"model": head, "lr": 0.0}, "zero.pth")
    torch.save({"model": head, "lr": 0.5}, "half.pth")
    for heads, message in (
        ("zero.pth", "the last step that was taken with --lr, or any positive one"),
        ("half.pth --head h.safetensors", "h.safetensors does not: either all have one or none"),
        ("half.pth --head h.safetensors --head h.safetensors", "give one --lr for each"),
    ):
        run(f"{FILES} --head {heads}", code=2)
        error = " ".join(capsys.readouterr().err.split())
        assert message in error and "Checkpoint(source" not in error
    with pytest.warns(UserWarning, match="has learning rate 0 .*--lr gives another"):
        run(f"{FILES} --head zero.pth --head half.pth")
    with pytest.warns(UserWarning, match="combine='zscore' needs none"):
        run(f"{FILES} --head half.pth --head h.safetensors --combine zscore")
