"""A folder of results, written and read again; and what is said of one that is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moso_fast.scoring.parts import FIELDS, PartStats
from moso_fast.scoring.resume import Group, ResultStore

FINGERPRINT = {"loss": "mse", "shape": (2, 3)}


def stats_of(heads: int = 2, samples: int = 5) -> PartStats:
    g = torch.Generator().manual_seed(1)
    found = PartStats(
        {name: torch.randn(samples, generator=g) for name in FIELDS} for _ in range(heads)
    )
    found.backend = "cpu"
    found.counts = {-3: 2, 7: 3}
    found.mean_grad_sqnorm = {-3: [0.5, 0.25], 7: [1.5, 0.1]}
    return found


def group_of(first: int = 4) -> Group:
    return Group(first, ["a", "b"], "labels", "high", "bfloat16", "True: given", "{}", stats_of())


def test_a_group_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, FINGERPRINT)
    group = group_of()
    store.save(group)
    found = ResultStore(str(tmp_path), FINGERPRINT).load(4)
    assert found is not None and found.end == 6
    nothing = PartStats()
    assert replace(found, stats=nothing) == replace(group, stats=nothing)
    assert len(found.stats) == 2
    for one, other in zip(found.stats, group.stats, strict=True):
        assert list(one) == list(FIELDS)
        assert all(torch.equal(one[name], other[name]) for name in FIELDS)
    assert found.stats.backend == "cpu"
    assert found.stats.counts == group.stats.counts
    assert found.stats.mean_grad_sqnorm == group.stats.mean_grad_sqnorm
    assert store.load(3) is None and store.load(5) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "group_00004.npz",
        "manifest.json",
    ]


def test_groups_beyond_a_number(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, FINGERPRINT)
    for first in (12, 0, 3):
        store.save(group_of(first))
    assert store.beyond(0) == ["group_00000.npz", "group_00003.npz", "group_00012.npz"]
    assert store.beyond(3) == ["group_00003.npz", "group_00012.npz"]
    assert store.beyond(4) == ["group_00012.npz"]
    assert store.beyond(13) == []


def test_numbers_of_the_samples(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, FINGERPRINT)
    assert store.load_index() is None
    store.save_index(torch.tensor([5, 3, 9]))
    found = store.load_index()
    assert found is not None and found.dtype == torch.int64 and found.tolist() == [5, 3, 9]
    for content in (b"", b"nothing", (tmp_path / "index.npy").read_bytes()[:-4]):
        (tmp_path / "index.npy").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            store.load_index()
        assert str(caught.value) == (
            f"resume: {tmp_path / 'index.npy'} is damaged; delete the folder to start anew"
        )


def damaged(kind: str, path: Path) -> None:
    content = dict(np.load(path))
    about = json.loads(str(content["about"]))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])
        return
    if kind == "text":
        path.write_text("nothing")
        return
    if kind == "an array is missing":
        del content["el2n"]
    if kind == "a fact is missing":
        del about["labels"]
    if kind == "a head is missing":
        content["loss"] = content["loss"][:1]
    content["about"] = np.array(json.dumps(about) if kind != "no facts" else "[")
    with path.open("wb") as file:
        np.savez(file, **content)


@pytest.mark.parametrize(
    "kind",
    ["cut", "text", "an array is missing", "a fact is missing", "a head is missing", "no facts"],
)
def test_a_group_that_is_damaged(kind: str, tmp_path: Path) -> None:
    store = ResultStore(tmp_path, FINGERPRINT)
    store.save(group_of())
    path = tmp_path / "group_00004.npz"
    damaged(kind, path)
    with pytest.raises(ValueError) as caught:
        store.load(4)
    assert str(caught.value) == f"resume: {path} is damaged; delete it to compute it again"


def test_a_folder_of_another_run_in_whole_words(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    store = ResultStore(folder, FINGERPRINT)
    ResultStore(folder, {"loss": "other"})  # without results it binds nothing
    ResultStore(folder, FINGERPRINT)
    store.save(group_of())
    ResultStore(folder, {"shape": [2, 3], "loss": "mse"})  # a list is what JSON knows
    with pytest.raises(ValueError) as caught:
        ResultStore(folder, {"loss": "bce", "more": 3})
    assert str(caught.value) == (
        f"resume: {folder} belongs to a different run: loss was 'mse' and is now 'bce'; more was "
        "None and is now 3; shape was [2, 3] and is now None"
    )
    manifest = folder / "manifest.json"
    for content in ("[1]", "{", "3"):
        manifest.write_text(content)
        with pytest.raises(ValueError) as caught:
            ResultStore(folder, FINGERPRINT)
        assert str(caught.value) == f"resume: {manifest} is not a manifest of an earlier run"
    manifest.unlink()
    with pytest.raises(ValueError) as caught:
        ResultStore(folder, FINGERPRINT)
    assert str(caught.value) == f"resume: {folder} holds group_*.npz but no manifest.json"
    with pytest.raises(ValueError) as caught:
        ResultStore(folder / "group_00004.npz", FINGERPRINT)
    assert str(caught.value) == (f"resume: {folder / 'group_00004.npz'} is a file, not a folder")


def test_a_manifest_is_text_of_any_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read and written as UTF-8, whatever the machine's own way is."""
    asked: list[str | None] = []
    for name in ("read_text", "write_text"):
        real = getattr(Path, name)

        def noting(path: Path, *given: str, encoding: str | None = None, real=real) -> object:
            asked.append(encoding)
            return real(path, *given, encoding=encoding)

        monkeypatch.setattr(Path, name, noting)
    store = ResultStore(tmp_path, {"head": "Kopf-ß"})
    store.save(group_of())
    ResultStore(tmp_path, {"head": "Kopf-ß"})
    assert asked == ["utf-8", "utf-8"]
