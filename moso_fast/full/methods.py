"""Finding out, on a few samples, how a network's gradients can be had without one per sample.

Every choice is checked against plain autograd, sample by sample, before the work starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import explicit as full_explicit
from .batches import Batch
from .checks import SelfCheckError
from .loss import RowLosses
from .norms.layout import Layout, clear
from .norms.tape import Plan, Tape, UnknownCall
from .passes import (
    Gradients,
    Network,
    NoOtherOrder,
    alignment_double_backward,
    alignment_forward,
    explicit_gradients,
    keeps_gradients,
    new_trace,
    order_changes,
    traced,
)
from .rows import Rows, tolerance

# What rounding leaves of a parameter's gradient that should vanish, relative to the whole one.
_FLOOR = 1e-6

CHANGED_ORDER = "used where the samples change their order"
_PAIRS = "the model fails in a batch of one: a row that is alone goes through it twice"

Aligned = Callable[[Network, Batch, Gradients], RowLosses]


class Methods:
    """How the gradients of one network are had; filled in by `prepare`."""

    def __init__(self, network: Network) -> None:
        self.network, self.rows = network, Rows(network)
        self.plan = Plan(dict(network.names))
        self.expanding = True
        self.others = full_explicit.vmapped
        self.others_reason = ""
        self._known_others: set[int] = set()
        self.aligned: Aligned | None = alignment_forward
        self.reasons: list[str] = []
        self.prepared = False
        self.moves = False  # whether the model may give the samples another order
        self.bytes_per_sample = 0

    @property
    def tolerance(self) -> float:
        """Allowed relative difference of two ways to the same gradient."""
        return tolerance(self.network)

    def prepare(self, batch: Batch) -> None:
        """Find and check the methods on the first samples of ``batch``, all of which count.

        Raises
        ------
        ValueError
            The samples of a batch influence each other.
        """
        few = batch.take(slice(0, 3))
        first, last = few.take(slice(0, 1)), few.take(slice(few.samples - 1, few.samples))
        self.rows.check_independence(few, (first, last), self.prepared)
        with keeps_gradients(self.network.parameters):
            expected = [explicit_gradients(self.network, one, whole=True) for one in (first, last)]
        probed = self.network.enough(few)
        if probed.rows > 1:
            self._find_layouts(probed)
        self._check_norms(few, expected)
        self._check_sum(first, expected[0])
        self.know_others(few, expected)
        if not self.prepared:
            self._choose_alignment(few, expected)
        self.prepared = True

    def _find_layouts(self, few: Batch) -> None:
        """Find by the gradients of single rows where the samples lie in each call's output."""
        network, plan = self.network, self.plan
        try:
            tape, rows = self._probed(few)
        except (RuntimeError, ValueError, TypeError, IndexError):
            if not self.expanding:
                raise
            # A look-up repeated for each sample does not fit what the model does with it.
            self.expanding = False
            plan.layouts.clear()
            tape, rows = self._probed(few)
        known: dict[int, list[Layout]] = {}
        if rows.requires_grad:
            for row, one in enumerate(torch.eye(few.rows, dtype=rows.dtype, device=rows.device)):
                tape.seen.clear()
                torch.autograd.grad(
                    rows, network.parameters, one, retain_graph=True, allow_unused=True
                )
                tape.possible_layouts(row, known)
        agreed: dict[Any, list[Layout]] = {}
        for call, _, _ in tape.calls:
            found = known.get(call.number, [])
            if call.key in agreed:
                found = [layout for layout in agreed[call.key] if layout in found]
            agreed[call.key] = found
        for call, _, used in tape.calls:
            if clear(agreed[call.key]):
                plan.layouts[call.key] = agreed[call.key][0]
                continue
            reason = "do not lie apart"
            if agreed[call.key]:
                reason = "cannot be told apart: the first ones have no gradient there"
            for key in used:
                plan.others.setdefault(key, f"used where the samples {reason}")
        for key, kinds in tape.kinds.items():
            if len(kinds) > 1:
                plan.others.setdefault(key, "used in different shapes")

    def _probed(self, few: Batch) -> tuple[Tape, Tensor]:
        network = self.network
        with torch.enable_grad(), network.context():
            trace, tape = new_trace(network, self.plan, few, self.expanding, probing=True)
            with trace:
                outputs = network.forward(few)
            rows = network.losses(outputs, few).differentiable
        self.bytes_per_sample = max(self.bytes_per_sample, trace.bytes // few.samples)
        return tape, rows

    def _check_sum(self, first: Batch, expected: Gradients) -> None:
        """Compare the summed gradient of a traced pass, here of one sample."""
        found = traced(self.network, self.plan, first, self.expanding)[1]
        for p, g in zip(self.network.parameters, found, strict=True):
            wanted = expected[id(p)]
            error = wanted if g is None else g - wanted
            length = sum(float(e.double().square().sum()) for e in expected.values()) ** 0.5
            if not float(error.double().norm()) <= self.tolerance * length + 1e-30:
                raise SelfCheckError(
                    f"self-check failed: the gradient of {self.plan.names[id(p)]} differs from "
                    "plain autograd"
                )

    def _check_norms(self, few: Batch, expected: list[Gradients]) -> None:
        """Compare norms parameter by parameter; what differs is not traced any more."""
        _, _, tape = traced(self.network, self.plan, few, self.expanding, marked=True)
        for at, gradients in zip((0, few.samples - 1), expected, strict=True):
            squares = {key: float(g.double().square().sum()) for key, g in gradients.items()}
            floor = _FLOOR * sum(squares.values())
            for key, square in squares.items():
                if key in self.plan.others:
                    continue
                found = float(tape.norms[key][at]) if key in tape.norms else 0.0
                if abs(found - square) > self.tolerance * square + floor:
                    self.plan.others[key] = "its traced gradients differ from plain autograd"
        for key in self._changed_order(few, tape):
            self.plan.others.setdefault(key, CHANGED_ORDER)

    def _changed_order(self, few: Batch, tape: Tape) -> set[int]:
        """Find parameters of calls in which the first samples do not lie as in the batch: ids."""
        if few.samples == 1:
            return set()
        try:
            return order_changes(self.network, self.plan, few, tape, self.expanding, self.tolerance)
        except UnknownCall as call:
            return set(call.used)
        except NoOtherOrder:
            return set()  # it packs them by descending length, say; batches may be checked yet

    def know_others(self, batch: Batch, expected: list[Gradients] | None = None) -> None:
        """Choose how parameters that are not traced get their gradients, if some are new."""
        new = self.plan.others.keys() - self._known_others
        self._known_others |= new
        if not new or self.others is not full_explicit.vmapped:
            return
        few = batch.take(slice(0, 3))
        if expected is None:
            ends = few.take(slice(0, 1)), few.take(slice(few.samples - 1, few.samples))
            expected = [explicit_gradients(self.network, one) for one in ends]
        self._choose_others(few, expected)

    def _choose_others(self, few: Batch, expected: list[Gradients]) -> None:
        only = list(self.plan.others)
        wanted = [sum(float(g[k].double().square().sum()) for k in only) for g in expected]
        try:
            found = full_explicit.norms(full_explicit.vmapped, self.network, few, only)
        except Exception as error:  # whatever the model does that vmap cannot
            self.others, self.others_reason = full_explicit.one_by_one, _first_line(error)
            return
        for at, square in zip((0, few.samples - 1), wanted, strict=True):
            if not abs(float(found[at]) - square) <= self.tolerance * square + 1e-30:
                self.others = full_explicit.one_by_one
                self.others_reason = "vmap gives other gradients than plain autograd"

    def _choose_alignment(self, few: Batch, expected: list[Gradients]) -> None:
        """Take the first method that agrees with plain autograd along a gradient."""
        direction = {k: (expected[0][k] + expected[1][k]) / 2 for k in expected[0]}
        ways: list[tuple[str, Aligned]] = [
            ("forward mode", alignment_forward),
            ("double backward", alignment_double_backward),
        ]
        for name, way in ways:
            try:
                losses = way(self.network, few, direction)
            except Exception as error:  # an operation without that derivative
                self.reasons.append(f"no {name}: {_first_line(error)}")
                continue
            assert losses.tangent is not None
            found = self.network.per_sample(losses.tangent, few)
            if self._agrees(found, direction, expected):
                self.aligned = way
                return
            self.reasons.append(f"no {name}: its values differ from plain autograd")
        self.aligned = None
        if not self.plan.others:
            self._choose_explicit(few, expected)

    def _choose_explicit(self, few: Batch, expected: list[Gradients]) -> None:
        others = self.plan.others
        self.plan.others = dict.fromkeys(self.plan.names, "")
        self._choose_others(few, expected)
        self.plan.others = others

    def _agrees(self, found: Tensor, direction: Gradients, expected: list[Gradients]) -> bool:
        size = sum(float(d.double().square().sum()) for d in direction.values()) ** 0.5
        for at, gradients in zip((0, -1), expected, strict=True):
            wanted = sum(
                float((g.double() * direction[k].double()).sum()) for k, g in gradients.items()
            )
            length = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
            if not abs(float(found[at]) - wanted) <= self.tolerance * size * length + 1e-30:
                return False
        return True

    def describe(self) -> dict[str, Any]:
        """Facts for the provenance of a table."""
        names = self.plan.names
        others = sorted({f"{names[k]} ({why})" for k, why in self.plan.others.items()})
        vmap = self.others is full_explicit.vmapped
        explicit = "vmap" if vmap else f"one by one (no vmap: {self.others_reason})"
        forward = self.aligned is alignment_forward
        alignment = "forward mode" if forward else "double backward"
        if self.aligned is None:
            alignment = explicit
        return {
            "alignment": "; ".join([alignment, *self.reasons]),
            **({"rows_in_pairs": _PAIRS} if self.network.pairs else {}),
            "norms": f"{len(names) - len(self.plan.others)} of {len(names)} parameters traced",
            "norms_explicit": others,
            "norms_explicit_by": explicit if others else "",
        }


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    operator = re.search(r"forward AD with (\S+) that does not support", line)
    if operator:
        return f"{operator[1]} does not support it"
    return line[:160]
