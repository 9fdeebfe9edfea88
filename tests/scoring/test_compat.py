"""The authors' functions and script: same arguments, same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import full_cases
import numpy as np
import pytest
import torch
from full_cases import CLASSES, ConvNet, build, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

import moso_fast
from moso_fast.compat.api import MoSo_scoring, MoSo_scoring_exact
from moso_fast.compat.script import ImageFolder, contiguous_parts, draw_epochs, main

N = 11
FUNCTIONS = {"official": MoSo_scoring, "official_exact": MoSo_scoring_exact}


@pytest.mark.parametrize("formula", FUNCTIONS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_numbers_of_batch_size_one_autograd(formula: str, batch_size: int) -> None:
    net = build("cnn", torch.float32).train()
    inputs, labels = data("cnn", N)
    expected = scores(gradients(build("cnn"), inputs, labels), formula)
    loader = DataLoader(TensorDataset(inputs.float(), labels), batch_size=batch_size)
    found = FUNCTIONS[formula](net, loader, nn.CrossEntropyLoss(), 0.1)
    assert found.shape == (N,) and found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert net.training and all(p.grad is None for p in net.parameters())


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return (nn.functional.softplus(outputs).sum() + outputs[0, labels[0]]) / len(labels)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=torch.arange(1.0, CLASSES + 1, dtype=torch.float64)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.MultiMarginLoss(),
        weighted,
    ],
)
def test_any_criterion(criterion) -> None:
    net, (inputs, labels) = build("cnn"), data("cnn", N)
    expected = scores(gradients(net, inputs, labels, criterion), "official")
    loader = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    found = MoSo_scoring(net, loader, criterion)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_inputs_of_different_sizes() -> None:
    net, (inputs, labels) = build("cnn"), data("cnn", N)
    images = [x[:, : 5 + k % 2] for k, x in enumerate(inputs)]
    expected = scores(gradients(net, images, labels), "official")
    loader = [(x[None], y[None]) for x, y in zip(images, labels, strict=True)]
    found = MoSo_scoring(net, loader, nn.CrossEntropyLoss())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_refused() -> None:
    net, (inputs, labels) = build("cnn"), data("cnn", N)
    shuffling = DataLoader(TensorDataset(inputs, labels), shuffle=True)
    with pytest.raises(ValueError, match="scores come back in data-set order"):
        MoSo_scoring(net, shuffling, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="gone through twice"):
        MoSo_scoring(net, iter([(inputs, labels)]), nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="criterion must be callable"):
        MoSo_scoring(net, [(inputs, labels)], None)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        MoSo_scoring_exact(net, [(inputs[:1], labels[:1])], nn.CrossEntropyLoss())
    assert MoSo_scoring(net, [(inputs[:1], labels[:1])], nn.CrossEntropyLoss()).shape == (1,)


class Numbered(IterableDataset):
    """A stream that brings its index, and gives each worker a share."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        inputs, labels = data("cnn", N)
        worker = get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return ((inputs[k], labels[k], k) for k in range(first, N, step))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_an_index_is_refused(function, workers: int) -> None:
    """Workers would bring the samples interleaved, and nothing in the result says so."""
    net, (inputs, labels) = build("cnn"), data("cnn", N)
    message = r"^dataloader: batches must be \(inputs, labels\); MoSoScorer takes an index$"
    numbers = torch.arange(N)
    for loader in (
        DataLoader(Numbered(), batch_size=2, num_workers=workers),
        DataLoader(TensorDataset(inputs, labels, numbers), batch_size=2),
        [(inputs, labels, numbers.numpy())],
        [(numbers, (inputs, labels))],
    ):
        with pytest.raises(ValueError, match=message):
            function(net, loader, nn.CrossEntropyLoss())


MODULE = """
import sys
sys.path.append({tests!r})
import full_cases
net = full_cases.ConvNet
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the authors' first script leaves it, with images beside it."""
    pillow = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(4):
            pixels = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            pillow.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    torch.manual_seed(0)
    for trial in range(2):
        for epoch in range(4):
            state = {f"module.{n}": t for n, t in ConvNet().state_dict().items()}
            content = {"net": state, "lr": [0.1 / (epoch + 1)], "epoch": epoch, "acc": 0.5}
            torch.save(content, tmp_path / "run" / "checkpoint" / f"trial_{trial}_{epoch}.pth")
    support = str(Path(full_cases.__file__).parent)
    (tmp_path / "compat_net.py").write_text(MODULE.format(tests=support))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


WORDS = "--path run --data images --model compat_net:net --num_trails 2 --samples 2 --size 8"


def test_script(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS.split(), "--device", "cpu", "--resume", "kept"]) == 0
    shown = capsys.readouterr()
    assert "one of the parts holds 2 of 3 classes" not in shown.err
    found = torch.load(experiment / "run" / "score" / "moso_score.pth")
    images = ImageFolder(
        experiment / "images", 8, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    )
    assert images.targets == [0] * 4 + [1] * 4 + [2] * 4
    inputs = torch.stack([images[k][0] for k in range(12)]).double()
    labels = torch.tensor(images.targets)
    epochs = draw_epochs([dict.fromkeys(range(4), Path())] * 2, 2, 0)
    assert f"epochs {epochs[0]}, {epochs[1]}" in shown.out
    for trial, part in enumerate((slice(0, 6), slice(6, 12))):
        expected = torch.zeros(6, dtype=torch.float64)
        for epoch in epochs:
            content = torch.load(f"run/checkpoint/trial_{trial}_{epoch}.pth")
            net = ConvNet()
            net.load_state_dict({n.removeprefix("module."): t for n, t in content["net"].items()})
            g = gradients(net.double().eval(), inputs[part], labels[part])
            expected += content["lr"][-1] * scores(g, "official_exact")
        assert (found[part] - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = copy.copy(found)
    assert main([*WORDS.split(), "--device", "cpu", "--resume", "kept"]) == 0
    assert torch.equal(torch.load("run/score/moso_score.pth"), again)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_trails 3", "has no trial_2_EPOCH.pth"),
        ("--num_trails 7", "--num_trails must be from 1 to 6, got 7"),
        ("--samples 5", "--samples must be from 1 to 4, the common epochs; got 5"),
        ("--device nonsense", "--device nonsense cannot be used here: "),
        ("--data nowhere", "--data nowhere is no folder"),
        ("--model compat_net:nothing", "no 'nothing' in compat_net"),
    ],
)
def test_script_refuses(
    experiment: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main([*WORDS.split(), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_class_sorted_parts_are_pointed_out(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in range(4):
        for trial in (2, 3, 4, 5):
            source = experiment / "run" / "checkpoint" / f"trial_0_{epoch}.pth"
            (source.parent / f"trial_{trial}_{epoch}.pth").write_bytes(source.read_bytes())
    assert main([*WORDS.split(), "--num_trails", "6", "--device", "cpu"]) == 0
    assert "one of the parts holds 1 of 3 classes" in capsys.readouterr().err


def test_parts_are_those_of_the_authors() -> None:
    assert contiguous_parts(11, 3) == [range(0, 3), range(3, 6), range(6, 11)]


@pytest.mark.exhaustive
def test_help_in_a_process_of_its_own() -> None:
    root = str(Path(moso_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "moso_fast.compat", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
    )
    assert done.returncode == 0
    assert "--num_trails" in done.stdout and "contiguous ranges" in done.stdout
    assert done.stderr == ""


class Counting(nn.Module):
    """A criterion that changes when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.factor = 0, torch.ones((), dtype=torch.float64)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * nn.functional.cross_entropy(outputs, labels)


def test_the_criterion_is_left_as_it_was() -> None:
    net, (inputs, labels) = build("cnn"), data("cnn", N)
    criterion = Counting()
    found = MoSo_scoring(net, [(inputs, labels)], criterion)
    expected = MoSo_scoring(net, [(inputs, labels)], nn.CrossEntropyLoss())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert criterion.calls == 0
