"""Guarded buffers, a runner and float64 references for the kernels of few classes.

The references are the autograd ones of residual_support.py on logits made in float64.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import residual_support
import torch
from alignment_support import guarded_out
from moso_fast.kernels import few_classes
from moso_fast.kernels.few_classes import few_classes_first, few_classes_second
from moso_fast.kernels.row_arguments import RowOutputs
from residual_support import GUARD, Guarded
from torch import Tensor

from moso_fast.core.status import STATUS_SLOTS

STATISTICS = ("loss", "residual_sqnorm", "margin", "entropy")
FIELDS = (*STATISTICS, "feature_sqnorm", "residual", "grad", "bias")
LOSSES = ("cross_entropy", "soft", "binary_cross_entropy", "mse")


class GuardedMask:
    """A boolean vector in a buffer of bytes whose every other entry is watched."""

    def __init__(self, rows: int) -> None:
        self.buffer = torch.full((2 * GUARD + rows,), 7, dtype=torch.uint8)
        self.view = self.buffer[GUARD : GUARD + rows].view(torch.bool)

    def intact(self) -> bool:
        """Whether nothing outside the vector has changed, and all of it is 0 or 1."""
        inside = self.view.view(torch.uint8)
        rest = torch.cat([self.buffer[:GUARD], self.buffer[GUARD + len(inside) :]])
        return bool((rest == 7).all()) and bool((inside <= 1).all())


def before_a_forbidden_page(values: Tensor) -> Tensor:
    """Copy ``values`` to the end of a page whose successor must not be read: doing so is fatal."""
    page = mmap.PAGESIZE
    size = values.numel() * values.element_size()
    length = -(-size // page) * page
    memory = mmap.mmap(-1, length + page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + length), page, 0) == 0
    last = whole[length - size : length].view(values.dtype).view(values.shape)
    return last.copy_(values)


@dataclass
class Outputs:
    """The outputs of a first pass over n rows, guarded and filled with NaN."""

    rows: RowOutputs
    guards: list[Guarded | GuardedMask]


def guarded_outputs(rows: int, heads: int, padding: int = 0) -> Outputs:
    guards: list[Any] = [Guarded(heads, rows, rows + padding) for _ in STATISTICS]
    guards.append(Guarded(1, rows, rows))
    for guard in guards:
        guard.view.fill_(torch.nan)
    views = [guard.view for guard in guards]
    guards.append(GuardedMask(rows))
    return Outputs(RowOutputs(*views[:4], views[4][0], guards[-1].view), guards)


@contextmanager
def guarded_arguments(module: Any, kernel: str, positions: Sequence[int]) -> Iterator[None]:
    """Put guards around outputs that a launch allocates: its arguments at these positions."""
    given = getattr(module, kernel)

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                passed, watched = list(arguments), []
                for position in positions:
                    value = arguments[position]
                    if value is None:
                        continue
                    guard = Guarded(1, value.numel(), value.numel(), dtype=value.dtype)
                    guard.view.fill_(torch.nan)
                    passed[position] = guard.view.view(value.shape)
                    watched.append((value, guard, passed[position]))
                given[grid](*passed, **options)
                for value, guard, view in watched:
                    assert guard.intact(), "wrote outside an output"
                    value.copy_(view)

            return launch

    setattr(module, kernel, Spy())
    try:
        yield
    finally:
        setattr(module, kernel, given)


def run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    padding: int = 0,
    status: Tensor | None = None,
    keep: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """First pass in guarded buffers: the fields, ``counted`` and ``status`` (a list).

    ``padding``: unused numbers between the heads of the statistics and the rows of the residuals.
    """
    rows, (heads, classes) = features.shape[0], weight.shape[:2]
    out = guarded_outputs(rows, heads, padding)
    columns = heads * classes
    residual = Guarded(rows, columns, columns + padding)
    residual.view.fill_(torch.nan)
    if status is None:
        status = torch.full((STATUS_SLOTS,), rows, dtype=torch.int64)
    inputs = [features, weight, bias, labels, options.get("sample_weight")]
    before = [None if value is None else value.clone() for value in inputs]
    with guarded_arguments(few_classes, "few_classes_first_kernel", (-2, -1)):
        sums = few_classes_first(
            features,
            weight,
            bias,
            labels,
            out=out.rows,
            status=status,
            residual=residual.view if keep else None,
            **options,
        )
    for given, copy in zip(inputs, before, strict=True):
        assert given is None or torch.equal(given.nan_to_num(3.0), copy.nan_to_num(3.0))
    assert all(guard.intact() for guard in [*out.guards, residual]), "wrote outside an output"
    fields = {name: value.clone() for name, value in out.rows._asdict().items()}
    fields["residual"] = residual.view.clone().reshape(rows, heads, classes)
    return {**fields, **sums._asdict(), "status": status.tolist()}


def reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    exclude_nonfinite: bool = False,
    precision: str = "highest",
    **options: Any,
) -> dict[str, Tensor]:
    """Fields as in ``run``, by autograd and plain products in ``dtype``."""
    finite = features.isfinite().all(1)
    h = torch.where(finite[:, None], features, 0).to(dtype)
    logits = torch.einsum("nd,kcd->nkc", h, weight.to(dtype))
    if bias is not None:
        logits = logits + bias.to(dtype)
    fields = residual_support.reference(logits, labels, dtype=dtype, counted=finite, **options)
    residual = fields["residual"]
    return {
        **fields,
        "feature_sqnorm": h.square().sum(1),
        "grad": torch.einsum("nkc,nd->kcd", residual, h),
        "bias": residual.sum(0),
    }


def assert_close(
    result: dict[str, Any],
    *args: Any,
    loosely: float = 1.0,
    fields: Sequence[str] = FIELDS,
    **options: Any,
) -> None:
    """Compare with float64: at most twice the error of float32 PyTorch, plus a small floor."""
    expected = reference(*args, **options)
    rounded = reference(*args, dtype=torch.float32, **options)
    for name in fields:
        got, exact = result[name].double(), expected[name].double()
        assert got.shape == exact.shape, (name, got.shape, exact.shape)
        assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in the wrong places"
        own = (rounded[name].double() - exact).abs().nan_to_num(0.0)
        scale = exact.abs().nan_to_num(0.0, posinf=0.0).clamp_min(1e-30)
        top = scale.amax() if scale.numel() else 0.0
        floor = 6e-7 * torch.maximum(scale, 0.3 * torch.as_tensor(top))
        bound = loosely * (3.0 * own.amax() if own.numel() else 0.0) + loosely * floor
        error = torch.where(got == exact, 0.0, (got - exact).abs()).nan_to_num(0.0)
        worst = (error / bound).amax() if error.numel() else torch.zeros(())
        assert worst <= 1.0, f"{name}: {worst:.3g} times the allowed error"


def draw_heads(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    loss: str = "cross_entropy",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features (n, D), weights (K, C, D), biases (K, C) and labels of a loss."""
    rows, heads, classes, dim = shape
    features = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(heads, classes, dim, generator=generator) * min(1.0, 2.5 / dim**0.5)
    bias = torch.randn(heads, classes, generator=generator)
    if loss == "cross_entropy":
        labels = torch.randint(0, classes, (rows,), generator=generator)
    elif loss == "soft":
        labels = torch.softmax(2.0 * torch.randn(rows, classes, generator=generator), 1)
    else:
        labels = torch.rand(rows, classes, generator=generator)
    return features, weight, bias, labels


def options_of(loss: str, rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a loss with sample weights and, where it has one, label smoothing."""
    options: dict[str, Any] = {"sample_weight": 2.0 * torch.rand(rows, generator=generator)}
    if loss in ("cross_entropy", "soft"):
        options["label_smoothing"] = 0.1
    return options | {"loss": "cross_entropy" if loss == "soft" else loss}


def run_second(given: dict[str, Any], *, again: bool = False, **options: Any) -> Tensor:
    """Second pass into a guarded output, with given or recomputed residuals."""
    given = dict(given)
    made = given.pop("made")
    if again:
        given["residual"] = made
    heads, rows = given["mean_grad"].shape[0], given["features"].shape[0]
    out = guarded_out(heads, rows)
    few_classes_second(**given, out=out.view, **options)
    assert out.intact(), "wrote outside the output"
    return out.view.clone()
