"""When the host reads what a job's data and results are judged by, and what follows from it.

These are a few numbers on the device of the job: the sums of the parameters, the status word of
the first pass, the count of samples, the sums of the self-check.

On a CPU each is read as soon as it is there: that costs nothing, and data that are wrong cost no
second pass. The same where features are streamed: one wait costs less than to send them again.

A GPU runs behind the host. To read a number stops the host until the GPU has come that far, and
then the GPU until the host has launched something new. So everything is launched first, and all
numbers come over in one transfer at the end, as bytes: to make them one type first would be a
launch each. The second pass has then run whatever the first one
found. No backend leaves its arrays for that, whatever the data: under graph capture nobody can
stop the second pass either.

Under graph capture nothing can be read, and nothing is judged.

Whenever they are read, the order is the same: parameters, status, count, self-check. The first
error is the one that is raised; to say which entry it is, more may be read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formulas import check_count
from .problem import Problem
from .status import STATUS_SLOTS, check_parameters, parameter_sums, raise_for_status
from .sums import result_sums, self_check

if TYPE_CHECKING:
    from .passes import Results, Whole

__all__ = ["Reading", "Verdict"]

_Judge = Callable[[Sequence[float]], None]

# How ``struct`` calls the numbers of a tensor.
_CODES = {torch.float32: "f", torch.float64: "d", torch.int64: "q"}


# What :meth:`Verdict.whole` reads of every head, and where the first one begins.
_HEAD_FACTS = 6
_FIRST_HEAD = STATUS_SLOTS + 1


class Reading(Enum):
    """When the host reads numbers of a job."""

    AT_ONCE = auto()
    TOGETHER = auto()  # at the end, in one transfer
    NEVER = auto()


class Verdict:
    """Judges a job in the order of its methods.

    ``formula`` names what the samples must suffice for. Every method may raise what
    :func:`moso_fast.core.engine.run` documents, or leave that to the last.
    """

    def __init__(self, problem: Problem, formula: str | None, reading: Reading) -> None:
        #: Samples that count, once it is read.
        self.count: int | None = None
        self._problem, self._formula, self._reading = problem, formula, reading
        self._open: list[tuple[Sequence[Tensor], _Judge]] = []

    def parameters(self) -> None:
        """Refuse weights, biases and sample weights that are not finite."""
        if self._reading is not Reading.NEVER:
            self._ask(parameter_sums(self._problem), partial(check_parameters, self._problem))

    def rows(self, status: Tensor, count: Tensor) -> None:
        """Refuse what the first pass found wrong, and samples that are too few."""
        if self._reading is not Reading.NEVER:
            self._ask([status], partial(raise_for_status, self._problem))
            self._ask([count], self._take_count)

    def results(self, results: Results, counted: Tensor) -> None:
        """Refuse results that fail the self-check; ``counted``: which samples count. Judge all."""
        if self._reading is not Reading.NEVER:
            # Unless it is known already that none is to be left out of the sums.
            among = None if self.count == counted.shape[0] else counted
            self._ask(result_sums(results, among), partial(self._check_results, results, among))
            if self._open:
                self._read()

    def whole(self, whole: Whole) -> None:
        """Judge a job that was done in one go.

        Its facts: the status word, the number of samples that count, and for every head |G|^2,
        sum_i a_i, sum_i |g_i|, and the sums of its weights, of its bias and of the sample weights.
        """
        if self._reading is Reading.NEVER:
            return
        facts = whole.facts.tolist()
        by_head = facts[_FIRST_HEAD:]
        columns = [by_head[at::_HEAD_FACTS] for at in range(_HEAD_FACTS)]
        if not math.isfinite(sum(facts)):
            check_parameters(self._problem, self._parameter_sums(*columns[3:]))
        if min(facts[:STATUS_SLOTS]) < self._problem.rows:
            raise_for_status(self._problem, facts[:STATUS_SLOTS])
        self._take_count(facts[STATUS_SLOTS:_FIRST_HEAD])
        among = None if self.count == whole.counted.shape[0] else whole.counted
        self._check_results(whole.results, among, [*columns[0], *columns[1], *columns[2]])

    def _parameter_sums(
        self, weights: list[float], biases: list[float], samples: list[float]
    ) -> list[float]:
        """Give the sums as `parameter_sums` does, of those parameters that there are."""
        sums = [sum(weights)]
        if self._problem.bias is not None:
            sums.append(sum(biases))
        if self._problem.sample_weight is not None:
            sums.append(samples[0])  # the same for every head
        return sums

    def _ask(self, facts: Sequence[Tensor], judge: _Judge) -> None:
        """Have ``judge`` see the numbers of ``facts`` in their order, now or with all others."""
        self._open.append((facts, judge))
        if self._reading is Reading.AT_ONCE:
            self._read()

    def _read(self) -> None:
        """Read what nobody has judged yet, with one wait for all of it, and judge it."""
        asked, self._open = self._open, []
        found = [fact.view(-1) for facts, _ in asked for fact in facts]
        numbers: tuple[float, ...] = ()
        if self._problem.asynchronous:
            code = "=" + "".join(f"{len(fact)}{_CODES[fact.dtype]}" for fact in found)
            data = torch.cat([fact.view(torch.uint8) for fact in found]).tolist()
            numbers = struct.unpack(code, bytes(data))
        else:
            for fact in found:
                numbers += tuple(fact.tolist())
        for facts, judge in asked:
            count = sum(fact.numel() for fact in facts)
            judge(numbers[:count])
            numbers = numbers[count:]

    def _take_count(self, found: Sequence[float]) -> None:
        self.count = int(found[0])
        if self._formula is not None:
            check_count(self._formula, self.count)

    def _check_results(self, results: Results, among: Tensor | None, sums: Sequence[float]) -> None:
        assert self.count is not None, "the count is asked for first"
        self_check(self._problem, results, among, self.count, sums)
