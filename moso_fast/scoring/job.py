"""What every scoring job shares: the data, their parts, checkpoints, and results to resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.formulas import check_count
from ..core.labels import counts
from ..sources.checkpoints.weights import ModelWeights
from ..sources.data.batches import (
    SampleBatches,
    batch_count,
    known_labels,
    make_loader,
    sample_count,
)
from ..sources.data.digest import inputs_digest
from ..util.progress import progress_bar
from ..version import __version__
from .checkpoints import CheckpointStream
from .head.shift import LabelShift
from .partition import check_part_sizes, describe_partition, partition_digest, resolve_partition
from .parts import PartStats
from .provenance import recorded
from .resume import Group, ResultStore
from .settings import Call, ScoredModel, Settings


class Job:
    """One call of the scorer: reads checkpoints one by one; a subclass scores them.

    Only one checkpoint's weights are in memory at a time, besides the statistics. What data set,
    partition and checkpoints show to be wrong before a forward pass is refused here.

    Attributes
    ----------
    ids
        (N,) the part of every sample; None = one part, or not known yet.
    samples
        N, -1 until it is known.
    precision, feature_dtype
        Of the products, and of what goes into them, once something was scored.
    """

    passes = 1  # over the data, for one checkpoint

    def __init__(self, model: ScoredModel, settings: Settings, call: Call) -> None:
        self.model, self.settings, self.call = model, settings, call
        self.data = SampleBatches(
            make_loader(call.data, settings.batch_size),
            model.network,
            settings.columns,
            settings.ignore_index,
            settings.dtype,
        )
        self.loader = self.data.loader
        self.weights = ModelWeights(model.network, model.head, settings.device, settings.dtype)
        self.ids: Tensor | None = None
        self.samples = -1
        count = sample_count(self.loader)
        if count is not None and not self.data.may_be_packed():
            self._know_samples(count)
            self.data.by_row = call.partition is not None or call.index is not None
        labels = known_labels(self.loader)
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            self._check_counted(counts(labels, settings.ignore_index))
        self.parameters = self._in_scope()
        self.checkpoints = CheckpointStream(model, self.parameters, self.weights, call)
        self.precision = self.feature_dtype = self._labels = ""
        self.shift = LabelShift(model.network, settings.shift_labels, settings.ignore_index)
        self.store: ResultStore | None = None

    def run(self) -> list[PartStats]:
        """Statistics of all checkpoints, in order: one `PartStats` for each group."""
        if self.call.resume is not None:
            self.store = ResultStore(self.call.resume, self._fingerprint())
        batches, count = batch_count(self.loader), self.checkpoints.count
        known = batches is not None and count is not None
        total = batches * count * self.passes if known else None  # type: ignore[operator]
        with progress_bar("scoring", total, self.settings.progress) as on_batch:
            return self._run(on_batch)

    def warn_if_noise(self, groups: list[PartStats]) -> None:
        """Warn where the scores are largely rounding; sums in full precision never are."""

    def describe(self) -> dict[str, Any]:
        """Say for the record what was scored, once it was; a subclass adds what it knows."""
        return {
            "features": self.feature_dtype,
            "shift_labels": self.shift.describe(),
            "index": self._index_source(),
        }

    def describe_partition(self) -> str:
        """Return the partition in words, with the digest of its ids."""
        return describe_partition(self.ids, self.call.partition, self.call.seed)

    def table_index(self) -> Tensor:
        """(N,) int64 numbers of the samples: as the caller gave them, the data, or 0..N-1."""
        own = self._brought_index() if self.call.index is None else self.call.index
        if own is not None and len(own) != self.samples:
            raise ValueError(
                f"data: {self.samples} samples bring an index of {len(own)}; give index= instead"
            )
        return torch.arange(self.samples, device="cpu") if own is None else own

    def _run(self, on_batch: Callable[[], None]) -> list[PartStats]:
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Collect the settings of the subclass that decide the statistics."""
        raise NotImplementedError

    def _in_scope(self) -> Mapping[str, nn.Parameter]:
        """Parameters whose gradients count, by name, where there is no head."""
        return {}

    def _brought_index(self) -> Tensor | None:
        index = self.data.read_index()
        if index is None and self.store is not None:
            index = self.store.load_index()
        return index

    def _index_source(self) -> str:
        """Return where the index of the table is from, in words."""
        if self.call.index is not None:
            return "given"
        return "place in the data" if self._brought_index() is None else "brought by the data"

    def _know_samples(self, count: int) -> None:
        if self.samples == count:
            return
        self.samples = count
        self.ids = resolve_partition(self.call.partition, count, self.call.seed)
        index = self.call.index
        if index is not None and len(index) != count:
            raise ValueError(f"index must have one entry per sample, {count}, got {len(index)}")

    def _check_counted(self, counted: Tensor) -> None:
        check_count(self.call.formula, int(counted.sum()))
        if self.ids is not None:
            check_part_sizes(self.ids, counted.cpu())

    def _know_labels(self, labels: str) -> None:
        assert self.store is not None
        if self._labels and labels != self._labels:
            raise self._other_run("the labels of the data set differ from those that were scored")
        self._labels = labels
        index = self.data.read_index()
        if index is not None:
            self.store.save_index(index)

    def _load(self, first: int) -> Group | None:
        group = None if self.store is None else self.store.load(first)
        if group is not None:
            self._know_samples(group.stats[0]["alignment"].shape[0])
            self._know_labels(group.labels)
            self.precision, self.feature_dtype = group.precision, group.feature_dtype
            self.shift.restore(group.shift)
        return group

    def _save(self, first: int, digests: list[str], stats: PartStats, notes: str = "") -> None:
        """Keep the statistics of a group of checkpoints that begins with number ``first``."""
        if self.store is None:
            return
        facts = (self._labels, self.precision, self.feature_dtype, self.shift.stored(), notes)
        self.store.save(Group(first, digests, *facts, stats))

    def _check_digest(self, stored: Group, k: int, name: str) -> None:
        if stored.digests[k - stored.first] != name:
            raise self._other_run(
                f"{self.checkpoints.name(k)} has other weights than the one scored there"
            )

    def _check_end(self, stored: Group | None) -> None:
        given = len(self.checkpoints.rates)
        if self.store is None:
            return
        if self.store.beyond(given) or (stored is not None and stored.end > given):
            raise self._other_run(f"it holds more checkpoints than the {given} given")

    def _other_run(self, why: str) -> ValueError:
        assert self.store is not None
        return ValueError(f"resume: {self.store.folder} belongs to a different run: {why}")

    def _fingerprint(self) -> dict[str, Any]:
        """Collect what decides the statistics, except weights and labels."""
        settings, call = self.settings, self.call
        partition = partition_digest(self.ids)
        if self.samples < 0 and call.partition is not None:
            partition = f"{call.partition!r}, seed {call.seed}"
        return {
            "moso_fast": __version__,
            "samples": None if self.samples < 0 else self.samples,
            **recorded(settings),
            "shift_labels": settings.shift_labels,
            "inputs": inputs_digest(self.loader),
            "dtype": None if settings.dtype is None else str(settings.dtype),
            **self._facts(),
            "partition": partition,
            "model": {name: list(shape) for name, shape in self.weights.shapes().items()},
        }
