"""`torch.set_default_device`: what the package makes for itself does not move there.

The C++ kernels would write through addresses that are none; everything else would mix devices.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_support import CPU_BACKENDS, FIELDS, random_case
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader, TensorDataset

import moso_fast
from moso_fast import (
    MoSoScorer,
    ScoreTable,
    explain,
    last_layer_stats,
    moso_scores,
    partition_ids,
    score_files,
    select,
)

PACKAGE = Path(moso_fast.__file__).parent
FOLDERS = [PACKAGE, *([] if (PACKAGE / "kernels").is_dir() else [PACKAGE.parent / "kernels"])]
# Functions of torch that ask for the default device.
MAKERS = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}


def without_a_device(source: str) -> list[int]:
    """Return the lines of calls that leave the device of a new tensor to the process."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and not {"device", None} & {keyword.arg for keyword in call.keywords}
    ]


def test_every_new_tensor_says_where_it_is() -> None:
    assert {"empty", "tensor", "as_tensor", "arange", "randperm"} <= MAKERS
    assert without_a_device(
        "x = torch.zeros(\n3)\ny = torch.ones(2, device=d)\ntorch.cat([x])"
    ) == [1]
    found = [
        f"{file}:{line}"
        for folder in FOLDERS
        for file in sorted(folder.rglob("*.py"))
        for line in without_a_device(file.read_text())
    ]
    assert found == []


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Switches the default to a device without memory."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "kind", ["ids_smoothed", "soft_smoothed", "binary", "mse", "sequences", "weighted"]
)
def test_scores_of_tensors(kind: str, backend: str, elsewhere) -> None:
    sequences, weighted = kind == "sequences", kind == "weighted"
    case = random_case("ids" if sequences or weighted else kind, n=40, heads=2)
    options = dict(case.options)
    if sequences:
        options["cu_seqlens"] = torch.tensor([0, 7, 7, 25, 40])
    if weighted:
        options["sample_weight"] = torch.rand(40)
    expected = last_layer_stats(*case.args, backend=backend, **options)
    scores = moso_scores(*case.args, backend=backend, chunk_size=7, **options)
    elsewhere()
    found = last_layer_stats(*case.args, backend=backend, **options)
    for name in FIELDS:
        assert_same(getattr(found, name), getattr(expected, name))
    again = moso_scores(*case.args, backend=backend, chunk_size=7, **options)
    assert_same(again, scores)
    assert explain(*case.args, backend=backend, **options)


@pytest.mark.parametrize("gradient", ["last_layer", "full"])
def test_a_scorer_and_its_table(gradient: str, elsewhere, monkeypatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(24, 6), torch.arange(24) % 3
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    for step in range(2):
        torch.save(model.state_dict(), tmp_path / f"{step}.pt")

    def begin(loader: DataLoader) -> Any:
        """Draw on the CPU: PyTorch's own draws a number on the default device, and reads it."""
        with torch.device("cpu"):
            return own(loader)

    own = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", begin)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=10)

    def score(folder: str) -> ScoreTable:
        scorer = MoSoScorer(model, gradient=gradient, progress=False)
        steps = [tmp_path / "0.pt", tmp_path / "1.pt"]
        return scorer.score(loader, steps, partition=2, resume=tmp_path / folder)

    expected = score("before")
    kept = select(expected.scores, 0.5)
    elsewhere()
    found = score("after")
    assert torch.equal(torch.as_tensor(found.scores, device="cpu"), expected.scores)
    assert torch.equal(select(found.scores, 0.5), kept)
    for ending in ("npz", "csv", "parquet"):
        found.save(tmp_path / f"table.{ending}")
        assert torch.equal(ScoreTable.load(tmp_path / f"table.{ending}").scores, expected.scores)


def test_ids_arrays_and_files(elsewhere, tmp_path: Path) -> None:
    case = random_case("ids", n=40)
    features, weight, labels = case.args[:3]
    np.save(tmp_path / "features.npy", features.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    torch.save({"fc.weight": weight}, tmp_path / "head.pt")
    names = (tmp_path / "features.npy", tmp_path / "labels.npy", [tmp_path / "head.pt"])
    ids = partition_ids(40, 3, 0)
    expected = moso_scores(features, weight, labels)
    from_files = score_files(*names, partition=2, progress=False).scores
    elsewhere()
    assert torch.equal(partition_ids(40, 3, 0), ids)
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist):
        found = moso_scores(*(kind(one) for one in (features, weight, labels)))
        torch.testing.assert_close(found.to(expected.dtype), expected)
    assert torch.equal(score_files(*names, partition=2, progress=False).scores, from_files)
