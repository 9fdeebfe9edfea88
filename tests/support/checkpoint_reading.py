"""What the tests of checkpoints read with, and hold what was read against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoint_layouts import STATE
from torch import Tensor, nn

from moso_fast.sources.checkpoints.checkpoint import Checkpoint, read
from moso_fast.sources.checkpoints.fit import Fitted
from moso_fast.sources.checkpoints.rates import ScoredParameters
from moso_fast.sources.checkpoints.weights import ModelWeights

HEAD = ScoredParameters({"3.weight": (3, 8), "3.bias": (3,)}, "the head", {(3, 8): 1, (3,): 1})


def into(model: nn.Module, source: Any, entry: str | None = None) -> Fitted:
    return ModelWeights(model, None).resolve(read(Checkpoint(source, entry=entry)))


def assert_holds(fitted: Fitted, expected: dict[str, Tensor] = STATE, prefix: str = "") -> None:
    for name, tensor in expected.items():
        if "num_batches_tracked" not in name:
            assert torch.equal(fitted.tensors[prefix + name], tensor), name


def trainer(folder: Path, step: int, history: list[dict], **beside: Any) -> Path:
    folder.mkdir()
    torch.save(STATE, folder / "pytorch_model.bin")
    facts = {"global_step": step, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(facts))
    for name, content in beside.items():
        torch.save(content, folder / f"{name}.pt")
    return folder
