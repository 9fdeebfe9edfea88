"""What a table and a folder of results say of their run: every entry, whole."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scorer_cases import CLASSES, N, SmallNet, checkpoints_of, images, scorer, trained
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import moso_fast
from moso_fast import score_files
from moso_fast.scoring.partition import partition_ids

VERSIONS = {
    "moso_fast": moso_fast.__version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}
IN_MEMORY = "a state dict in memory"
SHAPES = {
    "conv.weight": [3, 1, 3, 3],
    "conv.bias": [3],
    "bn.weight": [3],
    "bn.bias": [3],
    "bn.running_mean": [3],
    "bn.running_var": [3],
    "bn.num_batches_tracked": [],
    "fc.weight": [CLASSES, 12],
    "fc.bias": [CLASSES],
}
DEFAULTS = {
    **{"loss": "cross_entropy", "label_smoothing": 0.0, "ignore_index": -100},
    **{"precision": "highest", "nonfinite": "raise", "samples": N, "counted": N},
    **{"formula": "moso", "combine": "mean", "num_steps": None, "seed": 0},
    **{"partition": "one part", "learning_rates": "none given, 1.0 used"},
    "checkpoints": [{"source": "the model as it was given", "lr": None, "step": None}],
}
# Of a call that leaves nothing at its default.
CHOSEN = {
    **{"loss": "cross_entropy", "label_smoothing": 0.1, "ignore_index": -1},
    **{"precision": "high", "nonfinite": "exclude", "samples": N, "counted": N},
    **{"formula": "one_step", "combine": "zscore", "num_steps": 9, "seed": 5},
    "learning_rates": "given",
    "checkpoints": [
        {"source": IN_MEMORY, "lr": 0.3, "step": 0},
        {"source": IN_MEMORY, "lr": 0.1, "step": 1},
    ],
}
CALL = {"formula": "one_step", "combine": "zscore", "num_steps": 9, "seed": 5}


def digest(ids: Tensor) -> str:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=12).hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    """What is written of a run, after a look at the digest of its inputs."""
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "format": 1,\n')
    facts = json.loads(text)
    assert re.fullmatch(
        rf"digest [0-9a-f]{{32}} \(another one each time if the data set draws at random\) of {N} "
        "samples",
        facts.pop("inputs"),
    )
    return facts


@pytest.fixture
def model() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


def test_last_layer(model: SmallNet, tmp_path: Path) -> None:
    table = scorer(model, backend="torch").score(images(), resume=tmp_path)
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", "gradient": "last_layer", "head": "fc", "per": "token"},
        **{"logits": "the head's output", "features": "float32", "shift_labels": False},
        "index": "place in the data",
        **DEFAULTS,
    }
    assert manifest(tmp_path) == {
        **{"format": 1, "moso_fast": moso_fast.__version__, "samples": N},
        **{"loss": "cross_entropy", "label_smoothing": 0.0, "ignore_index": -100},
        **{"precision": None, "nonfinite": "raise", "shift_labels": "auto", "dtype": None},
        **{"backend": "torch", "chunk_size": None, "head": "fc", "feature_cache": "auto"},
        **{"per": "token", "partition": "none", "model": SHAPES},
    }


def test_last_layer_with_everything_chosen(model: SmallNet, tmp_path: Path) -> None:
    inputs, labels = images().tensors
    chosen: dict[str, Any] = {
        **{"label_smoothing": 0.1, "ignore_index": -1, "precision": "high", "backend": "torch"},
        **{"feature_cache": "bfloat16", "shift_labels": False, "per": "sample", "head": "fc"},
        **{"nonfinite": "exclude", "chunk_size": 7, "dtype": torch.float32, "device": "cpu"},
    }
    table = scorer(model, **chosen).score(
        TensorDataset(inputs, labels, 3 * torch.arange(N)),
        checkpoints_of(trained(model))[:2],
        partition=2,
        sample_weight=torch.arange(N),
        resume=tmp_path,
        **CALL,
    )
    assert table.index.tolist() == [3 * k for k in range(N)]
    ids, weights = digest(partition_ids(N, 2, 5)), [float(k) for k in range(N)]
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", "gradient": "last_layer", "head": "fc", "per": "sample"},
        **{"sample_weight": weights, "logits": "the head's output", "features": "bfloat16"},
        **{"shift_labels": False, "index": "brought by the data"},
        **CHOSEN,
        "partition": f"2 parts, split by seed 5, digest {ids}",
    }
    assert manifest(tmp_path) == {
        **{"format": 1, "moso_fast": moso_fast.__version__, "samples": N},
        **{"loss": "cross_entropy", "label_smoothing": 0.1, "ignore_index": -1},
        **{"precision": "high", "nonfinite": "exclude", "shift_labels": False},
        **{"dtype": "torch.float32", "backend": "torch", "chunk_size": 7, "head": "fc"},
        **{"feature_cache": "bfloat16", "per": "sample", "sample_weight": weights},
        **{"partition": ids, "model": SHAPES},
    }


FULL = {"norms_explicit": [], "norms_explicit_by": "", "alignment": "forward mode"}


def test_whole_network(model: SmallNet, tmp_path: Path) -> None:
    table = scorer(model, gradient="full").score(images(), resume=tmp_path)
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", "gradient": "full", "views": 1, "per": "token", "autocast": None},
        **{"parameters": "6 (88 numbers), all that require grad", **FULL},
        **{"norms": "6 of 6 parameters traced", "features": "float32", "shift_labels": False},
        "index": "place in the data",
        **DEFAULTS,
    }
    facts = manifest(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", facts.pop("parameters"))
    assert facts == {
        **{"format": 1, "moso_fast": moso_fast.__version__, "samples": N},
        **{"loss": "cross_entropy", "label_smoothing": 0.0, "ignore_index": -100},
        **{"precision": None, "nonfinite": "raise", "shift_labels": "auto", "dtype": None},
        **{"gradient": "full", "chunk_size": None, "views": "1", "autocast": None},
        **{"per": "token", "partition": "none", "model": SHAPES},
    }


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.square().sum(1)


def test_whole_network_with_everything_chosen(model: SmallNet, tmp_path: Path) -> None:
    ids = torch.arange(N) % 2
    chosen: dict[str, Any] = {
        **{"scope": "fc", "views": 2, "autocast": torch.bfloat16, "per": "sample"},
        **{"chunk_size": 7, "shift_labels": True, "loss": squares, "ignore_index": -1},
        "nonfinite": "exclude",
    }
    table = scorer(model, gradient="full", **chosen).score(
        images(),
        checkpoints_of(trained(model))[:2],
        partition=ids,
        index=torch.arange(N) + 4,
        resume=tmp_path,
        **CALL,
    )
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", "gradient": "full", "views": 2, "per": "sample"},
        **{"parameters": "2 (52 numbers), chosen by the caller", "autocast": "torch.bfloat16"},
        **{**FULL, "norms": "2 of 2 parameters traced", "features": "float32"},
        **{"shift_labels": True, "index": "given", **CHOSEN, "label_smoothing": 0.0},
        **{"loss": "squares", "precision": "highest"},
        "partition": f"2 parts, given ids, digest {digest(ids)}",
    }
    facts = manifest(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", facts.pop("parameters"))
    assert facts == {
        **{"format": 1, "moso_fast": moso_fast.__version__, "samples": N},
        **{"loss": "callable squares", "label_smoothing": 0.0, "ignore_index": -1},
        **{"precision": None, "nonfinite": "exclude", "shift_labels": True, "dtype": None},
        **{"gradient": "full", "chunk_size": 7, "views": "2, seed 5", "per": "sample"},
        **{"autocast": "torch.bfloat16", "partition": digest(ids), "model": SHAPES},
    }


def test_files() -> None:
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(N, 6, generator=g), torch.arange(N) % 4
    head = torch.randn(4, 6, generator=g)
    table = score_files(features, labels, head, backend="torch", progress=False)
    origin = {
        "features": {"source": "features", "shape": [N, 6], "dtype": "float32"},
        "labels": "labels",
    }
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", **origin, **DEFAULTS},
        "checkpoints": [{"source": "heads[0]", "lr": None}],
    }
    table = score_files(
        features,
        labels,
        [head, 2 * head],
        lr=[0.3, 0.1],
        partition=2,
        **{"label_smoothing": 0.1, "ignore_index": -1, "precision": "high", "backend": "torch"},
        **{"nonfinite": "exclude", "chunk_size": 7, "progress": False},
        **CALL,
    )
    assert table.provenance == {
        **VERSIONS,
        **{"backend": "torch", **origin, **CHOSEN},
        "checkpoints": [{"source": "heads[0]", "lr": 0.3}, {"source": "heads[1]", "lr": 0.1}],
        "partition": f"2 parts, split by seed 5, digest {digest(partition_ids(N, 2, 5))}",
    }


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([images()[k] for k in range(N)])


def test_a_stream_is_bound_by_what_is_known_of_it(model: SmallNet, tmp_path: Path) -> None:
    scorer(model).score(Stream(), partition=2, seed=3, resume=tmp_path)
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert (facts["samples"], facts["partition"]) == (None, "2, seed 3")
    assert facts["inputs"] is None  # nobody reads ahead of it


def test_a_loss_that_has_no_name_is_called_by_its_class() -> None:
    class Squares(nn.Module):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return squares(outputs, labels)

    table = scorer(nn.Linear(3, 2), gradient="full", loss=Squares()).score(
        TensorDataset(torch.randn(4, 3), torch.zeros(4).long())
    )
    assert table.provenance["loss"] == "Squares"
