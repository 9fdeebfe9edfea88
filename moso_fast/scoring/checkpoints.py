"""The checkpoints of one call, read one by one: their weights, and the learning rate of each."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

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
from .settings import Call, ScoredModel


class CheckpointStream:
    """Goes through the checkpoints of a call; only the weights of one are in memory at a time.

    Parameters
    ----------
    model
        What is scored.
    parameters
        Those in scope, by name, where there is no head.
    weights
        The model's own, into which those of the checkpoints are fitted.
    call
        Which checkpoints, and how they are combined: whether learning rates decide anything.

    Attributes
    ----------
    rates
        Learning rate of each checkpoint that was read; None for all where none states one.
    described
        What the table says of each of them.

    Raises
    ------
    TypeError, ValueError
        No iterable of checkpoints, or one in which something else is seen to stand.
    """

    def __init__(
        self,
        model: ScoredModel,
        parameters: Mapping[str, nn.Parameter],
        weights: ModelWeights,
        call: Call,
    ) -> None:
        given = call.checkpoints
        if isinstance(given, (Checkpoint, Mapping, str, os.PathLike)):
            given = [given]
        self._model, self._parameters, self._weights = model, parameters, weights
        self._combine = call.combine
        self._stream = None if given is None else iterate(given)
        # A generator may go on training these very tensors before it yields the next ones.
        self._may_change = not isinstance(given, (list, tuple))
        #: How many there are, None where only reading them tells.
        self.count: int | None = 1 if given is None else None
        if isinstance(given, (list, tuple)):
            self.count = len(given)
        self.rates: list[float | None] = []
        self.described: list[dict[str, Any]] = []
        self._stated: list[Stated] = []
        self._settled: list[float | None] = []
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Yield the tensors of each, and whether they may be overwritten before the next."""
        if self._stream is None:
            self.rates = [None]
            self.described = [
                {"source": "the model as it was given", "lr": None, "step": None},
            ]
            yield self._weights.own(), False
            return
        previous: dict[str, Tensor] = {}
        stream: Iterable[Checkpoint] = self._stream
        if not self._may_change:
            # Every rate is known before the first forward pass, so that none is run in vain.
            stream = list(stream)
            self._stated = [stated_rate(checkpoint) for checkpoint in stream]
            self._settled = settle(self._stated, self._scored_parameters(), self._combine)
        for k, checkpoint in enumerate(stream):
            loaded = read(checkpoint)
            fitted = self._weights.resolve(loaded)
            self._note(loaded, fitted)
            del loaded  # what the optimiser remembers is not kept while the data are scored
            in_memory = isinstance(checkpoint.source, Mapping)
            if in_memory and not self._may_change:
                _warn_if_same(k, fitted.tensors, previous)
                previous = fitted.tensors
            yield fitted.tensors, in_memory and self._may_change
        if self._may_change:
            self.rates = settle(self._stated, self._scored_parameters(), self._combine)
            for facts, rate in zip(self.described, self.rates, strict=True):
                facts["lr"] = rate

    def name(self, k: int) -> str:
        """Return what messages call checkpoint ``k``, which was read."""
        return f"checkpoint {k} ({self.described[k]['source']})"

    def _scored_parameters(self) -> ScoredParameters:
        """Parameters whose learning rate counts: of the head, or all in scope."""
        head = {} if self._model.head is None else dict(self._model.head.named_parameters())
        candidates = list((head or self._parameters).values())
        # Of a head with an adapter, the adapter is trained; a model may come all frozen, too.
        trained = [p for p in candidates if p.requires_grad] or candidates
        wanted = {id(p) for p in trained}
        named = dict(self._model.network.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in named.items() if id(p) in wanted}
        what = f"the head {self._model.head_name!r}" if head else "the parameters in scope"
        return ScoredParameters(shapes, what, Counter(tuple(p.shape) for p in named.values()))

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
            if self._combine == "mean":
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


def _warn_if_same(k: int, tensors: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> None:
    if previous and all(same_memory(t, previous[name]) for name, t in tensors.items()):
        warnings.warn(
            f"checkpoints {k - 1} and {k} are the same tensors: state_dict() does not copy, so "
            "record copy.deepcopy(model.state_dict()) during training",
            stacklevel=2,
        )
