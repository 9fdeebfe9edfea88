"""Plain PyTorch in the place of the Triton kernels: what each is documented to equal, in float64.

With it the regimes of the Triton backend run in any process, without Triton's interpreter. Every
call is noted with its arguments; what a search for tiles is asked is noted too, and answered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moso_fast.backends.common import bad_targets
from moso_fast.backends.triton import products
from moso_fast.backends.triton.regimes import few_classes as few_classes_regime
from moso_fast.backends.triton.regimes import row_tiles as row_tiles_regime
from moso_fast.core.losses import RowStatistics, row_statistics
from moso_fast.core.status import STATUS_FEATURE, STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET


class PlainKernels:
    """Kernels in place, calls by name in their order, and searches for tiles."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from moso_fast.kernels import few_classes, gradient_sum, residual, row_norms, row_tiles
        from moso_fast.kernels import stacked_alignment as stacked
        from moso_fast.kernels import stored_alignment as stored

        self.calls: list[tuple[str, SimpleNamespace]] = []
        self.searches: list[SimpleNamespace] = []
        for module, kernel in (
            (row_norms, row_norms_), (row_norms, row_dots_), (row_norms, column_sums_),
            (residual, residual_rows_), (gradient_sum, gradient_sum_),
            (stored, stored_alignment_), (stacked, stacked_alignment_), (row_tiles, row_tiles_),
            (few_classes, few_classes_first_), (few_classes, few_classes_second_),
        ):  # fmt: skip
            name = kernel.__name__.rstrip("_")
            patch.setattr(module, name, self._noted(name, kernel, getattr(module, name)))
        for regime in (products, few_classes_regime, row_tiles_regime):
            patch.setattr(regime, "tile_for", self._search)

    def _noted(self, name: str, kernel: Any, original: Any) -> Callable[..., Any]:
        # A call that the kernel itself would not take is none here either.
        signature = inspect.signature(original)

        def call(*given: Any, **more: Any) -> Any:
            bound = signature.bind(*given, **more)
            bound.apply_defaults()
            noted = SimpleNamespace(**bound.arguments)
            self.calls.append((name, noted))
            noted.returned = kernel(noted)
            return noted.returned

        return call

    def _search(self, device: Any, key: str, candidates: Any, default: Any, launch: Any) -> Any:
        asked = {"device": device, "key": key, "candidates": list(candidates)}
        self.searches.append(SimpleNamespace(**asked, default=default, launch=launch))
        return default

    def of(self, name: str) -> list[SimpleNamespace]:
        """The arguments of all calls of one kernel."""
        return [arguments for called, arguments in self.calls if called == name]


def _note(status: Tensor, slot: int, bad: Tensor, first_row: int) -> None:
    if bool(bad.any()):
        status[slot] = min(int(status[slot]), first_row + int(bad.nonzero()[0]))


def _rounds(features: Tensor, precision: str) -> bool:
    return features.dtype == torch.bfloat16 and precision == "medium"


def _norms(features: Tensor, counted: Tensor, out: Any, call: Any) -> Tensor:
    """Write norms, report or leave out rows that are not finite; return the mask of finite ones."""
    finite = features.isfinite().all(1)
    norms = features.double().square().sum(1)
    out.copy_(torch.where(finite, norms, 0))
    if call.exclude_nonfinite:
        counted &= finite
    else:
        _note(call.status, STATUS_FEATURE, counted & ~finite, call.first_row)
    return finite


def row_norms_(call: Any) -> None:
    finite = _norms(call.features, call.counted, call.sqnorm, call)
    if call.dirty is not None and not bool(finite.all()):
        call.dirty.fill_(1)


def _rows(call: Any, logits: Tensor, labels: Tensor, counted: Tensor) -> RowStatistics:
    """Statistics of (n, K, C) logits in float64, and reports of bad labels and of overflows."""
    classes = logits.shape[2]
    if labels.dim() == 1:
        labels = labels.long()
        bad = counted & ((labels < 0) | (labels >= classes))
        _note(call.status, STATUS_LABEL, bad, call.first_row)
        targets = torch.where(counted & ~bad, labels, 0)
    else:
        targets = labels.double()
        job: Any = SimpleNamespace(loss=call.loss)
        _note(call.status, STATUS_TARGET, bad_targets(job, targets), call.first_row)
    weights = None if call.sample_weight is None else call.sample_weight.double()
    stats = row_statistics(
        logits, targets, loss=call.loss, label_smoothing=call.label_smoothing, sample_weight=weights
    )
    seen = (stats.loss + stats.residual_sqnorm).float()
    _note(call.status, STATUS_LOGITS, counted & ~seen.isfinite().all(1), call.first_row)
    for name in ("loss", "residual_sqnorm", "margin", "entropy"):
        getattr(call.out, name).copy_(getattr(stats, name).T)
    return stats._replace(residual=stats.residual.masked_fill(~counted[:, None, None], 0.0))


def _places(labels: Tensor, counted: Tensor, z: Tensor) -> Tensor:
    """Where the label's entry of (n, K, C) lies; somewhere, of rows that have none."""
    return (
        torch.where(counted, labels, 0)
        .long()
        .clamp(0, z.shape[2] - 1)[:, None, None]
        .expand(-1, z.shape[1], 1)
    )


def residual_rows_(call: Any) -> None:
    rows = len(call.logits)
    z = call.logits.reshape(rows, -1, call.classes).double()
    if call.bias is not None:
        z = z + call.bias.view(1, -1, call.classes)
    counted = call.counted
    if call.labels.dim() == 1:  # what is ignored does not count, by the mask and by the label
        ignored = call.labels.long() == call.ignore_index
        assert not bool((ignored & counted).any())
    stats = _rows(call, z, call.labels, counted)
    if call.softmax is not None:
        top = z.amax(2)
        hole = ~counted
        index = _places(call.labels, counted, z)
        own = stats.residual.gather(2, index)[..., 0]
        log_sum, nan = (z - top[..., None]).exp().sum(2).log(), float("nan")
        state = zip(call.softmax, (top, log_sum, own), (nan, nan, 0.0), strict=True)
        for out, value, filler in state:
            out.copy_(value.masked_fill(hole[:, None], filler).T)
    if call.narrow is None:
        call.logits.copy_(stats.residual.reshape(rows, -1))
        return
    flat, (stored, lost) = stats.residual[:, 0], call.narrow
    stored.zero_()
    stored[:, : call.classes] = flat
    lost.copy_(flat.square().sum(1) - stored.double().square().sum(1))


def gradient_sum_(call: Any) -> Any:
    from moso_fast.kernels.gradient_sum import GradientSum

    r, h = (
        torch.where(call.counted[:, None], m, 0).double() for m in (call.residual, call.features)
    )
    bias = r.sum(0) if call.bias else None
    if _rounds(call.features, call.precision):
        r = r.to(torch.bfloat16).double()
    return GradientSum(r.T @ h, bias)


def column_sums_(call: Any) -> Tensor:
    return call.matrix.double().sum(0)


def _dots(features: Tensor, residual: Tensor, gradient: Tensor, bias: Tensor | None) -> Tensor:
    """<r, G h + g> of every row, (K, n), with residuals (n, K, C) and G (K, C, D)."""
    h, r = features.double(), residual.double()
    dots = torch.einsum("nkc,kcd,nd->kn", r, gradient.double(), h)
    if bias is not None:
        dots += torch.einsum("nkc,kc->kn", r, bias.view(r.shape[1:]).double())
    return dots


def _rounded_loss(residual: Tensor) -> Tensor:
    """What rounding an operand takes from |r|^2: (K, n)."""
    r = residual.double()
    return (r.square() - r * r.to(torch.bfloat16).double()).sum(2).T


def stored_alignment_(call: Any) -> None:
    heads, rows = call.out.shape
    r = call.residual.reshape(rows, heads, -1)
    gradient = call.mean_grad.view(heads, -1, call.features.shape[1])
    dots = _dots(call.features, r, gradient, call.mean_bias_grad)
    if call.self_term is not None:
        norms, count, lost = call.self_term
        dots += (lost if lost is not None else 0 * _rounded_loss(r)) * norms / count
    call.out.copy_(torch.where(call.counted, dots, 0))


def stacked_alignment_(call: Any) -> None:
    heads = call.out.shape[0]
    top, log_sum, own = (value.double().T for value in call.softmax)
    shape = (heads, -1, call.features.shape[1])
    weight, gradient = call.weight.view(shape).double(), call.mean_grad.view(shape)
    z = torch.einsum("nd,kcd->nkc", call.features.double(), weight)
    if call.bias is not None:
        z += call.bias.view(heads, -1)
    residual = (z - top[..., None] - log_sum[..., None]).exp() - call.label_smoothing / z.shape[2]
    if call.sample_weight is not None:
        residual *= call.sample_weight[:, None, None]
    counted = ~top.isnan().any(1)
    index = _places(call.labels, counted, z)
    residual.scatter_(2, index, own[..., None])
    residual = torch.where(counted[:, None, None], residual, 0)
    dots = _dots(call.features, residual, gradient, call.mean_bias_grad)
    call.out.copy_(torch.where(counted, dots, 0))


def row_dots_(call: Any) -> None:
    left = call.left.double() + (0 if call.shift is None else call.shift)
    dots = (left * call.right.double()).sum(1)
    if call.extra is not None:
        dots += call.extra.double().sum(1)
    own = call.own
    dots += own.lost.double() * own.feature_sqnorm / own.count
    call.out.copy_(torch.where(call.counted, dots, 0))


def _first(call: Any) -> tuple[RowStatistics, Tensor]:
    """What a kernel that makes rows whole does: residuals (n, K, C) and clean features."""
    counted = call.out.counted
    counted.fill_(True)
    if call.labels.dim() == 1:
        counted.copy_(call.labels.long() != call.ignore_index)
    finite = _norms(call.features, counted, call.out.feature_sqnorm, call)
    h = torch.where(finite[:, None], call.features, 0).double()
    weight = call.weight if call.weight.dim() == 3 else call.weight[None]
    z = torch.einsum("nd,kcd->nkc", h, weight.double())
    if call.bias is not None:
        z += call.bias.view(z.shape[1:])
    stats = _rows(call, z, call.labels, counted)
    norms = (stats.residual_sqnorm * call.out.feature_sqnorm[:, None]).float()
    _note(call.status, STATUS_LOGITS, counted & ~norms.isfinite().all(1), call.first_row)
    return stats, torch.where(counted[:, None], h, 0)


def row_tiles_(call: Any) -> Any:
    from moso_fast.kernels.row_tiles import RowTiles

    stats = _first(call)[0]
    flat = stats.residual[:, 0]
    bias, lost = flat.sum(0), None
    stored = torch.zeros(len(flat), flat.shape[1] + 8, dtype=torch.float64)
    stored[:, : flat.shape[1]] = flat
    if _rounds(call.features, call.precision):
        stored = stored.to(torch.bfloat16)
        lost = (flat.square().sum(1) - stored.double().square().sum(1)).float()
    return RowTiles(stored if lost is not None else stored.float(), lost, bias)


def few_classes_first_(call: Any) -> Any:
    from moso_fast.kernels.few_classes import GradientSums

    stats, h = _first(call)
    if call.residual is not None:
        call.residual.copy_(stats.residual.flatten(1))
    return GradientSums(torch.einsum("nkc,nd->kcd", stats.residual, h), stats.residual.sum(0))


def few_classes_second_(call: Any) -> None:
    heads, rows = call.out.shape
    source = call.residual
    if isinstance(source, tuple):  # to be made again
        scratch = SimpleNamespace(**source._asdict(), status=torch.full((4,), rows), first_row=0)
        statistics = ("loss", "residual_sqnorm", "margin", "entropy")
        scratch.out = SimpleNamespace(**{name: torch.empty(heads, rows) for name in statistics})
        h = torch.where(call.counted[:, None], call.features, 0).double()
        z = torch.einsum("nd,kcd->nkc", h, source.weight.double())
        if source.bias is not None:
            z += source.bias
        residual = _rows(scratch, z, source.labels, call.counted).residual
    else:
        residual = source.view(rows, heads, -1)
    dots = _dots(call.features, residual, call.mean_grad, call.mean_bias_grad)
    call.out.copy_(torch.where(call.counted, dots, 0))
