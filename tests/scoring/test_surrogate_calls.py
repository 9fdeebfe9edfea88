"""Calls of surrogate training and scoring: steps by hand, what is handed on, refusals in full."""

from __future__ import annotations

import io
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from surrogate_cases import QUICK, C, D, N, Net, Watched, samples
from torch import nn
from torch.utils.data import TensorDataset

from moso_fast.core.errors import DataError
from moso_fast.surrogate import training
from moso_fast.surrogate.store import Recipe
from moso_fast.surrogate.training import (
    Surrogate,
    sample_positions,
    score_surrogates,
    train_surrogates,
)


@pytest.mark.exhaustive
def test_what_a_call_leaves_out_is_in_the_manifest(tmp_path) -> None:
    """The documented defaults, and the weights that they give."""
    data = TensorDataset(torch.rand(16, D), torch.arange(16) % C)
    surrogates = train_surrogates(lambda: nn.Linear(D, C), data, out=tmp_path, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    expected = {"parts": 8, "epochs": 50, "batch_size": 256, "lr": 0.1, "momentum": 0.9,
                "weight_decay": 2e-4, "nesterov": True, "min_lr": 1e-4, "seed": 0,
                "every": 1}  # fmt: skip
    assert {name: manifest[name] for name in expected} == expected
    assert [len(s.checkpoints) for s in surrogates] == [50] * 8
    table = score_surrogates(surrogates, lambda: nn.Linear(D, C), data, progress=False)
    assert table.per_checkpoint["score"].shape == (10, 16)
    same = score_surrogates(
        surrogates, lambda: nn.Linear(D, C), data, samples=10, seed=0, progress=False
    )
    assert torch.equal(same.scores, table.scores)


def test_a_training_step_by_step() -> None:
    """In plain PyTorch, over the samples in the order in which they were read."""
    data = Watched(samples())
    (surrogate,) = train_surrogates(
        Net, data, parts=1, epochs=2, batch_size=8, lr=0.25, momentum=0.5, weight_decay=0.01,
        nesterov=False, min_lr=0.05, seed=3, progress=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Net().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5, weight_decay=0.01)
    inputs, labels = data.dataset.tensors
    reads, step = list(data.reads), 0
    for epoch in range(2):
        for size in (8, 8, 8, 7):  # 31 samples in batches that differ by one at most
            batch, reads = torch.tensor(reads[:size]), reads[size:]
            optimizer.param_groups[0]["lr"] = 0.05 + 0.1 * (1 + math.cos(math.pi * step / 8))
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
        for name, value in surrogate.checkpoints[epoch].source.items():
            torch.testing.assert_close(value, net.state_dict()[name], msg=name)
    assert not reads and surrogate.num_steps == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal(monkeypatch) -> None:
    for progress, terminal, shown in (
        (True, True, True),
        (False, True, False),
        (True, False, False),
    ):
        screen = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(training.sys, "stderr", screen)
        train_surrogates(Net, samples(), **{**QUICK, "parts": 2, "epochs": 2, "progress": progress})
        lines = [f"\rsurrogate {part}/2, epoch {epoch}/2 " for part in (1, 2) for epoch in (1, 2)]
        assert screen.getvalue() == ("".join(lines) + "\n" if shown else "")


def test_the_refusals_of_training_in_full() -> None:
    data = samples()
    net = Net()
    wanted = "model_factory: expected a function that returns a new nn.Module, got"
    for factory, message in (
        (net, f"{wanted} Net; for example lambda: Net()"),
        (5, f"{wanted} int; for example lambda: Net()"),
        (dict, "model_factory: must return an nn.Module, got dict"),
    ):
        with pytest.raises(TypeError) as refused:
            train_surrogates(factory, data, **QUICK)
        assert str(refused.value) == message

    class Wrapped(Net):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(TypeError) as refused:
        train_surrogates(Wrapped, data, **QUICK)
    assert (
        str(refused.value)
        == "model_factory: the network must return the logits as a tensor, got dict"
    )
    bad = TensorDataset(torch.full((N, D), math.inf), data.tensors[1])
    with pytest.raises(ValueError) as refused:
        train_surrogates(Net, bad, **QUICK, lr=0.25)
    assert str(refused.value) == (
        "training of part 0 diverged: loss nan in epoch 1; lower lr (0.25 given) or check the "
        "inputs"
    )
    for dataset in (iter([]), types.SimpleNamespace(__len__=1)):
        with pytest.raises(TypeError) as refused:
            train_surrogates(Net, dataset, **QUICK)
        assert str(refused.value) == (
            "dataset: expected a map-style data set with __len__ and __getitem__, got "
            f"{type(dataset).__name__}"
        )


def test_the_refusals_of_scoring_in_full() -> None:
    data = samples()
    point = training.Checkpoint(Net().state_dict(), 0.1)
    one = Surrogate(4, torch.tensor([1, 3, 30]), [point] * 3, 3)
    short = Surrogate(5, torch.tensor([2, 4]), [point] * 2, 3)
    small = TensorDataset(*(t[:30] for t in data.tensors))
    for given, dataset, samples_, message in (
        ([], data, 2, "surrogates: expected at least one, got none"),
        ([one, short], data, 2,
         "surrogates: expected the same number of checkpoints for every part, got {2, 3}"),
        ([one], small, 2,
         "dataset: has 30 samples, but part 4 holds index 30; pass the data set of the training"),
        ([one], data, 4,
         "samples: expected 1 to 3, the number of checkpoints of a surrogate, or None for all of "
         "them, got 4"),
        ([one], data, True, "samples: expected an int or None, got True"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)) as refused:
            score_surrogates(given, Net, dataset, samples=samples_)
        assert str(refused.value) == message
    assert sample_positions(3, 1) in ([0], [1], [2]) and sample_positions(3, 3) == [0, 1, 2]
    assert sample_positions(50, 5) == sample_positions(50, 5, 0)


def test_what_scoring_hands_on(monkeypatch, tmp_path) -> None:
    """To the scorer its options, to each scoring the part, its checkpoints and its folder."""
    asked = []
    data = samples()

    class Scorer:
        def __init__(self, model, **options):
            asked.append((type(model), options))

        def score(self, dataset, points, **how):
            rows = [int(dataset[k][1]) for k in range(len(dataset))]
            asked.append((rows, points, how["index"].tolist(), how["resume"], how))
            if "bad" in how.get("formula", ""):
                raise DataError("row {row} is {value}", row=1, value=2.0)
            return training.ScoreTable(how["index"].float(), index=how["index"])

    monkeypatch.setattr(training, "MoSoScorer", Scorer)
    given = [
        Surrogate(part, torch.tensor(index), [f"{part}.{k}" for k in range(6)], 6)
        for part, index in enumerate(([30, 2, 4], [1, 29]))
    ]
    for options in ({}, {"formula": "cosine", "combine": "zscore", "num_steps": 9, "head": "h"}):
        asked.clear()
        folder = tmp_path if options else None
        table = score_surrogates(given, Net, data, samples=2, seed=5, resume=folder, **options)
        (kind, own), *calls = asked
        assert kind is Net and own == ({"head": "h"} if options else {})
        places = sample_positions(6, 2, 5)
        for part, (rows, points, index, resume, how) in enumerate(calls):
            assert index == given[part].index.tolist()
            assert rows == data.tensors[1][given[part].index].tolist()
            assert points == [f"{part}.{k}" for k in places]
            assert resume == (tmp_path / f"part_{part}" if options else None)
            extra = {name: how[name] for name in how if name not in ("index", "resume")}
            assert extra == {name: value for name, value in options.items() if name != "head"}
        assert table.index.tolist() == [1, 2, 4, 29, 30]
        assert table.scores.tolist() == [1, 2, 4, 29, 30]
    with pytest.raises(DataError) as refused:
        score_surrogates(given, Net, data, samples=2, formula="bad")
    assert str(refused.value) == "part 0: row 2 is 2.0" and refused.value.row == 2


def test_devices_and_workers_reach_the_training(monkeypatch, tmp_path) -> None:
    given = []

    def train(*args):
        given.append(args)
        args[3].sources = {epoch: {} for epoch in args[3].epochs}

    monkeypatch.setattr(training, "_train_part", train)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = samples()
    options = {"parts": 2, "epochs": 4, "batch_size": 4}
    train_surrogates(Net, data, **options, num_workers=3, train_transform=torch.neg)
    assert [call[4] for call in given] == [torch.device("cpu")] * 2
    assert [call[5:] for call in given] == [(3, True)] * 2
    for part, (factory, view, recipe, store, *_) in enumerate(given):
        assert factory is Net and store.part == part and store.folder is None
        assert recipe == Recipe(2, 4, 4, 0.1, 0.9, 2e-4, True, 1e-4, 0, 1)
        assert len(view) == len(view.index) and store.steps == math.ceil(len(view) / 4)
        inputs, label = view[1]
        assert torch.equal(inputs, -data[view.index[1]][0]) and label == data[view.index[1]][1]
    given.clear()
    train_surrogates(Net, data, **options, device="meta", progress=False)
    assert [(call[4].type, call[5:]) for call in given] == [("meta", (0, False))] * 2
    assert torch.equal(given[0][1][0][0], data[given[0][1].index[0]][0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given.clear()
    train_surrogates(Net, data, **options)
    assert [call[4] for call in given] == [torch.device("cuda")] * 2


def test_the_generator_of_a_gpu_is_seeded_too(monkeypatch) -> None:
    seeded, forked = [], []

    class Fork:
        def __init__(self, devices):
            forked.append(devices)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    makers = [
        types.SimpleNamespace(manual_seed=lambda s, k=k: seeded.append((k, s))) for k in range(4)
    ]
    monkeypatch.setattr(torch.random, "fork_rng", Fork)
    monkeypatch.setattr(torch.cuda, "default_generators", makers)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    state = torch.default_generator.get_state()
    try:
        for name, device in (("cuda:1", 1), ("cuda", 2), ("cuda:0", 0), ("cpu", None)):
            seeded.clear()
            with training._seeded(5, torch.device(name)):
                assert torch.default_generator.initial_seed() == 5
            assert forked.pop() == ([] if device is None else [device])
            assert seeded == ([] if device is None else [(device, 5)])
    finally:
        torch.default_generator.set_state(state)


def test_a_finished_folder_is_only_opened(tmp_path, monkeypatch) -> None:
    first = train_surrogates(Net, samples(), **QUICK, out=str(tmp_path))
    monkeypatch.setattr(training, "_train_part", None)
    again = train_surrogates(Net, samples(), **QUICK, out=str(tmp_path))
    assert [vars(p) for s in again for p in s.checkpoints] == [
        vars(p) for s in first for p in s.checkpoints
    ]
