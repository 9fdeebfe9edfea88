"""What every scoring job shares: checkpoints one by one, parts of the data, results to resume."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._batches import batch_count, known_labels, make_loader, sample_count
from ._progress import progress_bar
from ._resume import Group, ResultStore
from ._weights import ModelWeights, same_memory
from .checkpoints import LoadedCheckpoint, check_same_presence, iterate, read
from .formulas import check_count
from .partition import check_part_sizes, partition_digest, resolve_partition
from .parts import PartStats

if TYPE_CHECKING:
    from .scorer import MoSoScorer


class Job:
    """One call of the scorer: reads checkpoints one by one; a subclass scores them.

    Only one checkpoint's weights are in memory at a time, besides the statistics. Arguments as in
    `MoSoScorer.score`; what data set, partition and checkpoints show to be wrong before a forward
    pass is refused here.
    """

    passes = 1  # over the data, for one checkpoint
    store: ResultStore | None = None

    def __init__(
        self,
        scorer: MoSoScorer,
        head: nn.Module | None,
        data: Any,
        checkpoints: Any,
        formula: str,
        partition: Any,
        seed: int,
        index: Tensor | None,
    ) -> None:
        self.scorer, self.checkpoints = scorer, checkpoints
        self.loader = make_loader(data, scorer.batch_size)
        self.formula = formula
        self.partition, self.seed, self.index = partition, seed, index
        self.weights = ModelWeights(scorer.model, head, scorer.device, scorer.dtype)
        self.ids: Tensor | None = None
        self.samples = -1
        count = sample_count(self.loader)
        if count is not None:
            self._know_samples(count)
        labels = known_labels(data)
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            self._check_counted(labels != scorer.options["ignore_index"])
        self._stream = None if checkpoints is None else iterate(checkpoints)
        # A generator may go on training these very tensors before it yields the next ones.
        self._may_change = not isinstance(checkpoints, (list, tuple))
        self.rates: list[float | None] = []
        self.described: list[dict[str, Any]] = []
        self.precision = self.feature_dtype = self._labels = ""

    def resume(self, folder: str | os.PathLike[str] | None) -> None:
        """Keep finished checkpoints in ``folder``, and take up those that are there."""
        self.store = None if folder is None else ResultStore(folder, self._fingerprint())

    def run(self) -> list[PartStats]:
        """Statistics of all checkpoints, in order: one `PartStats` for each group."""
        batches = batch_count(self.loader)
        count = 1 if self.checkpoints is None else None
        if isinstance(self.checkpoints, (list, tuple)):
            count = len(self.checkpoints)
        known = batches is not None and count is not None
        total = batches * count * self.passes if known else None  # type: ignore[operator]
        with progress_bar("scoring", total, self.scorer.progress) as on_batch:
            return self._run(on_batch)

    def _run(self, on_batch: Callable[[], None]) -> list[PartStats]:
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Collect the settings of the subclass that decide the statistics."""
        raise NotImplementedError

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
            "shift_labels": scorer.shift,
            "dtype": None if scorer.dtype is None else str(scorer.dtype),
            **self._facts(),
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


def _warn_if_same(k: int, tensors: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> None:
    if previous and all(same_memory(t, previous[name]) for name, t in tensors.items()):
        warnings.warn(
            f"checkpoints {k - 1} and {k} are the same tensors: state_dict() does not copy, so "
            "record copy.deepcopy(model.state_dict()) during training",
            stacklevel=2,
        )
