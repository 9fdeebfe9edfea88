"""Whole-network MoSo statistics of a batch at a time, without a gradient per sample.

Two passes over the samples of a part. The first is one forward and one backward pass of the whole
batch: its summed gradient gives the mean gradient G, and rules for each kind of layer (``_norms``)
read |g_i|^2 off the very same backward pass. The second gives the alignment <g_i, G> of all
samples at once: the derivative of the vector of their losses along G, in forward mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _per_sample
from ._full_batches import Batch
from ._full_checks import FirstSample, check_sum, out_of_memory
from ._full_passes import Gradients, Network, traced
from ._full_plan import Methods
from ._full_scope import choose_parameters, only_these_require_grad
from ._norms.tape import UnknownCall
from ._precision import exact_products

__all__ = ["FullGradient", "PartResult", "choose_parameters", "only_these_require_grad"]

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")

_CPU_SHARE, _CUDA_SHARE = 0.25, 0.5
# Activations, their gradients, and what the norms of the widest layer take beside.
_COPIES = 4


@dataclass
class PartResult:
    """Statistics of the samples of one part: name -> (n,) float32 or float64 on the CPU.

    ``index`` (n,) holds their numbers in the data set; ``count`` is N, ``mean_grad_sqnorm`` |G|^2.
    """

    index: Tensor
    fields: dict[str, Tensor]
    count: int
    mean_grad_sqnorm: float


class _SmallerChunk(Exception):
    """The chunk size that has just been chosen is less than the chunk at hand."""


class FullGradient:
    """Scores parts of a data set with the weights that the network has now.

    The model must be in eval mode and the parameters in scope the only ones that require grad.

    Parameters
    ----------
    network
        Model, loss and parameters.
    chunk_size
        Samples at a time; None = as many as a share of the memory allows, at most a batch. Halved
        where memory runs out; only the chunk at hand is computed again.
    nonfinite
        ``"raise"``, or ``"exclude"`` for samples whose loss is not finite: they get NaN.
    """

    def __init__(
        self, network: Network, chunk_size: int | None = None, nonfinite: str = "raise"
    ) -> None:
        self.network, self.nonfinite = network, nonfinite
        for name, module in network.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"model: batch norm {name!r} uses the statistics of the batch, so that samples "
                    "influence each other; it needs running statistics (track_running_stats=True)"
                )
            scaled = getattr(module, "scale_grad_by_freq", False)
            if scaled and any(p.requires_grad for p in module.parameters(recurse=False)):
                raise ValueError(
                    f"model: embedding {name!r} divides gradients by how often a token is in the "
                    "batch, so that samples influence each other; set scale_grad_by_freq=False"
                )
        self.methods = Methods(network)
        self.chunk, self._fixed = chunk_size, chunk_size is not None

    def part(
        self,
        batches: Callable[[], Iterable[Batch]],
        on_batch: Callable[[], None] = lambda: None,
        on_count: Callable[[int], None] = lambda count: None,
    ) -> PartResult:
        """Score the samples that ``batches()`` yields against their own mean gradient.

        ``on_batch`` is called after every batch of both passes, ``on_count`` with N between them.

        Raises
        ------
        ValueError
            Labels, outputs or losses that cannot be scored; samples that influence each other;
            batches that differ from the first pass to the second.
        RuntimeError
            A self-check failed.
        """
        # Forward passes open the autocast that they need; backward passes must have none.
        with torch.autocast(self.network.device.type, enabled=False), exact_products():
            return self._part(batches, on_batch, on_count)

    def _part(
        self,
        batches: Callable[[], Iterable[Batch]],
        on_batch: Callable[[], None],
        on_count: Callable[[int], None],
    ) -> PartResult:
        network = self.network
        totals = {
            id(p): torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            for p in network.parameters
        }
        blocks, indices, sample = [], [], FirstSample()
        for batch in batches():
            moved = batch.on(network.device, network.dtype)
            for chunk, values, gradients in self._in_chunks(moved, self._first):
                for p, g in zip(network.parameters, gradients, strict=True):
                    if g is not None:
                        totals[id(p)] += g
                sample.take(network, chunk, values["grad_sqnorm"], self.methods.tolerance)
                blocks.append(values)
                indices.append(chunk.index)
            on_batch()
        if not blocks:
            raise ValueError("data holds no samples")
        index = torch.cat(indices)
        fields = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        counted = ~fields["grad_sqnorm"].isnan()
        count = int(counted.sum())
        on_count(count)
        tangents: Gradients = {}
        squared = 0.0
        for p in network.parameters:
            mean = totals.pop(id(p)).div_(max(count, 1))
            squared += float(mean.square().sum())
            tangents[id(p)] = mean.to(p.dtype)
        fields["alignment"] = self._second(batches, tangents, fields["loss"], counted, on_batch)
        sample.check_alignment(tangents, fields["alignment"], index, self.methods.tolerance)
        first = network.parameters[0].dtype
        check_sum(fields, count, squared, first, rough=self.methods.tolerance > 0.01)
        dtype = torch.float64 if first == torch.float64 else torch.float32
        fields = {name: fields[name].to(dtype) for name in FIELDS}
        return PartResult(index, fields, count, squared)

    def _first(self, chunk: Batch) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Norms, losses and metrics of the samples of a chunk, and their summed gradients."""
        network, methods = self.network, self.methods
        counts = network.loss.counted(chunk.labels).reshape(chunk.samples, -1).all(1).cpu()
        nothing: list[Tensor | None] = [None] * len(network.parameters)
        if not bool(counts.any()):
            return _spread({}, counts), nothing
        kept = chunk.take(counts.nonzero().flatten())
        if not methods.prepared:
            finite = self._finite(kept)
            if not bool(finite.all()):
                counts[counts.clone()] = finite
                if not bool(finite.any()):
                    return _spread({}, counts), nothing
                kept = kept.take(finite.nonzero().flatten())
            methods.prepare(kept)
            self._choose_chunk()
            if self.chunk is not None and chunk.samples > self.chunk:
                raise _SmallerChunk
        gradients, values = self._traced(kept)
        finite = (values["loss"] + values["grad_sqnorm"]).isfinite()
        if not bool(finite.all()):
            self._refuse(kept, finite)
            counts[counts.clone()] = finite
            if not bool(finite.any()):
                return _spread({}, counts), nothing
            gradients, values = self._traced(kept.take(finite.nonzero().flatten()))
        return _spread(values, counts), gradients

    def _traced(self, kept: Batch) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        network, methods = self.network, self.methods
        prepared = False
        while True:
            try:
                losses, gradients, tape = traced(network, methods.plan, kept, methods.expanding)
                break
            except UnknownCall as call:
                # Not seen on the first samples: the first batch of several, or another branch.
                if prepared:
                    for key in call.used:
                        methods.plan.others[key] = "used in a call that few samples make"
                methods.prepare(kept)
                prepared = True
        norms = tape.total()
        if methods.plan.others:
            norms += _per_sample.norms(methods.others, network, kept, list(methods.plan.others))

        def mean(rows: Tensor) -> Tensor:
            return network.per_sample(rows, kept).double().cpu()

        values = {
            "grad_sqnorm": norms.cpu(),
            "loss": mean(losses.loss),
            "el2n": mean(losses.residual_sqnorm.sqrt()),
            "margin": mean(losses.margin),
            "entropy": mean(losses.entropy),
        }
        return gradients, values

    def _second(
        self,
        batches: Callable[[], Iterable[Batch]],
        tangents: Gradients,
        losses: Tensor,
        counted: Tensor,
        on_batch: Callable[[], None],
    ) -> Tensor:
        """Alignments of all samples with the mean gradient, (n,) float64."""
        network = self.network
        result = torch.full(losses.shape, torch.nan, dtype=torch.float64)
        start = 0

        def work(chunk: Batch) -> tuple[Tensor, Tensor | None]:
            at = slice(offset + chunk_start, offset + chunk_start + chunk.samples)
            kept = chunk.take(counted[at].nonzero().flatten())
            if not kept.samples:
                return torch.empty(0, dtype=torch.float64), None
            if self.methods.aligned is None:
                return _per_sample.dots(self.methods.others, network, kept, tangents).cpu(), None
            found = self.methods.aligned(network, kept, tangents)
            assert found.tangent is not None
            values = network.per_sample(found.tangent, kept).double().cpu()
            rest = (~values.isfinite()).nonzero().flatten()
            if len(rest):
                # Where a derivative is 0 times infinity, backward and forward mode may disagree.
                values[rest] = _per_sample.dots(
                    _per_sample.one_by_one, network, kept.take(rest), tangents
                ).cpu()
            return values, network.per_sample(found.loss, kept).double().cpu()

        for batch in batches():
            offset, chunk_start = start, 0
            if offset + batch.samples > len(losses):
                raise _changed("more samples")
            for chunk, values, again in self._in_chunks(
                batch.on(network.device, network.dtype), work
            ):
                at = torch.arange(offset + chunk_start, offset + chunk_start + chunk.samples)
                at = at[counted[at]]
                result[at] = values
                if again is not None:
                    self._check_same(losses[at], again)
                chunk_start += chunk.samples
            start += batch.samples
            on_batch()
        if start != len(losses):
            raise _changed("fewer samples")
        return result

    def _in_chunks(
        self, batch: Batch, work: Callable[[Batch], tuple[Any, Any]]
    ) -> Iterator[tuple[Batch, Any, Any]]:
        """Yield (chunk, *work(chunk)); where memory runs out, chunks become half as large."""
        start = 0
        while start < batch.samples:
            size = min(self.chunk or batch.samples, batch.samples - start)
            chunk = batch.take(slice(start, start + size))
            try:
                done = work(chunk)
            except _SmallerChunk:
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
                done = None
            if done is None:
                self.chunk = (size + 1) // 2
                if batch.labels.is_cuda:
                    torch.cuda.empty_cache()
                continue
            yield chunk, *done
            start += size

    def _choose_chunk(self) -> None:
        """Choose how many samples at a time a share of the memory holds the activations of."""
        if self._fixed or self.chunk is not None or not self.methods.bytes_per_sample:
            return
        device = self.network.device
        if device.type == "cuda":
            budget = _CUDA_SHARE * torch.cuda.mem_get_info(device)[0]
        elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            budget = _CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            budget = float(1 << 31)
        self.chunk = max(1, int(budget / (_COPIES * self.methods.bytes_per_sample)))

    def _finite(self, kept: Batch) -> Tensor:
        with torch.no_grad(), self.network.context():
            outputs = self.network.forward(kept)
            self.network.loss.check(outputs, kept.labels, kept.index, kept.views)
            losses = self.network.losses(outputs, kept)
        finite = self.network.per_sample(losses.loss, kept).isfinite().cpu()
        if not bool(finite.all()):
            self._refuse(kept, finite)
        return finite

    def _refuse(self, kept: Batch, finite: Tensor) -> None:
        if self.nonfinite == "raise":
            row = int(kept.index[int((~finite).nonzero()[0])])
            raise ValueError(
                f"the loss or gradient of sample {row} is not finite; it is the first such sample "
                "(nonfinite='exclude' scores the others)"
            )

    def _check_same(self, before: Tensor, again: Tensor) -> None:
        scale = before.abs().max().clamp_min(1e-3)
        if bool(((before - again).abs() > max(1e-3, self.methods.tolerance) * scale).any()):
            raise _changed("other losses")


def _spread(values: dict[str, Tensor], counted: Tensor) -> dict[str, Tensor]:
    """Values of the samples that count at their places among all; NaN elsewhere."""
    names = [name for name in FIELDS if name != "alignment"]
    result = {}
    for name in names:
        result[name] = torch.full(counted.shape, torch.nan, dtype=torch.float64)
        if values:
            result[name][counted] = values[name]
    return result


def _changed(what: str) -> ValueError:
    return ValueError(
        f"data: the second pass over the data gives {what} than the first; the transform must be "
        "deterministic (views= scores the mean over augmented views)"
    )
