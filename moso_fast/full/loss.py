"""Losses of a network's outputs, row by row, for whole-network gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..core.errors import DataError
from ..core.labels import fit_labels
from ..core.losses import KNOWN, LOSSES, SOFT_LABEL_TOLERANCE, row_statistics


@dataclass
class RowLosses:
    """Per row of the batch: what to differentiate, and the metrics (NaN where undefined).

    The gradient of ``differentiable`` is that of the loss, its value need not be.
    ``residual_sqnorm`` is |dl/dz|^2; ``counted`` tells which rows have a label; ``tangent`` is the
    derivative of the loss where the outputs carry one.
    """

    differentiable: Tensor
    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    counted: Tensor
    tangent: Tensor | None = None

    def first(self, rows: int) -> RowLosses:
        """Those of the first rows."""
        cut: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            cut[field.name] = None if value is None else value[:rows]
        return RowLosses(**cut)


class OutputLoss:
    """The loss of a batch of outputs, by name or as a callable ``(outputs, labels) -> (B,)``.

    Parameters
    ----------
    loss
        ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"`` of the logits (B, C), or
        (B, T, C) with labels (B, T), where a row's loss is that of its counted tokens (see
        ``per``); or a callable that gets the model's output as it is.
    label_smoothing, ignore_index
        As in `torch.nn.functional.cross_entropy`.
    per
        Of a row of tokens: ``"token"``, the mean over those that count, or ``"sample"``, the sum.

    Attributes
    ----------
    shift
        Whether logits at t go with the label at t + 1; False until somebody has found out.
    """

    def __init__(
        self,
        loss: str | Callable[[Any, Any], Tensor],
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        per: str = "token",
    ) -> None:
        self.per = per
        self.loss, self.label_smoothing = loss, label_smoothing
        self.ignore_index, self.shift = ignore_index, False

    def counted(self, labels: Tensor) -> Tensor:
        """(B,) bool: whether a row has a label that counts."""
        if callable(self.loss) or labels.is_floating_point() or self.loss != "cross_entropy":
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        used = labels.long() != self.ignore_index
        if used.dim() == 2 and self.shift:
            used = used[:, 1:]
        return used.reshape(len(labels), -1).any(1)

    def __call__(self, outputs: Any, labels: Tensor) -> RowLosses:
        """Losses of all rows; under forward-mode differentiation also their tangents."""
        if callable(self.loss):
            return self._called(outputs, labels)
        logits = find_logits(outputs)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        tokens = logits.dim() == 3
        if not tokens:
            labels = fit_labels(labels, logits.shape[-1], str(self.loss))
        if tokens and self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1])
        targets, used = self._targets(flat, labels, tokens)
        primal, tangent = forward_ad.unpack_dual(flat)
        with torch.no_grad():
            stats = row_statistics(
                primal.detach()[:, None],
                targets,
                loss=str(self.loss),
                label_smoothing=self.label_smoothing,
            )
            residual = torch.where(used[:, None], stats.residual[:, 0], 0.0)
            values = [
                torch.where(used, v[:, 0], 0.0)
                for v in (stats.loss, stats.residual_sqnorm, stats.margin, stats.entropy)
            ]
        rows = len(logits)

        def per_row(value: Tensor) -> Tensor:
            return value.reshape(rows, -1).sum(1) if tokens else value

        counts = per_row(used.to(flat.dtype))
        loss, sqnorm, margin, entropy = map(per_row, values)
        mean = 1.0 / counts.clamp_min(1) if tokens and self.per == "token" else 1.0
        return RowLosses(
            # Its gradient is the residual, which is exact also where the loss rounds to nothing.
            differentiable=per_row((primal * residual).sum(1)) * mean,
            loss=loss * mean,
            residual_sqnorm=sqnorm * mean**2,
            margin=margin / counts,
            entropy=entropy / counts,
            counted=counts > 0,
            tangent=None if tangent is None else per_row((tangent * residual).sum(1)) * mean,
        )

    def _called(self, outputs: Any, labels: Tensor) -> RowLosses:
        assert callable(self.loss)
        loss = self.loss(outputs, labels)
        if not isinstance(loss, Tensor) or loss.shape != labels.shape[:1]:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"loss must return one value a sample, a tensor of shape ({len(labels)},) "
                f"(reduction='none'), got {got}"
            )
        primal, tangent = forward_ad.unpack_dual(loss)
        unknown = torch.full_like(primal.detach(), float("nan"))
        counted = torch.ones_like(unknown, dtype=torch.bool)
        value = primal.detach()
        return RowLosses(primal, value, unknown, unknown, unknown, counted, tangent)

    def _targets(self, logits: Tensor, labels: Tensor, tokens: bool) -> tuple[Tensor, Tensor]:
        """Labels as `row_statistics` takes them, and which of them count."""
        rows, classes = logits.shape
        every = torch.ones(rows, dtype=torch.bool, device=logits.device)
        if self.loss == "cross_entropy" and not labels.is_floating_point():
            ids = labels.reshape(-1).long()
            if len(ids) != rows:
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} do not go with {rows} rows of logits"
                )
            used = ids != self.ignore_index
            return torch.where(used, ids, 0), used
        targets = labels.reshape(-1, labels.shape[-1]) if labels.dim() > 1 else labels[:, None]
        if tuple(targets.shape) != (rows, classes):
            raise ValueError(
                f"labels must have shape {(rows, classes)} for loss={self.loss!r}, "
                f"got {tuple(labels.shape)}"
            )
        return targets.to(logits.dtype), every

    def check(self, outputs: Any, labels: Tensor, index: Tensor, views: int) -> None:
        """Raise ValueError for the first label outside the classes, by its sample's number."""
        if callable(self.loss):
            return
        logits = find_logits(outputs)
        classes = logits.shape[-1]
        if logits.dim() == 2:
            labels = fit_labels(labels, classes, str(self.loss))
        if self.loss == "cross_entropy" and not labels.is_floating_point():
            ids = labels.long()
            if ids.dim() == 2 and self.shift:
                ids = ids[:, 1:]
            wrong = (ids != self.ignore_index) & ((ids < 0) | (ids >= classes))
            if bool(wrong.any()):
                row = int(wrong.reshape(len(ids), -1).any(1).nonzero()[0])
                raise DataError(
                    f"labels[{{row}}] is {{value}}, outside [0, {classes}) "
                    f"and not ignore_index ({self.ignore_index})",
                    row=int(index[row // views]),
                    value=int(ids[row][wrong[row]].flatten()[0]),
                )
            return
        loss = KNOWN[self.loss]
        if self.loss == "mse" or labels.dim() < 2:
            return
        wrong = loss.wrong(labels).reshape(len(labels), -1).any(1)
        if loss.sum_to_one:
            total = labels.double().sum(-1).reshape(len(labels), -1)
            wrong |= ((total - 1).abs() > SOFT_LABEL_TOLERANCE).any(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(
                "labels[{row}] must hold "
                + ("probabilities" if loss.most == 1 else f"targets of at least {loss.least:g}")
                + (" that sum to 1" if loss.sum_to_one else ""),
                row=int(index[row // views]),
            )


def find_logits(outputs: Any) -> Tensor:
    """Return the logits in what a model returned: a tensor, or ``logits`` of a structure.

    Raises
    ------
    TypeError, ValueError
        No tensor of two or three dimensions.
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model: its output ({type(outputs).__name__}) is no tensor and has no logits; "
            "give loss as a callable (outputs, labels) -> (N,)"
        )
    if found.dim() not in (2, 3):
        raise ValueError(
            f"model: logits must have shape (N, C) or (N, T, C), got {tuple(found.shape)}"
        )
    return found


def check_loss(loss: Any) -> None:
    """Raise ValueError for a name that is no loss."""
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"loss must be a callable or one of {', '.join(LOSSES)}; got {loss!r}")
