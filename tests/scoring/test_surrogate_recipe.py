"""The recipe of surrogates, and the checkpoints and the manifest in a folder."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from surrogate_cases import D, Net
from torch import nn
from torch.utils.data import TensorDataset

from moso_fast.surrogate.store import CheckpointStore, Recipe, input_and_label, open_folder

RECIPE = Recipe(3, 5, 4, 0.5, 0.9, 1e-4, True, 0.125, 7, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 0}, "parts: expected a positive int, got 0"),
        ({"epochs": -1}, "epochs: expected a positive int, got -1"),
        ({"batch_size": 2.0}, "batch_size: expected an int, got 2.0"),
        ({"every": False}, "every: expected an int, got False"),
        ({"seed": -1}, "seed: expected an int of at least 0, got -1"),
        ({"seed": "0"}, "seed: expected an int, got '0'"),
        (
            {"parts": 6},
            "parts: 6 parts of 11 samples leave fewer than 2 a part; at most 5 parts are possible",
        ),
        ({"lr": 0}, "lr: expected a finite float that is positive, got 0"),
        ({"lr": -0.5}, "lr: expected a finite float that is positive, got -0.5"),
        ({"lr": math.inf}, "lr: expected a finite float that is positive, got inf"),
        ({"momentum": -1.0}, "momentum: expected a finite float that is not negative, got -1.0"),
        (
            {"weight_decay": math.nan},
            "weight_decay: expected a finite float that is not negative, got nan",
        ),
        ({"min_lr": None}, "min_lr: expected a float, got None"),
        ({"momentum": True}, "momentum: expected a float, got True"),
        ({"min_lr": 0.75}, "min_lr: expected at most lr = 0.5, got 0.75"),
        ({"momentum": 0.0}, "nesterov: needs momentum > 0, got 0; pass nesterov=False"),
    ],
)
def test_a_setting_that_cannot_be_trained_with(change, message) -> None:
    with pytest.raises((ValueError, TypeError)) as refused:
        replace(RECIPE, **change).check(11)
    assert str(refused.value) == message
    assert isinstance(refused.value, TypeError) == (
        "expected a float, " in message or "an int, " in message
    )


@pytest.mark.parametrize(
    "change",
    [{"parts": 5}, {"parts": 1, "epochs": 1, "batch_size": 1, "every": 1, "seed": 0}, {"lr": 1},
     {"min_lr": 0.5}, {"min_lr": 0.0, "weight_decay": 0}, {"momentum": 0.0, "nesterov": False}],
)  # fmt: skip
def test_settings_at_their_limits(change) -> None:
    replace(RECIPE, **change).check(11)


def test_the_rate_falls_along_a_cosine() -> None:
    rates = [RECIPE.lr_at(step, 4) for step in range(5)]
    middle = 0.3125
    expected = [0.5, middle + 0.1875 / 2**0.5, middle, middle - 0.1875 / 2**0.5, 0.125]
    assert rates == pytest.approx(expected)
    store = CheckpointStore(None, 1, RECIPE, steps=3)
    assert store.epochs == [2, 4, 5]
    assert store.lr(5) == RECIPE.lr_at(14, 15) and store.lr(2) == RECIPE.lr_at(5, 15)


def test_a_store_in_memory_keeps_copies() -> None:
    store, net = CheckpointStore(None, 1, replace(RECIPE, epochs=2), 3), Net()
    assert not store.complete()
    before = net.head.weight.detach().clone()
    store.add(2, net)
    nn.init.zeros_(net.head.weight)
    (point,) = store.checkpoints()
    assert torch.equal(point.source["head.weight"], before) and not store.complete()
    assert (point.lr, point.step) == (store.lr(2), 6)
    assert not any(value.requires_grad for value in point.source.values())


def test_a_store_in_a_folder(tmp_path) -> None:
    store, net = CheckpointStore(tmp_path, 1, RECIPE, 3), Net()
    for epoch in (2, 4, 5):
        assert not store.complete()
        store.add(epoch, net)
    assert store.complete()
    paths = [tmp_path / f"trial_1_{epoch}.pth" for epoch in (2, 4, 5)]
    assert [point.source for point in store.checkpoints()] == paths
    content = torch.load(paths[1], weights_only=True)
    assert (content["lr"], content["epoch"]) == ([store.lr(4)], 4)
    assert torch.equal(content["net"]["head.weight"], net.head.weight)
    paths[0].unlink()
    assert not store.complete()


def test_an_item_is_a_pair() -> None:
    items = [(1, 2), [3, 4], (5, 6, 7), {"x": 1}, [8]]
    assert input_and_label(items, 0) == (1, 2) and input_and_label(items, 1) == (3, 4)
    for index, kind in ((2, "tuple of 3"), (3, "dict"), (4, "list of 1")):
        with pytest.raises(TypeError) as refused:
            input_and_label(items, index)
        message = f"dataset: item {index} must be a pair (input, label), got {kind}"
        assert str(refused.value) == message


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def test_the_manifest_says_what_decides_the_weights(tmp_path) -> None:
    data, ids = TensorDataset(torch.zeros(200, D), torch.arange(200)), torch.arange(200) % 3
    net, folder = nn.Linear(2, 3), tmp_path / "a" / "b"
    given = (RECIPE, net, data, ids)
    assert open_folder(folder, *given, None) == folder
    probed = [int(199 * k / 63) for k in range(64)]  # a few labels, from first to last
    layout = (("weight", [3, 2]), ("bias", [3]))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {
        "format": "moso_fast surrogates 1",
        "parts": 3, "epochs": 5, "batch_size": 4, "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4,
        "nesterov": True, "min_lr": 0.125, "seed": 7, "every": 2,
        "num_samples": 200,
        "partition_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "labels_sha256": digest(probed),
        "model_sha256": digest([[name, shape, "torch.float32"] for name, shape in layout]),
        "train_transform": "NoneType",
    }  # fmt: skip
    assert (folder / "manifest.json").read_text() == json.dumps(manifest, indent=2) + "\n"
    assert torch.equal(torch.load(folder / "partition.pt"), ids)
    assert open_folder(folder, *given, None) == folder
    for change, key, there, here in (
        ((replace(RECIPE, epochs=6), net, data, ids, None), "epochs", 5, 6),
        ((*given, test_an_item_is_a_pair), "train_transform", "NoneType", "test_an_item_is_a_pair"),
        ((*given, nn.Identity()), "train_transform", "NoneType", "Identity"),
    ):
        with pytest.raises(ValueError) as refused:
            open_folder(folder, *change)
        assert str(refused.value) == (
            f"out: {folder} holds surrogates of another run: {key} is {there!r} there and {here!r} "
            "here; choose another folder"
        )
    for change in (
        (RECIPE, net.double(), data, ids, None),
        (RECIPE, nn.Linear(2, 4), data, ids, None),
        (
            RECIPE,
            nn.Linear(2, 3),
            TensorDataset(torch.zeros(200, D), torch.arange(200) + 1),
            ids,
            None,
        ),
        (RECIPE, nn.Linear(2, 3), data, ids.flip(0), None),
    ):
        with pytest.raises(ValueError, match=r"(model|labels|partition)_sha256 is "):
            open_folder(folder, *change)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError) as refused:
        open_folder(folder, *given, None)
    assert str(refused.value) == (
        f"out: {folder / 'manifest.json'} is not a readable manifest (Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1))"
    )
    (folder / "manifest.json").unlink()
    (folder / "trial_0_1.pth").touch()
    with pytest.raises(ValueError) as refused:
        open_folder(folder, *given, None)
    assert str(refused.value) == f"out: {folder} holds trial_*.pth files but no manifest.json"
