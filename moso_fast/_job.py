"""The last layer's job: features once for all heads that share them, and its epilogue."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._job_base import Job
from ._resume import Group
from ._weights import Snapshot, digest
from .features import FeatureCapture, Features
from .formulas import check_count
from .formulas import score as formula_score
from .parts import PartStats, score_parts, split_parts
from .problem import default_precision

if TYPE_CHECKING:
    from .scorer import MoSoScorer

# Heads over the same features are scored together up to this size of their weights.
_HEADS_BYTES = 1 << 30


class ScoringJob(Job):
    """Scores checkpoints by their heads, in groups that share their features.

    Only one checkpoint's weights, one cache of features and the heads of one group are in memory
    at a time, besides the statistics.
    """

    def __init__(
        self,
        scorer: MoSoScorer,
        data: Any,
        checkpoints: Any,
        formula: str,
        partition: Any,
        seed: int,
        index: Tensor | None,
        resume: str | os.PathLike[str] | None,
    ) -> None:
        head = scorer.head
        assert head is not None
        super().__init__(scorer, head, data, checkpoints, formula, partition, seed, index)
        self.head = head
        self.capture = FeatureCapture(
            scorer.model,
            scorer.head_name,
            head,
            self.loader,
            cache=scorer.feature_cache,
            shift=scorer.shift,
            ignore_index=scorer.options["ignore_index"],
            device=scorer.device,
            dtype=scorer.dtype,
        )
        self.resume(resume)

    def _facts(self) -> dict[str, Any]:
        scorer = self.scorer
        return {
            "backend": scorer.backend,
            "chunk_size": scorer.chunk_size,
            "head": scorer.head_name,
            "feature_cache": scorer.feature_cache,
        }

    def _run(self, on_batch: Callable[[], None]) -> list[PartStats]:
        results: list[PartStats] = []
        stored: Group | None = None
        pending: HeadGroup | None = None
        features: Features | None = None
        snapshot: Snapshot | None = None
        for k, (tensors, copy) in enumerate(self._weights_in_order()):
            name = "" if self.store is None else digest(tensors)
            backbone = self.weights.backbone(tensors)
            shared = snapshot is not None and snapshot.equals(backbone)
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
            if stored is not None and k < stored.end:
                self._check_digest(stored, k, name)
                continue
            if features is None:
                features = self._features(tensors, on_batch)
            if pending is None:
                pending = HeadGroup(k, features)
            with self.weights.lent(tensors, head_only=True):
                pending.add(self.head, name)
        if pending is not None:
            results.append(self._finish(pending))
        self._check_end(stored)
        return results

    def _features(self, tensors: Mapping[str, Tensor], on_batch: Callable[[], None]) -> Features:
        with self.weights.lent(tensors):
            features = self.capture.run(on_batch)
        self._know_samples(features.samples)
        self.precision = default_precision(features.features)
        self.feature_dtype = str(features.features.dtype).removeprefix("torch.")
        self._check_counted(features.counted(self.capture.ignore_index))
        if self.store is not None:
            self._know_labels(digest({"labels": features.labels}))
        return features

    def _finish(self, heads: HeadGroup) -> PartStats:
        scorer, features = self.scorer, heads.features
        weight, bias = heads.stacked()
        stats = score_parts(
            features.features,
            weight,
            features.labels,
            bias,
            partition=self.ids,
            # Scores are computed from the statistics, so that stored ones give every formula.
            formula="alignment",
            cu_seqlens=features.cu_seqlens,
            backend=scorer.backend,
            chunk_size=scorer.chunk_size,
            **scorer.options,
        )
        if self.store is not None:
            facts = (self._labels, self.precision, self.feature_dtype)
            self.store.save(Group(heads.first, heads.digests, *facts, stats))
        return stats


class HeadGroup:
    """Copies of the heads of consecutive checkpoints that share their features."""

    def __init__(self, first: int, features: Features) -> None:
        self.first, self.features = first, features
        self.digests: list[str] = []
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []

    def add(self, head: torch.nn.Linear, name: str) -> None:
        """Copy the weights that ``head`` has now; ``name`` is the digest of the checkpoint."""
        # Features that do not fit on the model's GPU lie in main memory, and are streamed to it.
        device = self.features.features.device if not head.weight.is_cuda else head.weight.device
        self._weights.append(head.weight.detach().to(device, copy=True))
        if head.bias is not None:
            self._biases.append(head.bias.detach().to(device, copy=True))
        self.digests.append(name)

    def full(self) -> bool:
        """Tell whether one more head would make the stack too large."""
        weight = self._weights[0]
        return (len(self._weights) + 1) * weight.numel() * weight.element_size() > _HEADS_BYTES

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """(C, D) and (C,) of a single head, or (K, C, D) and (K, C)."""
        if len(self._weights) == 1:
            return self._weights[0], self._biases[0] if self._biases else None
        return torch.stack(self._weights), torch.stack(self._biases) if self._biases else None


def with_scores(stats: PartStats, formula: str, ids: Tensor | None) -> list[dict[str, Tensor]]:
    """Statistics of each head with its ``score``, computed from the statistics alone."""
    samples = stats[0]["alignment"].shape[0]
    parts: list[tuple[int, Any]] = [(0, slice(None))]
    if ids is not None:
        parts = list(split_parts(ids, samples))
    result = []
    for count in stats.counts.values():
        check_count(formula, count)
    for k, fields in enumerate(stats):
        scores = torch.empty_like(fields["alignment"])
        for part, rows in parts:
            scores[rows] = formula_score(
                formula,
                fields["alignment"][rows],
                fields["grad_sqnorm"][rows],
                torch.tensor(stats.mean_grad_sqnorm[part][k : k + 1], dtype=torch.float64),
                torch.tensor(stats.counts[part]),
            )
        result.append({**fields, "score": scores})
    return result
