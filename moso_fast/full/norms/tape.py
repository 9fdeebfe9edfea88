"""What one batched backward pass leaves behind: the squared gradient norm of every sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .factors import Factors, squared_norms, summed
from .layout import Layout, candidates, consistent, fits, samples_first
from .moves import fingerprint


class UnknownCall(Exception):
    """A call that no batch before has made: its layout has to be found first.

    ``used`` holds the ids of its parameters.
    """

    def __init__(self, name: str, used: list[int]) -> None:
        super().__init__(name)
        self.used = used


@dataclass
class Plan:
    """What is known of a model after its first batches.

    ``names`` maps the id of each parameter in scope to its name; ``others`` holds the ids of those
    whose gradients are not traced, with the reason; ``layouts`` the layout of each call.
    """

    names: dict[int, str]
    layouts: dict[Hashable, Layout] = field(default_factory=dict)
    others: dict[int, str] = field(default_factory=dict)

    def tracked(self, tensor: object) -> bool:
        """Tell whether the norm of this parameter's gradient is traced."""
        return id(tensor) in self.names and id(tensor) not in self.others


@dataclass(frozen=True)
class Call:
    """One traced call; its output has the samples within its first ``lead`` dimensions."""

    number: int
    key: Hashable
    lead: int
    layout: Layout | None


class Tape:
    """Collects the gradients of one batch call by call during the backward pass.

    Parameters
    ----------
    plan
        Parameters and layouts.
    rows, samples
        B, the size of the batch, and how many samples these are (B / views).
    device
        Where the results are kept.
    probing
        Record the gradients of the calls' outputs instead of norms, to find their layouts.
    expanding
        Parameters and look-ups that have no samples are repeated for each of them.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        samples: int,
        device: torch.device,
        probing: bool = False,
        expanding: bool = True,
    ) -> None:
        self.plan, self.rows, self.samples = plan, rows, samples
        self.probing, self.expanding = probing, expanding
        self.norms: dict[int, Tensor] = {}
        self.uses: Counter[int] = Counter()
        self.kinds: dict[int, set[Hashable]] = {}
        self.calls: list[tuple[Call, tuple[int, ...], list[int]]] = []
        self.seen: dict[int, Tensor] = {}
        #: A number for each sample and call, where they are asked for (see `moves`).
        self.marks: dict[int, Tensor] | None = None
        self.moves = False  # whether the samples may have got another order on the way
        self._pending: dict[int, list[Factors | Tensor]] = {}
        self._heights: dict[int, int] = {}
        self._left: Counter[int] = Counter()
        self.device = device

    def call(
        self,
        name: str,
        parameters: Sequence[Tensor | None],
        kinds: Sequence[Hashable],
        shape: Sequence[int],
        lead: int,
        rank: int,
    ) -> Call | None:
        """Announce a call; None where its parameters are not traced.

        ``shape`` is that of the output; ``rank`` tells inputs of different kinds apart.
        """
        used = [p for p in parameters if p is not None and p.requires_grad]
        # A weight that is computed from parameters has its gradient passed on as usual.
        if not used or not all(self.plan.tracked(p) for p in used):
            return None
        key = (name, id(used[0]), rank)
        layout = self.plan.layouts.get(key)
        known = layout is not None and fits(layout, shape, self.rows)
        if not known and self.rows > 1 and not self.probing:
            raise UnknownCall(name, [id(p) for p in used])
        made = Call(len(self.calls), key, lead, layout)
        self.calls.append((made, tuple(shape[:lead]), [id(p) for p in used]))
        for p, kind in zip(parameters, kinds, strict=True):
            if p is not None and self.plan.tracked(p):
                self.uses[id(p)] += 1
                self._left[id(p)] += 1
                self.kinds.setdefault(id(p), set()).add(kind)
        return made

    def known_call(self, name: str, parameter: Tensor, rank: int) -> bool:
        """Tell whether the layout of such a call has been found."""
        return (name, id(parameter), rank) in self.plan.layouts

    def arrange(self, call: Call, tensor: Tensor) -> Tensor:
        """Bring an input or output gradient of the call to (samples, T, ...), not in 16 bits."""
        tensor = samples_first(call.layout, tensor, call.lead, self.rows, self.samples)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    def mark(self, output: Tensor) -> None:
        """Note a number for each sample in the output of the last call, if that is asked for."""
        call = self.calls[-1][0]
        if self.marks is not None and call.number not in self.marks:
            self.marks[call.number] = fingerprint(self.arrange(call, output))

    def probe(self, call: Call, gradient: Tensor) -> None:
        """Note the gradient of a call's output."""
        self.seen[call.number] = gradient

    def matrix(
        self, parameter: Tensor, factors: Factors, height: int, wanted: bool = True
    ) -> Tensor | None:
        """Add one use of a matrix; return its gradient summed over the samples: (G, R, C).

        ``wanted=False`` where the caller has a faster way to the sum.
        """
        self._left[id(parameter)] -= 1
        total = None
        if self.uses[id(parameter)] == 1:
            norms, total = squared_norms([factors], height)
            self._add(id(parameter), norms)
        else:
            self._heights[id(parameter)] = height
            self._stash(id(parameter), factors)
        if not wanted:
            return None
        return summed(factors, height) if total is None else total

    def only_use(self, parameter: Tensor) -> bool:
        """Tell whether the parameter is used once in this forward pass."""
        return self.uses[id(parameter)] == 1

    def known(self, parameter: Tensor, norms: Tensor) -> None:
        """Add the squared norms (samples,) of a parameter's only use."""
        self._left[id(parameter)] -= 1
        self._add(id(parameter), norms)

    def vector(self, parameter: Tensor, gradients: Tensor) -> Tensor:
        """Add one use of a small parameter: its gradients (samples, ...); return their sum."""
        self._left[id(parameter)] -= 1
        flat = gradients.reshape(len(gradients), -1)  # a scalar has no dimension to flatten
        if self.uses[id(parameter)] == 1:
            self._add(id(parameter), torch.linalg.vecdot(flat, flat).double())
        else:
            self._stash(id(parameter), flat)
        return gradients.sum(0)

    def finish(self) -> None:
        """Take up shared parameters of which some use had no part in the loss."""
        for key in list(self._pending):
            self._close(key)

    def total(self) -> Tensor:
        """Squared norms over all traced parameters, (samples,) float64."""
        result = torch.zeros(self.samples, dtype=torch.float64, device=self.device)
        for norms in self.norms.values():
            result += norms
        return result

    def _stash(self, key: int, use: Factors | Tensor) -> None:
        self._pending.setdefault(key, []).append(use)
        if self._left[key] == 0:
            self._close(key)

    def _close(self, key: int) -> None:
        uses = self._pending.pop(key)
        matrices = [use for use in uses if isinstance(use, Factors)]
        if matrices:
            self._add(key, squared_norms(matrices, self._heights[key])[0])
            return
        flat = torch.stack([use for use in uses if isinstance(use, Tensor)]).sum(0)
        self._add(key, torch.linalg.vecdot(flat, flat).double())

    def _add(self, key: int, norms: Tensor) -> None:
        self.norms[key] = self.norms[key] + norms if key in self.norms else norms

    def possible_layouts(self, row: int, known: dict[int, list[Layout]]) -> None:
        """Strike out, call by call, the layouts that the gradient of one row's loss excludes."""
        for call, shape, _ in self.calls:
            left = known.setdefault(call.number, candidates(shape, self.rows))
            if call.number in self.seen:
                gradient = self.seen[call.number]
                known[call.number] = [
                    layout
                    for layout in left
                    if consistent(layout, gradient, call.lead, self.rows, row)
                ]
