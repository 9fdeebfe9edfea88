"""bergson's in-memory collector and scorer on a token head.

It scores causal language models, whose position t predicts label t + 1, and cannot reach a head
through its own entry points; the model here looks its features up by row and has one position more
than tokens, so that head, features and labels are those of the case.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moso_fast.bench.cases import Case
from moso_fast.bench.inputs import Inputs
from moso_fast.bench.providers import Job, Provider

__all__ = ["PROVIDERS"]

_BATCH = 8


class _Model(nn.Module):
    """Features of the rows named by ``input_ids``, then the head."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.features = inputs.features
        self.lm_head = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0])
        with torch.no_grad():
            self.lm_head.weight.copy_(inputs.weight)
            self.lm_head.bias.copy_(inputs.bias)
        self.device = inputs.features.device
        self.dtype = inputs.features.dtype

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """(B, T + 1) rows to logits (B, T + 1, C)."""
        h = self.features[input_ids].requires_grad_()
        return SimpleNamespace(logits=self.lm_head(h))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _bergson(case: Case, inputs: Inputs) -> Job:
    """Collect the mean gradient, then its dot product with every sequence."""
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config.config import IndexConfig, PreprocessConfig
    from bergson.gradients import GradientProcessor
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from bergson.score.scorer import Scorer
    from datasets import Dataset

    folder = tempfile.TemporaryDirectory(prefix="moso_fast_bergson_")
    config = IndexConfig(
        run_path=f"{folder.name}/run", loss_reduction="sum", include_bias=False, projection_dim=0
    )
    config.partial_run_path.mkdir(parents=True)
    samples = inputs.samples()
    labels = inputs.labels.tolist()
    data = Dataset.from_dict(
        {
            "input_ids": [[*range(s.start, s.stop), s.start] for s in samples],
            "labels": [[-100, *labels[s]] for s in samples],
            "length": [s.stop - s.start + 1 for s in samples],
        }
    )
    batches = [
        list(range(start, min(start + _BATCH, len(samples))))
        for start in range(0, len(samples), _BATCH)
    ]
    model = _Model(inputs)

    def collect(**options: Any) -> Any:
        collector = InMemoryCollector(
            model=model,
            cfg=config,
            processor=GradientProcessor(include_bias=False),
            target_modules={"lm_head"},
            data=data,
            **options,
        )
        computer = CollectorComputer(
            model=model, data=data, collector=collector, batches=batches, cfg=config
        )
        computer.run_with_collector_hooks(desc="")
        return collector

    def run() -> dict[str, Tensor]:
        with _quiet():
            mean = collect(preprocess_cfg=PreprocessConfig(aggregation="mean")).gradients
            writer = InMemorySequenceScoreWriter(len(samples), 1)
            scorer = Scorer(mean, ["lm_head"], writer, model.device, torch.float32)
            collect(scorer=scorer)
        return {"alignment_without_bias": writer.scores[:, 0]}

    run.folder = folder  # type: ignore[attr-defined]  # lives as long as the job
    return run


PROVIDERS = (
    Provider(
        "bergson collector and scorer",
        "peer",
        frozenset({"sequences"}),
        _bergson,
        needs=("bergson", "datasets"),
        heavy=True,
        note="alignment only; without the bias; all per-sequence gradients",
    ),
)
