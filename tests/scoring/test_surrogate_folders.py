"""Surrogates in a folder: files in the authors' layout, runs that go on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from surrogate_cases import QUICK, C, D, N, Net, Watched, same, samples, weights
from torch import nn
from torch.utils.data import TensorDataset

from moso_fast.scoring.partition import partition_ids
from moso_fast.surrogate.training import train_surrogates


@pytest.fixture
def data():
    return samples()


def test_files_have_the_authors_layout_and_the_same_weights(data, tmp_path):
    kept = train_surrogates(Net, data, **QUICK, every=2)
    filed = train_surrogates(Net, data, **QUICK, every=2, out=tmp_path / "s")
    names = {p.name for p in (tmp_path / "s").iterdir()}
    trials = {f"trial_{part}_{epoch}.pth" for part in range(3) for epoch in (2, 4)}
    assert names == trials | {"manifest.json", "partition.pt"}
    for in_memory, in_file in zip(kept, filed, strict=True):
        for a, b in zip(in_memory.checkpoints, in_file.checkpoints, strict=True):
            content = torch.load(b.source, weights_only=True)
            assert set(content) == {"net", "lr", "epoch"}
            assert same([a.source], [content["net"]])
            assert content["lr"] == [b.lr] == [a.lr]
            assert b.step == a.step == content["epoch"] * math.ceil(len(in_file.index) / 4)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["parts"], manifest["num_samples"]) == (0, 3, N)
    partition = torch.load(tmp_path / "s" / "partition.pt", weights_only=True)
    assert torch.equal(partition, partition_ids(N, 3, 0))


@pytest.mark.exhaustive
def test_finished_parts_are_not_trained_again(data, tmp_path):
    first = train_surrogates(Net, data, **QUICK, out=tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    (tmp_path / "trial_1_4.pth").unlink()
    watched = Watched(data)
    again = train_surrogates(Net, watched, **QUICK, out=tmp_path)
    # All labels are probed once for the manifest (N <= 64); then only part 1 is read.
    assert sorted(watched.reads[:N]) == list(range(N))
    assert set(watched.reads[N:]) == set(again[1].index.tolist())
    for path in tmp_path.iterdir():
        if not path.name.startswith("trial_1_"):
            assert path.stat().st_mtime_ns == before[path.name][0]
    loaded = torch.load(tmp_path / "trial_1_4.pth", weights_only=True)["net"]
    assert same([loaded], weights(train_surrogates(Net, data, **QUICK))[7:8])
    assert [c.lr for s in again for c in s.checkpoints] == [
        c.lr for s in first for c in s.checkpoints
    ]


@pytest.mark.exhaustive
def test_killed_run_continues_with_the_same_result(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_surrogates(Net, Watched(data, stop_after=N + 60), **QUICK, out=tmp_path)
    assert (tmp_path / "trial_0_4.pth").exists()
    assert not (tmp_path / "trial_2_1.pth").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    expected = weights(train_surrogates(Net, data, **QUICK))
    files = [tmp_path / f"trial_{p}_{e}.pth" for p in range(3) for e in (1, 2, 3, 4)]
    assert same([torch.load(f, weights_only=True)["net"] for f in files], expected)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"lr": 0.05}, "lr is 0.1 there and 0.05 here"),
        ({"train_transform": torch.neg}, "train_transform is"),
    ],
)
def test_folder_of_another_run_is_refused(data, tmp_path, change, key):
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    with pytest.raises(ValueError, match=key):
        train_surrogates(Net, data, **{**QUICK, **change}, out=tmp_path)


def test_folder_of_other_labels_or_another_network_is_refused(data, tmp_path):
    train_surrogates(Net, data, **QUICK, out=tmp_path)
    inputs, labels = data.tensors
    with pytest.raises(ValueError, match="labels_sha256"):
        train_surrogates(Net, TensorDataset(inputs, (labels + 1) % C), **QUICK, out=tmp_path)
    with pytest.raises(ValueError, match="model_sha256"):
        train_surrogates(lambda: nn.Linear(D, C), data, **QUICK, out=tmp_path)


def test_folder_without_or_with_a_broken_manifest_is_refused(data, tmp_path):
    (tmp_path / "trial_0_1.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        train_surrogates(Net, data, **QUICK, out=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable manifest"):
        train_surrogates(Net, data, **QUICK, out=tmp_path)
