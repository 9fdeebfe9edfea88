"""Checks of whole-network results against what must hold, and against one explicit gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import Batch
from .passes import Gradients, Network, explicit_gradients

# Relative to |G| * sum_i |g_i|, the scale of the rounding in sum_i a_i = N |G|^2.
# Models may compute parts in float32 whatever their dtype, as norms of transformers do.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUGH = 5e-2


class SelfCheckError(RuntimeError):
    """A result that differs from what must hold: by rounding, or because a rule is wrong."""


def check_model(model: nn.Module) -> None:
    """Raise ValueError for layers by which the samples of a batch influence each other."""
    for name, module in model.named_modules():
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


class FirstSample:
    """The first sample of a part that counts: its explicit gradient checks norm and alignment."""

    def __init__(self) -> None:
        self.gradient: Gradients | None = None
        self.number = -1

    def take(self, network: Network, chunk: Batch, norms: Tensor, tolerance: float) -> None:
        """Compare the norm of the first sample with its explicit gradient."""
        counted = (~norms.isnan()).nonzero().flatten()
        if self.gradient is not None or not len(counted):
            return
        at = int(counted[0])
        self.number = int(chunk.index[at])
        self.gradient = explicit_gradients(network, chunk.take(slice(at, at + 1)))
        square = sum(float(g.double().square().sum()) for g in self.gradient.values())
        if not abs(square - float(norms[at])) <= tolerance * square + 1e-30:
            raise SelfCheckError(
                f"self-check failed: |g|^2 of sample {self.number} is {float(norms[at]):.9g}, "
                f"by plain autograd {square:.9g}"
            )

    def check_alignment(
        self, tangents: Gradients, alignment: Tensor, index: Tensor, tolerance: float
    ) -> None:
        """Compare the alignment of the same sample with the product of explicit gradients."""
        if self.gradient is None:
            return
        product = size = length = 0.0
        for key, g in self.gradient.items():
            mean = tangents[key].double()
            product += float((g.double() * mean).sum())
            size += float(mean.square().sum())
            length += float(g.double().square().sum())
        found = float(alignment[index == self.number][0])
        if not abs(found - product) <= tolerance * (size * length) ** 0.5 + 1e-30:
            raise SelfCheckError(
                f"self-check failed: the alignment of sample {self.number} is {found:.9g}, by "
                f"plain autograd {product:.9g}"
            )


def check_sum(
    fields: dict[str, Tensor], count: int, squared: float, dtype: torch.dtype, rough: bool
) -> None:
    """Raise SelfCheckError unless sum_i a_i = N |G|^2 to the precision of the passes."""
    alignment, norms = fields["alignment"].nansum(), fields["grad_sqnorm"].sqrt().nansum()
    tolerance = _ROUGH if rough else _TOLERANCE.get(dtype, _ROUGH)
    bound = tolerance * squared**0.5 * float(norms) + 1e-30
    if not abs(float(alignment) - count * squared) <= bound:
        raise SelfCheckError(
            f"self-check failed: the alignments sum to {float(alignment):.9g} but N |G|^2 is "
            f"{count * squared:.9g} (allowed difference {bound:.3g})"
        )
