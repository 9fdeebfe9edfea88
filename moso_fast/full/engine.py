"""Whole-network MoSo statistics of a batch at a time, without a gradient per sample.

Two passes over the samples of a part. The first is one forward and one backward pass of the whole
batch: its summed gradient gives the mean gradient G, and rules for each kind of layer (``norms/``)
read |g_i|^2 off the very same backward pass. The second gives the alignment <g_i, G> of all
samples at once: the derivative of the vector of their losses along G, in forward mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.precision import exact_products
from . import explicit
from .batches import Batch
from .checks import FirstSample, SelfCheckError, check_model, check_sum
from .chunks import Chunks
from .methods import Methods
from .passes import Gradients, Network
from .repeat import can_repeat, cannot_repeat, failed_again, in_float64
from .scope import choose_parameters, only_these_require_grad
from .summed import summed

__all__ = ["FullGradient", "PartResult", "choose_parameters", "only_these_require_grad"]

FIELDS = ("alignment", "grad_sqnorm", "loss", "el2n", "margin", "entropy")


@dataclass
class PartResult:
    """Statistics of the samples of one part: name -> (n,) float32 or float64 on the CPU.

    ``index`` (n,) holds their numbers in the data set; ``count`` is N, ``mean_grad_sqnorm`` |G|^2.
    """

    index: Tensor
    fields: dict[str, Tensor]
    count: int
    mean_grad_sqnorm: float


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
        check_model(network.model)
        self.methods = Methods(network)
        self.chunks = Chunks(network.device, chunk_size)
        self.repeats = 0  # parts that were scored in float64 after a self-check failed

    def know(self, batch: Batch) -> Batch:
        """Note in a batch what the first one showed of the inputs: which hold values of all rows.

        Samples can only be taken out of a batch afterwards.
        """
        return self.methods.rows.know_batch(batch)

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
            A self-check failed, in float64, too.
        """
        # Forward passes open the autocast that they need; backward passes must have none.
        with torch.autocast(self.network.device.type, enabled=False), exact_products():
            try:
                return self._part(batches, on_batch, on_count)
            except SelfCheckError as error:
                if not can_repeat(self.network):
                    raise failed_again(error) from None
                return self._repeated(batches, on_count, error)

    def _repeated(
        self,
        batches: Callable[[], Iterable[Batch]],
        on_count: Callable[[int], None],
        error: SelfCheckError,
    ) -> PartResult:
        """Score the part in float64: the checks then tell rounding from a rule that is wrong."""
        try:
            # A device may have no float64, or too little memory for it.
            with in_float64(self.network) as network:
                engine = FullGradient(network, self.chunks.size, self.nonfinite)
                engine.methods.rows.flat = self.methods.rows.flat
                result = engine._part(batches, lambda: None, on_count)
        except SelfCheckError as again:
            raise failed_again(again) from None
        except (RuntimeError, TypeError, MemoryError) as reason:
            raise cannot_repeat(error, reason) from reason
        self.repeats += 1
        if self.repeats == 1:
            warnings.warn(
                "a self-check failed by rounding, so that part of the scores was computed again in "
                f"float64 and passed there; dtype=torch.float64 does that from the start ({error})",
                stacklevel=2,
            )
        fields = {name: values.float() for name, values in result.fields.items()}
        return PartResult(result.index, fields, result.count, result.mean_grad_sqnorm)

    def describe(self) -> dict[str, Any]:
        """Facts for the provenance of a table."""
        repeats = {"repeated_in_float64": f"{self.repeats} parts"} if self.repeats else {}
        return {**self.methods.describe(), **repeats}

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
            moved = self.know(batch.on(network.device, network.dtype))
            for chunk, values, gradients in self.chunks.of(moved, self._first):
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
            methods.rows.know_pairs(kept)
            finite = self._finite(kept)
            if not bool(finite.all()):
                counts[counts.clone()] = finite
                if not bool(finite.any()):
                    return _spread({}, counts), nothing
                kept = kept.take(finite.nonzero().flatten())
            methods.prepare(kept)
            self.chunks.choose(methods.bytes_per_sample)
        gradients, values = summed(network, methods, kept)
        finite = (values["loss"] + values["grad_sqnorm"]).isfinite()
        if not bool(finite.all()):
            self._refuse(kept, finite)
            counts[counts.clone()] = finite
            if not bool(finite.any()):
                return _spread({}, counts), nothing
            gradients, values = summed(
                self.network, self.methods, kept.take(finite.nonzero().flatten())
            )
        return _spread(values, counts), gradients

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
        result = torch.full(losses.shape, torch.nan, dtype=torch.float64, device="cpu")
        start = 0

        def work(chunk: Batch) -> tuple[Tensor, Tensor | None]:
            at = slice(offset + chunk_start, offset + chunk_start + chunk.samples)
            kept = chunk.take(counted[at].nonzero().flatten())
            if not kept.samples:
                return torch.empty(0, dtype=torch.float64, device="cpu"), None
            if self.methods.aligned is None:
                return explicit.dots(self.methods.others, network, kept, tangents).cpu(), None
            found = self.methods.aligned(network, kept, tangents)
            assert found.tangent is not None
            values = network.per_sample(found.tangent, kept).double().cpu()
            rest = (~values.isfinite()).nonzero().flatten()
            if len(rest):
                # Where a derivative is 0 times infinity, backward and forward mode may disagree.
                values[rest] = explicit.dots(
                    explicit.one_by_one, network, kept.take(rest), tangents
                ).cpu()
            return values, network.per_sample(found.loss, kept).double().cpu()

        for batch in batches():
            offset, chunk_start = start, 0
            if offset + batch.samples > len(losses):
                raise _changed("more samples")
            moved = self.know(batch.on(network.device, network.dtype))
            for chunk, values, again in self.chunks.of(moved, work):
                at = torch.arange(
                    offset + chunk_start, offset + chunk_start + chunk.samples, device="cpu"
                )
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

    def _finite(self, kept: Batch) -> Tensor:
        finite = self.network.per_sample(self.methods.rows.losses(kept), kept).isfinite().cpu()
        if not bool(finite.all()):
            self._refuse(kept, finite)
        return finite

    def _refuse(self, kept: Batch, finite: Tensor) -> None:
        if self.nonfinite == "raise":
            raise DataError(
                "the loss or gradient of sample {row} is not finite; it is the first such sample "
                "(nonfinite='exclude' scores the others)",
                row=int(kept.index[int((~finite).nonzero()[0])]),
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
        result[name] = torch.full(counted.shape, torch.nan, dtype=torch.float64, device="cpu")
        if values:
            result[name][counted] = values[name]
    return result


def _changed(what: str) -> ValueError:
    return ValueError(
        f"data: the second pass over the data gives {what} than the first; the transform must be "
        "deterministic (views= scores the mean over augmented views)"
    )
