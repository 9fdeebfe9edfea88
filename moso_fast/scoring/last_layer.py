"""The last layer's job: features once for all heads that share them, and their statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.logit_map import LogitMap
from ..sources.checkpoints.weights import Snapshot, digest
from ..sources.find_head import describe_head
from ..sources.heads import check_finite
from .eval_mode import evaluating
from .features import FeatureCapture, Features
from .head.linear_check import read_again
from .head.weights import HeadReading
from .job import Job
from .mapped import head_problem
from .noise import cancellation, warn_if_noise
from .parts import PartStats, part_stats
from .resume import Group
from .row_weights import RowWeights
from .settings import Call, ScoredModel, Settings

# Heads over the same features are scored together up to this size of their weights.
_HEADS_BYTES = 1 << 30


class LastLayerJob(Job):
    """Scores checkpoints by their heads, in groups that share their features.

    Only one checkpoint's weights, one cache of features and the heads of one group are in memory
    at a time, besides the statistics.
    """

    def __init__(self, model: ScoredModel, settings: Settings, call: Call) -> None:
        super().__init__(model, settings, call)
        assert model.head is not None
        self.head = model.head
        self.row_weights = RowWeights(settings.class_weight, call.sample_weight)
        self.notes: list[dict[str, str]] = []  # of every group: what lies behind its heads
        samples = self.samples if self.samples >= 0 else None
        self.row_weights.check(samples, getattr(self.head, "out_features", None))
        self.capture = FeatureCapture(
            model.network,
            model.head_name,
            self.head,
            self.data,
            cache=settings.feature_cache,
            loss=settings.loss,
            shift=self.shift,
            ignore_index=settings.ignore_index,
            device=settings.device,
            dtype=settings.dtype,
        )

    def describe(self) -> dict[str, Any]:
        """Say for the record which weights were scored, and what lies behind them."""
        return {
            "head": self.model.head_name,
            "per": self.settings.per,
            **self.row_weights.describe(),
            **describe_head(self.model.network, self.head),
            **joined(self.notes),
            **super().describe(),
        }

    def warn_if_noise(self, groups: list[PartStats]) -> None:
        """Warn once where the products were too coarse for what is left of the scores."""
        precision = self.settings.precision or self.precision
        # The torch backend computes in float32 whatever is allowed.
        rounded = [group for group in groups if group.backend != "torch"]
        if precision == "medium" and rounded and self.call.formula != "alignment":
            warn_if_noise(max(cancellation(g[-1], g.counts, self.ids) for g in rounded))

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "backend": settings.backend,
            "chunk_size": settings.chunk_size,
            "head": self.model.head_name,
            "feature_cache": settings.feature_cache,
            "per": settings.per,
            **self.row_weights.describe(),
        }

    def _run(self, on_batch: Callable[[], None]) -> list[PartStats]:
        results: list[PartStats] = []
        stored: Group | None = None
        pending: HeadGroup | None = None
        features: Features | None = None
        snapshot: Snapshot | None = None
        for k, (tensors, copy) in enumerate(self.checkpoints):
            name = "" if self.store is None else digest(tensors)
            backbone = self.weights.backbone(tensors)
            # Known since features were made: nothing is shared before that.
            alone = not self.capture.inputs.read_elsewhere
            shared = snapshot is not None and alone and snapshot.equals(backbone)
            if pending is not None and (not shared or pending.full()):
                # Before the next features overwrite those of this group.
                results.append(self._finish(pending))
                pending = None
            if not shared:
                features = None
                snapshot = Snapshot(backbone, copy=copy)
            if pending is None and (stored is None or k >= stored.end):
                stored = self._load(k)
                if stored is not None:
                    results.append(stored.stats)
                    self.notes.append(json.loads(stored.notes))
            if stored is not None and k < stored.end:
                self._check_digest(stored, k, name)
                continue
            if features is None:
                features, reading = self._features(tensors, on_batch)
            else:
                reading = self._read_again(tensors, features)
            check_finite(self.checkpoints.name(k), reading.weight, reading.bias)
            if pending is not None and pending.input_scale != reading.input_scale:
                results.append(self._finish(pending))
                pending = None
            if pending is None:
                check = self.capture.inputs.check
                pending = HeadGroup(k, features, reading.input_scale, check.map, check.notes)
            pending.add(reading, name)
        if pending is not None:
            results.append(self._finish(pending))
        self._check_end(stored)
        return results

    def _features(
        self, tensors: Mapping[str, Tensor], on_batch: Callable[[], None]
    ) -> tuple[Features, HeadReading]:
        """Features of all samples, and the weights of the head that they went into."""
        with self.weights.lent(tensors):
            features = self.capture.run(on_batch)
            reading = self._own(self.capture.inputs.reading, features)
        self._know_samples(features.samples)
        self.feature_dtype = str(features.features.dtype).removeprefix("torch.")
        self._check_counted(features.counted(self.capture.ignore_index))
        if self.store is not None:
            self._know_labels(digest({"labels": features.labels}))
        return features, reading

    def _read_again(self, tensors: Mapping[str, Tensor], features: Features) -> HeadReading:
        """Read the weights of another checkpoint's head for the features that are there."""
        inputs = self.capture.inputs
        assert inputs.sample is not None
        with self.weights.lent(tensors, head_only=True), evaluating(self.model.network):
            reading = read_again(inputs.name, self.head, inputs.sample, inputs.plain)
            return self._own(reading, features)

    def _own(self, reading: HeadReading | None, features: Features) -> HeadReading:
        """Copy the weights, which are lent, to where they are scored."""
        assert reading is not None
        # Features that do not fit on the model's GPU lie in main memory, and are streamed to it.
        weight = reading.weight
        return reading.copied(weight.device if weight.is_cuda else features.features.device)

    def _finish(self, heads: HeadGroup) -> PartStats:
        features, settings = heads.features, self.settings
        self.notes.append(heads.notes)
        weight, bias = heads.stacked()
        job = head_problem(
            heads.inputs(),
            weight,
            features.labels,
            bias,
            cu_seqlens=features.cu_seqlens,
            sample_weight=self.row_weights.of(features, weight.shape[-2]),
            options=settings.options,
            **heads.to_logits(),
        )
        self.precision = job.problem.precision
        try:
            stats = part_stats(
                job,
                partition=self.ids,
                backend=settings.backend,
                chunk_size=settings.chunk_size,
            )
        except DataError as error:
            raise features.of_a_sample(error) from error
        self._save(heads.first, heads.digests, stats, json.dumps(heads.notes))
        return stats


class HeadGroup:
    """Heads of consecutive checkpoints that share their features, and the factors in them.

    ``input_scale`` multiplies the features of all of them, ``logit_map`` takes their outputs to the
    logits.
    """

    def __init__(
        self,
        first: int,
        features: Features,
        input_scale: float = 1.0,
        logit_map: LogitMap | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.first, self.features = first, features
        self.notes = dict(notes or {})
        self.input_scale, self.logit_map = input_scale, logit_map
        self.digests: list[str] = []
        self.scales: list[float] = []
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []

    def add(self, reading: HeadReading, name: str) -> None:
        """Take a head whose tensors nobody else writes to; ``name`` is the checkpoint's digest."""
        self._weights.append(reading.weight)
        if reading.bias is not None:
            self._biases.append(reading.bias)
        self.scales.append(reading.output_scale)
        self.digests.append(name)

    def to_logits(self) -> dict[str, Any]:
        """Arguments of `mapped.head_problem`: what lies between weights and logits."""
        if self.logit_map is None or self.logit_map.kind != "scale":
            return {"logit_map": self.logit_map, "logit_scale": self.scales}
        factor = float(self.logit_map.values[0])
        return {"logit_scale": [factor * scale for scale in self.scales]}

    def inputs(self) -> Tensor:
        """(rows, D) features that the weights are multiplied with."""
        features = self.features.features
        if self.input_scale == 1.0:
            return features
        # In float32 at least: a product rounded to 16 bits would be another feature.
        wide = torch.promote_types(features.dtype, torch.float32)
        return features.to(wide) * self.input_scale

    def full(self) -> bool:
        """Tell whether one more head would make the stack too large."""
        weight = self._weights[0]
        return (len(self._weights) + 1) * weight.numel() * weight.element_size() > _HEADS_BYTES

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """(C, D) and (C,) of a single head, or (K, C, D) and (K, C)."""
        if len(self._weights) == 1:
            return self._weights[0], self._biases[0] if self._biases else None
        return torch.stack(self._weights), torch.stack(self._biases) if self._biases else None


def joined(notes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts of all groups in one: each that was noted, once."""
    names = dict.fromkeys(name for one in notes for name in one)
    found = {"logits": "the head's output"}
    for name in names:
        seen = dict.fromkeys(one.get(name, found.get(name, "")) for one in notes)
        found[name] = "; ".join(value for value in seen if value)
    return found
