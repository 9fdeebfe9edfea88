"""What every scoring job shares: checkpoints one by one, parts of the data, results to resume."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.formulas import check_count
from ..core.labels import counts
from ..sources.checkpoints.checkpoint import (
    Checkpoint,
    LoadedCheckpoint,
    iterate,
    read,
    stated_rate,
)
from ..sources.checkpoints.fit import Fitted
from ..sources.checkpoints.rates import ScoredParameters, Stated
from ..sources.checkpoints.rates_together import check_presence, settle
from ..sources.checkpoints.weights import ModelWeights, same_memory
from ..sources.data.batches import (
    SampleBatches,
    batch_count,
    known_labels,
    make_loader,
    sample_count,
)
from ..sources.data.digest import inputs_digest
from ..util.progress import progress_bar
from .head.shift import LabelShift
from .partition import check_part_sizes, partition_digest, resolve_partition
from .parts import PartStats
from .resume import Group, ResultStore

if TYPE_CHECKING:
    from ..scorer import MoSoScorer


class Job:
    """One call of the scorer: reads checkpoints one by one; a subclass scores them.

    Only one checkpoint's weights are in memory at a time, besides the statistics. Arguments as in
    `MoSoScorer.score`; what data set, partition and checkpoints show to be wrong before a forward
    pass is refused here.
    """

    passes = 1  # over the data, for one checkpoint
    store: ResultStore | None = None
    combine = "mean"  # how checkpoints are combined: whether learning rates decide anything
    parameters: Mapping[str, nn.Parameter] = {}  # in scope, where there is no head

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
        if isinstance(checkpoints, (Checkpoint, Mapping, str, os.PathLike)):
            checkpoints = [checkpoints]
        self.scorer, self.checkpoints = scorer, checkpoints
        self.data = SampleBatches(
            make_loader(data, scorer.batch_size),
            scorer.model,
            scorer.columns,
            scorer.options["ignore_index"],
            scorer.dtype,
        )
        self.loader = self.data.loader
        self.formula = formula
        self.partition, self.seed, self.index = partition, seed, index
        self.weights = ModelWeights(scorer.model, head, scorer.device, scorer.dtype)
        self.ids: Tensor | None = None
        self.samples = -1
        count = sample_count(self.loader)
        if count is not None and not self.data.may_be_packed():
            self._know_samples(count)
            self.data.by_row = partition is not None or index is not None
        labels = known_labels(self.loader)
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            self._check_counted(counts(labels, scorer.options["ignore_index"]))
        self._stream = None if checkpoints is None else iterate(checkpoints)
        # A generator may go on training these very tensors before it yields the next ones.
        self._may_change = not isinstance(checkpoints, (list, tuple))
        self._head = head
        self.rates: list[float | None] = []
        self._stated: list[Stated] = []
        self._settled: list[float | None] = []
        self._told: set[str] = set()
        self.described: list[dict[str, Any]] = []
        self.precision = self.feature_dtype = self._labels = ""
        ignored = scorer.options["ignore_index"]
        self.shift = LabelShift(scorer.model, scorer.shift_labels, ignored)

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

    def warn_if_noise(self, groups: list[PartStats]) -> None:
        """Warn where the scores are largely rounding; sums in full precision never are."""

    def _facts(self) -> dict[str, Any]:
        """Collect the settings of the subclass that decide the statistics."""
        raise NotImplementedError

    def _weights_in_order(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Tensors of each checkpoint, and whether they may be overwritten before the next."""
        if self._stream is None:
            self.rates = [None]
            self.described = [
                {"source": "the model as it was given", "lr": None, "step": None},
            ]
            yield self.weights.own(), False
            return
        previous: dict[str, Tensor] = {}
        stream: Iterable[Checkpoint] = self._stream
        if not self._may_change:
            # Every rate is known before the first forward pass, so that none is run in vain.
            stream = list(stream)
            self._stated = [stated_rate(checkpoint) for checkpoint in stream]
            self._settled = settle(self._stated, self._scored_parameters(), self.combine)
        for k, checkpoint in enumerate(stream):
            loaded = read(checkpoint)
            fitted = self.weights.resolve(loaded)
            self._note(loaded, fitted)
            del loaded  # what the optimiser remembers is not kept while the data are scored
            in_memory = isinstance(checkpoint.source, Mapping)
            if in_memory and not self._may_change:
                _warn_if_same(k, fitted.tensors, previous)
                previous = fitted.tensors
            yield fitted.tensors, in_memory and self._may_change
        if self._may_change:
            self.rates = settle(self._stated, self._scored_parameters(), self.combine)
            for facts, rate in zip(self.described, self.rates, strict=True):
                facts["lr"] = rate

    def _scored_parameters(self) -> ScoredParameters:
        """Parameters whose learning rate counts: of the head, or all in scope."""
        model = self.scorer.model
        head = {} if self._head is None else dict(self._head.named_parameters())
        candidates = list((head or self.parameters).values())
        # Of a head with an adapter, the adapter is trained; a model may come all frozen, too.
        trained = [p for p in candidates if p.requires_grad] or candidates
        wanted = {id(p) for p in trained}
        named = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in named.items() if id(p) in wanted}
        what = f"the head {self.scorer.head_name!r}" if head else "the parameters in scope"
        return ScoredParameters(shapes, what, Counter(tuple(p.shape) for p in named.values()))

    def _brought_index(self) -> Tensor | None:
        index = self.data.read_index()
        if index is None and self.store is not None:
            index = self.store.load_index()
        return index

    def index_source(self) -> str:
        """Return where the index of the table is from, in words."""
        if self.index is not None:
            return "given"
        return "place in the data" if self._brought_index() is None else "brought by the data"

    def table_index(self) -> Tensor:
        """(N,) int64 numbers of the samples: as the caller gave them, the data, or 0..N-1."""
        own = self._brought_index() if self.index is None else self.index
        if own is not None and len(own) != self.samples:
            raise ValueError(
                f"data: {self.samples} samples bring an index of {len(own)}; give index= instead"
            )
        return torch.arange(self.samples) if own is None else own

    def _know_samples(self, count: int) -> None:
        if self.samples == count:
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
        index = self.data.read_index()
        if index is not None:
            self.store.save_index(index)

    def _note(self, loaded: LoadedCheckpoint, fitted: Fitted) -> None:
        k = len(self.rates)
        if self._may_change:
            stated = loaded.stated
            self._stated.append(stated)
            # What differs already from the first checkpoint need not wait for the last one.
            first = self._stated[0]
            known = {j: one.any() or one.later is not None for j, one in ((0, first), (k, stated))}
            check_presence(
                {j: 1.0 if one else None for j, one in known.items()},
                {0: first.where, k: stated.where},
            )
            lr = None
            if self.combine == "mean":
                lr = stated.rate(self._scored_parameters())
        else:
            lr = self._settled[k]
        self.rates.append(lr)
        facts = {"source": loaded.description, "lr": lr, "step": loaded.step}
        if fitted.entry:
            facts["entry"] = fitted.entry.rstrip(".")
        self.described.append(facts)
        for note in fitted.notes:
            kind = note.replace(loaded.description, "")
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(note, stacklevel=2)

    def _load(self, first: int) -> Group | None:
        group = None if self.store is None else self.store.load(first)
        if group is not None:
            self._know_samples(group.stats[0]["alignment"].shape[0])
            self._know_labels(group.labels)
            self.precision, self.feature_dtype = group.precision, group.feature_dtype
            self.shift.restore(group.shift)
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
        from .. import __version__

        scorer = self.scorer
        partition = partition_digest(self.ids)
        if self.samples < 0 and self.partition is not None:
            partition = f"{self.partition!r}, seed {self.seed}"
        return {
            "moso_fast": __version__,
            "samples": None if self.samples < 0 else self.samples,
            **scorer.options,
            "shift_labels": scorer.shift_labels,
            "inputs": inputs_digest(self.loader),
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
