"""One call of the scorer: checkpoints one by one, features once for all heads that share them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._batches import batch_count, known_labels, make_loader, sample_count
from ._progress import progress_bar
from ._resume import Group, ResultStore
from ._weights import ModelWeights, Snapshot, digest, same_memory
from .checkpoints import LoadedCheckpoint, check_same_presence, iterate, read
from .features import FeatureCapture, Features
from .formulas import check_count
from .formulas import score as formula_score
from .partition import check_part_sizes, partition_digest, resolve_partition
from .parts import PartStats, score_parts, split_parts
from .problem import default_precision

if TYPE_CHECKING:
    from .scorer import MoSoScorer

# Heads over the same features are scored together up to this size of their weights.
_HEADS_BYTES = 1 << 30


class ScoringJob:
    """Reads checkpoints one by one and scores them in groups that share their features.

    Only one checkpoint's weights, one cache of features and the heads of one group are in memory
    at a time, besides the statistics. Arguments as in `MoSoScorer.score`; what data set, partition
    and checkpoints show to be wrong before a forward pass is refused here.
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
        self.scorer, self.checkpoints = scorer, checkpoints
        self.loader = make_loader(data, scorer.batch_size)
        self.formula = formula
        self.partition, self.seed, self.index = partition, seed, index
        self.weights = ModelWeights(scorer.model, scorer.head, scorer.device, scorer.dtype)
        self.capture = FeatureCapture(
            scorer.model,
            scorer.head_name,
            scorer.head,
            self.loader,
            cache=scorer.feature_cache,
            shift=scorer.shift,
            ignore_index=scorer.options["ignore_index"],
            device=scorer.device,
            dtype=scorer.dtype,
        )
        self.ids: Tensor | None = None
        self.samples = -1
        count = sample_count(self.loader)
        if count is not None:
            self._know_samples(count)
        labels = known_labels(data)
        if labels is not None and labels.dim() == 1:
            self._check_counted(labels != scorer.options["ignore_index"])
        self._stream = None if checkpoints is None else iterate(checkpoints)
        # A generator may go on training these very tensors before it yields the next ones.
        self._may_change = not isinstance(checkpoints, (list, tuple))
        self.store = None if resume is None else ResultStore(resume, self._fingerprint())
        self.rates: list[float | None] = []
        self.described: list[dict[str, Any]] = []
        self.precision = self.feature_dtype = self._labels = ""

    def run(self) -> list[PartStats]:
        """Statistics of all checkpoints, in order: one `PartStats` for each group."""
        batches = batch_count(self.loader)
        count = 1 if self.checkpoints is None else None
        if isinstance(self.checkpoints, (list, tuple)):
            count = len(self.checkpoints)
        total = None if batches is None or count is None else batches * count
        with progress_bar("scoring", total, self.scorer.progress) as on_batch:
            return self._run(on_batch)

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
                pending.add(self.scorer.head, name)
        if pending is not None:
            results.append(self._finish(pending))
        self._check_end(stored)
        return results

    def _weights_in_order(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Tensors of each checkpoint, and whether they may be overwritten before the next."""
        if self._stream is None:
            self._note(LoadedCheckpoint({}, None, None, "the model as it was given"))
            yield self.weights.own(), False
            return
        previous: dict[str, Tensor] = {}
        for k, checkpoint in enumerate(self._stream):
            loaded = read(checkpoint)
            self._note(loaded)
            tensors = self.weights.resolve(loaded.state, loaded.description)
            in_memory = isinstance(checkpoint.source, Mapping)
            if in_memory and not self._may_change:
                _warn_if_same(k, tensors, previous)
                previous = tensors
            yield tensors, in_memory and self._may_change

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

    def _know_samples(self, count: int) -> None:
        if self.samples >= 0:
            return
        self.samples = count
        self.ids = resolve_partition(self.partition, count, self.seed)
        if self.index is not None and len(self.index) != count:
            raise ValueError(
                f"index must have one entry per sample, {count}, got {len(self.index)}"
            )

    def _check_counted(self, counted: Tensor) -> None:
        check_count(self.formula, int(counted.sum()))
        if self.ids is not None:
            check_part_sizes(self.ids, counted.cpu())

    def _know_labels(self, labels: str) -> None:
        assert self.store is not None
        if self._labels and labels != self._labels:
            raise ValueError(
                f"resume: {self.store.folder} belongs to a different run: "
                "the labels of the data set differ from those that were scored"
            )
        self._labels = labels

    def _note(self, loaded: LoadedCheckpoint) -> None:
        self.rates.append(loaded.lr)
        check_same_presence({0: self.rates[0], len(self.rates) - 1: loaded.lr})
        self.described.append({"source": loaded.description, "lr": loaded.lr, "step": loaded.step})

    def _load(self, first: int) -> Group | None:
        group = None if self.store is None else self.store.load(first)
        if group is not None:
            self._know_samples(group.stats[0]["alignment"].shape[0])
            self._know_labels(group.labels)
            self.precision, self.feature_dtype = group.precision, group.feature_dtype
        return group

    def _check_digest(self, stored: Group, k: int, name: str) -> None:
        assert self.store is not None
        if stored.digests[k - stored.first] != name:
            raise ValueError(
                f"resume: {self.store.folder} belongs to a different run: checkpoint {k} "
                f"({self.described[k]['source']}) has other weights than the one scored there"
            )

    def _check_end(self, stored: Group | None) -> None:
        given = len(self.rates)
        if self.store is None:
            return
        if self.store.beyond(given) or (stored is not None and stored.end > given):
            raise ValueError(
                f"resume: {self.store.folder} belongs to a different run: it holds more "
                f"checkpoints than the {given} given"
            )

    def _fingerprint(self) -> dict[str, Any]:
        """Collect what decides the statistics, except weights and labels."""
        from . import __version__

        scorer = self.scorer
        partition = partition_digest(self.ids)
        if self.samples < 0 and self.partition is not None:
            partition = f"{self.partition!r}, seed {self.seed}"
        return {
            "moso_fast": __version__,
            "samples": None if self.samples < 0 else self.samples,
            **scorer.options,
            "backend": scorer.backend,
            "chunk_size": scorer.chunk_size,
            "head": scorer.head_name,
            "shift_labels": scorer.shift,
            "dtype": None if scorer.dtype is None else str(scorer.dtype),
            "feature_cache": scorer.feature_cache,
            "partition": partition,
            "model": {name: list(shape) for name, shape in self.weights.shapes().items()},
        }

    def describe_partition(self) -> str:
        """Return the partition in words, with the digest of its ids."""
        if self.ids is None:
            return "one part"
        parts = len(torch.unique(self.ids))
        how = f"split by seed {self.seed}" if isinstance(self.partition, int) else "given ids"
        return f"{parts} parts, {how}, digest {partition_digest(self.ids)}"


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


def _warn_if_same(k: int, tensors: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> None:
    if previous and all(same_memory(t, previous[name]) for name, t in tensors.items()):
        warnings.warn(
            f"checkpoints {k - 1} and {k} are the same tensors: state_dict() does not copy, so "
            "record copy.deepcopy(model.state_dict()) during training",
            stacklevel=2,
        )


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
