"""A job of the stacked alignment kernel in guarded buffers, and its bounds in float64."""

from __future__ import annotations

import torch
from alignment_support import SMALL, dots, draw, guarded_out
from moso_fast.kernels.residual import RowOutputs, SoftmaxState, residual_rows
from moso_fast.kernels.stacked_alignment import stacked_alignment
from residual_support import reference
from torch import Tensor


class Job:
    """Features, heads and labels, with what the first pass leaves of them."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        operand: torch.dtype = torch.float32,
        labels: Tensor | None = None,
        bias: Tensor | None = None,
        **options: object,
    ) -> None:
        rows, heads, classes, dim = shape
        self.features = draw((rows, dim), generator, dtype)
        self.weight = (draw((heads * classes, dim), generator) / dim**0.5).to(operand)
        self.grad = draw((heads * classes, dim), generator, operand)
        self.bias = draw((heads * classes,), generator) if bias is None else bias
        self.bias_grad = draw((heads * classes,), generator)
        self.labels = (
            torch.randint(0, classes, (rows,), generator=generator) if labels is None else labels
        )
        self.heads, self.options = heads, options

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the logits (n, K, C), computed in ``dtype``."""
        z = self.features.to(dtype) @ self.weight.to(dtype).T + self.bias.to(dtype)
        return z.view(len(self.features), self.heads, -1)

    def first_pass(self) -> tuple[Tensor, SoftmaxState]:
        """Run the residual kernel: residuals (n, K * C) and the softmax state, in guards."""
        logits = self.logits().float().flatten(1)
        rows, heads = len(logits), self.heads
        state = [guarded_out(heads, rows) for _ in SoftmaxState._fields]
        out = RowOutputs(*(guarded_out(heads, rows).view for _ in RowOutputs._fields))
        softmax = SoftmaxState(*(guarded.view for guarded in state))
        status = torch.full((4,), rows)
        classes = logits.shape[1] // heads
        residual_rows(logits, self.labels, classes=classes, out=out, status=status,
                      softmax=softmax, **self.options)  # fmt: skip
        assert all(guarded.intact() for guarded in state)
        return logits, softmax

    def second_pass(self, softmax: SoftmaxState, **options: object) -> Tensor:
        """Run the stacked kernel in a guarded, NaN-filled output; check the guards."""
        out = guarded_out(self.heads, len(self.features))
        given = {k: v for k, v in self.options.items() if k in ("label_smoothing", "sample_weight")}
        arguments = {"bias": self.bias, "mean_bias_grad": self.bias_grad, "tile": SMALL}
        stacked_alignment(self.features, self.weight, self.grad, self.labels, softmax, out.view,
                          **(arguments | given | options))  # fmt: skip
        assert out.intact(), "wrote outside the output"
        return out.view.clone()

    def exact(self, residual: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Alignments of these residuals (n, K, C) in ``dtype``."""
        given = (self.features, residual.flatten(1), self.grad, self.bias_grad)
        return dots(*given, self.heads, dtype)

    def check(self, got: Tensor, tolerance: float = 1e-6) -> None:
        """At most twice the error of float32 PyTorch, plus a share of sum |r| |s|."""
        exact_r = reference(self.logits(), self.labels, **self.options)["residual"]
        own_r = reference(
            self.logits(torch.float32), self.labels, dtype=torch.float32, **self.options
        )["residual"]
        exact = self.exact(exact_r)
        own = (self.exact(own_r, torch.float32).double() - exact).abs().amax()
        parts = (self.features, exact_r.flatten(1), self.grad, self.bias_grad)
        scale = dots(*(part.abs() for part in parts), self.heads)
        error = (got.double() - exact).abs()
        bound = 2.0 * own + tolerance * scale
        assert bool((error <= bound).all()), float((error / bound).max())
