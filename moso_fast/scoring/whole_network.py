"""The whole network's job: two passes over every part, for one checkpoint after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.formulas import check_count
from ..full.batches import Batch, batches, seeded_views
from ..full.engine import (
    FIELDS,
    FullGradient,
    PartResult,
    choose_parameters,
    only_these_require_grad,
)
from ..full.loss import OutputLoss
from ..full.passes import Network
from ..sources.checkpoints.weights import digest
from ..sources.find_head import unwrapped
from .eval_mode import evaluating
from .job import Job
from .parts import PartStats, split_parts
from .settings import Call, ScoredModel, Settings


class FullJob(Job):
    """Scores checkpoints by the gradients of all parameters in scope."""

    passes = 2

    def __init__(self, model: ScoredModel, settings: Settings, call: Call) -> None:
        super().__init__(model, settings, call)
        if settings.views > 1:
            self.loader = seeded_views(self.loader, settings.views, call.seed)
        loss = OutputLoss(
            settings.loss, settings.label_smoothing, settings.ignore_index, per=settings.per
        )
        network = Network(
            unwrapped(model.network),
            loss,
            self.parameters,
            settings.device or next(iter(self.parameters.values())).device,
            settings.dtype,
            settings.autocast,
        )
        self.engine = FullGradient(network, settings.chunk_size, settings.nonfinite)
        self.precision = "highest"

    def describe(self) -> dict[str, Any]:
        """Say for the record which parameters were scored, and how."""
        total = sum(p.numel() for p in self.parameters.values())
        scope = "all that require grad" if self.settings.scope is None else "chosen by the caller"
        return {
            "parameters": f"{len(self.parameters)} ({total} numbers), {scope}",
            "views": self.settings.views,
            "per": self.settings.per,
            "autocast": self._autocast(),
            **self.engine.describe(),
            **super().describe(),
        }

    def _in_scope(self) -> Mapping[str, nn.Parameter]:
        return choose_parameters(self.model.network, self.settings.scope)

    def _facts(self) -> dict[str, Any]:
        settings, names = self.settings, sorted(self.parameters)
        loss, views = settings.loss, settings.views
        kind = getattr(loss, "__qualname__", type(loss).__name__)
        return {
            **({"loss": f"callable {kind}"} if callable(loss) else {}),
            "gradient": "full",
            "parameters": digest({name: torch.zeros(0, device="cpu") for name in names}),
            "chunk_size": settings.chunk_size,
            "views": f"{views}, seed {self.call.seed}" if views > 1 else "1",
            "autocast": self._autocast(),
            "per": settings.per,
        }

    def _autocast(self) -> str | None:
        dtype = self.engine.network.autocast
        return None if dtype is None else str(dtype)

    def _run(self, on_batch: Callable[[], None]) -> list[PartStats]:
        results: list[PartStats] = []
        for k, (tensors, _) in enumerate(self.checkpoints):
            name = "" if self.store is None else digest(tensors)
            stored = self._load(k)
            if stored is not None:
                self._check_digest(stored, k, name)
                results.append(stored.stats)
                continue
            model = self.model.network
            with (
                self.weights.lent(tensors),
                evaluating(model),
                only_these_require_grad(model, self.parameters.values()),
            ):
                stats = self._score(on_batch)
            results.append(stats)
            self._save(k, [name], stats)
        self._check_end(None)
        return results

    def _score(self, on_batch: Callable[[], None]) -> PartStats:
        """Statistics with the weights that the model has now."""
        if self.samples < 0 and self.call.partition is not None:
            # How the samples fall into parts depends on their number.
            self._know_samples(sum(batch.samples for batch in self._batches(None)))
        parts: list[tuple[int, Tensor | None]] = [(0, None)]
        if self.ids is not None:
            parts = list(split_parts(self.ids, self.samples))
        labels: list[Tensor] = []
        scored: list[tuple[int, PartResult]] = []
        for part, members in parts:
            seen: list[Tensor] = []
            result = self.engine.part(
                lambda members=members, seen=seen: self._batches(members, seen),  # type: ignore[misc]
                on_batch,
                lambda count, part=part: self._check_part(part, count),  # type: ignore[misc]
            )
            labels += seen[: len(seen) // 2]
            scored.append((part, result))
        self._know_samples(sum(len(result.index) for _, result in scored))
        self.feature_dtype = str(next(iter(self.parameters.values())).dtype).removeprefix("torch.")
        if self.store is not None:
            flat = {f"{number:09d}": one for number, one in enumerate(labels)}
            self._know_labels(digest(flat))
        stats = PartStats()
        stats.backend = "torch"
        stats.counts = {part: result.count for part, result in scored}
        stats.mean_grad_sqnorm = {part: [result.mean_grad_sqnorm] for part, result in scored}
        fields = {}
        for name in FIELDS:
            values = scored[0][1].fields[name]
            fields[name] = torch.full((self.samples,), torch.nan, dtype=values.dtype, device="cpu")
            for _, result in scored:
                fields[name][result.index] = result.fields[name]
        stats.append(fields)
        return stats

    def _batches(self, members: Tensor | None, seen: list[Tensor] | None = None) -> Iterable[Batch]:
        for batch in batches(self.loader, members, self.settings.views, self.data, self._ready):
            if seen is not None:
                seen.append(batch.labels)
            yield batch

    def _ready(self, batch: Batch) -> Batch:
        """See to it that samples can be taken out of a batch."""
        network = self.engine.network
        batch = batch.on(network.device, network.dtype)
        if network.loss.loss == "cross_entropy":
            network.loss.shift = self._shifted(batch)
        return self.engine.know(batch)

    def _shifted(self, batch: Batch) -> bool:
        """Decide whether labels are those of the next token, by as many samples as fit.

        Samples whose labels tell nothing leave it to the next ones of the batch.
        """

        def work(chunk: Batch) -> tuple[bool, None]:
            return self.shift.decide(chunk.args, chunk.kwargs, chunk.labels), None

        if self.shift.value is not None or batch.labels.dim() < 2:
            return work(batch)[0]
        found = (shift for _, shift, _ in self.engine.chunks.of(batch, work))
        return next((shift for shift in found if self.shift.value is not None), False)

    def _check_part(self, part: int, count: int) -> None:
        if self.ids is None:
            check_count(self.call.formula, count)
        elif count < 2:
            raise ValueError(
                "partition: every part needs at least 2 samples that are not ignored to be scored "
                f"against its own mean, part {part} has {count}"
            )
