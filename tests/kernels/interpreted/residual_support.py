"""Guarded buffers, a runner and float64 references for the residual kernels.

The references are PyTorch's own losses under autograd in float64, or one line of algebra: no
formula is shared with the kernels or with moso_fast.losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moso_fast.kernels.residual import NarrowResiduals, RowOutputs, residual_rows
from torch import Tensor

from moso_fast.core.status import STATUS_SLOTS

GUARD = 96
SENTINEL = 12345.75
FIELDS = ("residual", *RowOutputs._fields)


class Guarded:
    """A strided (rows, columns) view into a buffer whose every other entry is watched."""

    def __init__(
        self,
        rows: int,
        columns: int,
        stride: int,
        offset: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        length = 2 * GUARD + offset + rows * stride
        self.buffer = torch.full((length,), SENTINEL, dtype=dtype)
        self.view = self.buffer.as_strided((rows, columns), (stride, 1), GUARD + offset)

    def intact(self) -> bool:
        """Whether nothing outside the view has changed."""
        rest = self.buffer.clone()
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(
            SENTINEL
        )
        return bool((rest == rest[0]).all())  # rest[0] lies in front of everything


@dataclass
class Result:
    """What a launch left behind: residual (n, K, C), the rest (K, n), status as a list.

    ``narrow`` (n, M) and ``lost`` (n,), where residuals went to a matrix of their own.
    """

    residual: Tensor
    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor
    status: list[int]
    narrow: Tensor | None = None
    lost: Tensor | None = None


def launch(
    logits: Tensor,
    labels: Tensor,
    *,
    padding: int = 0,
    offset: int = 0,
    status: Tensor | None = None,
    columns: int | None = None,
    **options: object,
) -> Result:
    """Run the kernel on logits (n, K, C) in guarded, NaN-filled buffers; check the guards.

    ``padding`` unused columns lie between rows, ``offset`` elements shift the first one. With
    ``columns`` residuals go to a matrix of so many bfloat16 columns, and the logits must stay.
    """
    rows, heads, classes = logits.shape
    width = heads * classes
    buffer = Guarded(rows, width, width + padding, offset)
    buffer.view.copy_(logits.reshape(rows, width))
    outputs = [Guarded(heads, rows, rows + padding, offset) for _ in RowOutputs._fields]
    for output in outputs:
        output.view.fill_(float("nan"))
    apart: list[Guarded] = []
    if columns is not None:
        apart = [Guarded(rows, columns, columns, dtype=torch.bfloat16), Guarded(1, rows, rows)]
        for output in apart:
            output.view.fill_(float("nan"))
        options["narrow"] = NarrowResiduals(apart[0].view, apart[1].view[0])
    inputs = [labels, *(options.get(name) for name in ("sample_weight", "counted", "bias"))]
    before = [None if value is None else value.clone() for value in inputs]
    if status is None:
        status = torch.full((STATUS_SLOTS,), rows, dtype=torch.int64)
    residual_rows(
        buffer.view,
        labels,
        classes=classes,
        out=RowOutputs(*(output.view for output in outputs)),
        status=status,
        **options,
    )
    for given, copy in zip(inputs, before, strict=True):
        assert given is None or torch.equal(given.view(torch.uint8), copy.view(torch.uint8))
    assert all(output.intact() for output in [buffer, *outputs, *apart]), "wrote outside an output"
    statistics = [output.view.clone() for output in outputs]
    residual = buffer.view.clone().reshape(rows, heads, classes)
    if columns is None:
        return Result(residual, *statistics, status.tolist())
    same = residual.view(torch.int32) == logits.contiguous().view(torch.int32)
    assert bool(same.all()), "wrote over the logits"
    narrow, lost = apart[0].view.clone(), apart[1].view[0].clone()
    residual = narrow[:, None, :classes].float()
    return Result(residual, *statistics, status.tolist(), narrow, lost)


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """Fields as in Result, by autograd in ``dtype``; NaN statistics where a row does not count."""
    rows, heads, classes = logits.shape
    z = logits.to(dtype).requires_grad_()
    used = torch.ones(rows, dtype=torch.bool) if counted is None else counted.clone()
    if labels.dim() == 1:
        used &= labels != ignore_index
        target = torch.where(used, labels, 0).long()[:, None].expand(rows, heads).reshape(-1)
    else:
        target = labels.to(dtype)[:, None].expand(rows, heads, classes).reshape(-1, classes)
    flat = z.reshape(-1, classes)
    if loss == "cross_entropy":
        each = F.cross_entropy(flat, target, reduction="none", label_smoothing=label_smoothing)
        entropy = torch.distributions.Categorical(logits=flat).entropy()
        hard = target if labels.dim() == 1 else target.argmax(1)
        others = torch.where(F.one_hot(hard, classes).bool(), -torch.inf, flat)
        margin = flat[torch.arange(len(flat)), hard] - others.amax(1)
    elif loss == "binary_cross_entropy":
        each = F.binary_cross_entropy_with_logits(flat, target, reduction="none").sum(1)
        entropy = torch.distributions.Bernoulli(logits=flat).entropy().sum(1)
        margin = (flat * torch.where(target >= 0.5, 1.0, -1.0)).amin(1)
    else:
        each = F.mse_loss(flat, target, reduction="none").sum(1)
        entropy = margin = torch.full_like(each, torch.nan)
    each = each.reshape(rows, heads)
    if sample_weight is not None:
        each = each * sample_weight.to(dtype)[:, None]
    (residual,) = torch.autograd.grad(each.sum(), z)
    residual = torch.where(used[:, None, None], residual, 0)
    fields = {
        "loss": each.detach(),
        "residual_sqnorm": residual.square().sum(-1),
        "margin": margin.detach().reshape(rows, heads),
        "entropy": entropy.detach().reshape(rows, heads),
    }
    fields = {k: torch.where(used[:, None], v, torch.nan).T for k, v in fields.items()}
    return {"residual": residual, **fields}


def assert_close(
    result: Result,
    logits: Tensor,
    labels: Tensor,
    *,
    fields: Sequence[str] = FIELDS,
    **options: object,
) -> None:
    """Compare with float64: at most twice the error of float32 PyTorch, plus a small floor.

    The floor is 4e-7 (a few ulp) of the magnitude of each number, and of the logits where a
    field is a difference of them.
    """
    expected = reference(logits, labels, **options)
    rounded = reference(logits, labels, dtype=torch.float32, **options)
    for name in fields:
        got, exact = getattr(result, name).double(), expected[name]
        assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in the wrong places"
        own = (rounded[name].double() - exact).abs().nan_to_num(0.0)
        scale = exact.abs().nan_to_num(0.0, posinf=0.0).clamp_min(1e-30)
        bound = 2.0 * own.amax() + 4e-7 * torch.maximum(scale, scale.amax() * 0.1)
        error = torch.where(got == exact, 0.0, (got - exact).abs()).nan_to_num(0.0)
        worst = (error / bound).amax() if error.numel() else torch.zeros(())
        assert worst <= 1.0, f"{name}: {worst:.3g} times the allowed error"


def logits_and_ids(
    shape: tuple[int, int, int], generator: torch.Generator, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, classes = shape
    logits = spread * torch.randn(shape, generator=generator)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def probabilities(rows: int, classes: int, generator: torch.Generator) -> torch.Tensor:
    return torch.softmax(2.0 * torch.randn(rows, classes, generator=generator), 1)
