"""Flat inputs: the values of all samples one after the other, and offsets or lengths beside them.

``nn.EmbeddingBag`` takes its bags in this form. Which inputs are meant is seen from the calls that
the model makes: an input that is looked up as it came, with offsets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Values, offsets, weights of the values, and whether the offsets tell where the last bag ends.
LookUp = tuple[Tensor, Tensor, Tensor | None, bool]

ASK = "give the bags' offsets beside their values, one bag a sample, in the order of the labels"


@dataclass(frozen=True)
class Flat:
    """Inputs of a batch, by their numbers: ``values`` hold several entries a row.

    ``kind`` says what input ``bounds`` holds: ``"offsets"`` (where the rows begin; also where the
    last one ends, if there is one more) or ``"lengths"``.
    """

    values: tuple[int, ...]
    bounds: int
    kind: str

    def edges(self, inputs: Sequence[Any], rows: int) -> Tensor:
        """Where rows begin, and where the last one ends: (rows + 1,) int64 on the CPU.

        Raises
        ------
        ValueError
            Offsets or lengths that do not go with the values and the labels.
        """
        bounds, values = inputs[self.bounds].detach().long().cpu(), inputs[self.values[0]]
        if self.kind == "lengths":
            edges = torch.cat([bounds.new_zeros(1), bounds.cumsum(0)])
        elif len(bounds) == rows:
            edges = torch.cat([bounds, bounds.new_tensor([len(values)])])
        else:
            edges = bounds
        fits = len(edges) == rows + 1 and int(edges[0]) == 0 and int(edges[-1]) <= len(values)
        if not fits or bool((edges.diff() < 0).any()):
            raise ValueError(
                f"data: {self.kind} of {len(bounds)} entries do not divide {len(values)} values "
                f"among {rows} labels; {ASK}"
            )
        return edges

    def take(self, inputs: Sequence[Any], rows: Tensor, count: int) -> dict[int, Tensor]:
        """Flat inputs and their bounds for some rows of ``count``: number -> tensor."""
        edges = self.edges(inputs, count)
        lengths = edges.diff()[rows]
        within = torch.arange(int(lengths.sum()), device="cpu")
        starts = lengths.cumsum(0) - lengths
        chosen = within + torch.repeat_interleave(edges[:-1][rows] - starts, lengths)
        bounds = inputs[self.bounds]
        taken = lengths
        if self.kind == "offsets":
            taken = starts
            if len(bounds) == count + 1:
                taken = torch.cat([starts, lengths.sum()[None]])
        result = {self.bounds: taken.to(bounds)}
        for number in self.values:
            value = inputs[number]
            result[number] = value[chosen.to(value.device)]
        return result


class _Watch(TorchFunctionMode):
    """Keeps the flat look-ups of a forward pass: values, offsets, weights of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LookUp] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding_bag:
            self._note(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: Any = None,
        norm_type: Any = None,
        scale_grad_by_freq: Any = None,
        mode: Any = None,
        sparse: Any = None,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: Any = None,
    ) -> None:
        if input.dim() == 1 and offsets is not None:
            self.calls.append((input, offsets, per_sample_weights, include_last_offset))


def may_be_flat(inputs: Sequence[Any]) -> bool:
    """Tell whether a batch can hold flat inputs, without a forward pass."""
    lists = [v for v in inputs if isinstance(v, Tensor) and v.dim() == 1]
    return len(lists) > 1 and not all(v.is_floating_point() for v in lists)


def looked_up(forward: Callable[[], Any]) -> list[LookUp]:
    """List what ``forward()`` looks up in bags."""
    with torch.no_grad(), _Watch() as watch:
        forward()
    return watch.calls


def looked_up_alone(forward: Callable[[], Any]) -> list[LookUp]:
    """List the same for a single row, with which the model may fail behind its look-ups.

    An error is not lost: the passes that follow raise it again.
    """
    with torch.no_grad(), _Watch() as watch, contextlib.suppress(Exception):
        forward()
    return watch.calls


def same_twice(alone: Sequence[LookUp], pair: Sequence[LookUp], inputs: Sequence[Any]) -> bool:
    """Tell whether a model looks up the same bags twice, once for each of two equal rows.

    ``alone``: what it looks up for the one row. Beside that, it may have bags of its own, which are
    the same for any batch; those of ``inputs`` are not.
    """
    if len(alone) != len(pair):
        return False
    for (values, offsets, each, ends), (both, bounds, weights, _) in zip(alone, pair, strict=True):
        lengths = _lengths(values, offsets, ends)
        if torch.equal(_lengths(both, bounds, ends), lengths) and torch.equal(both, values):
            if _which(values, inputs) is None:
                continue
            return False
        twice = torch.equal(_lengths(both, bounds, ends), lengths.repeat(2))
        twice = twice and torch.equal(both, values.repeat(2))
        if each is not None and weights is not None:
            twice = twice and len(weights) == 2 * len(each)
        if not twice:
            return False
    return True


def find_flat(calls: Sequence[LookUp], inputs: Sequence[Any], rows: int) -> tuple[Flat, ...]:
    """Find the flat inputs of a batch by what the model looks up in bags.

    Raises
    ------
    ValueError
        Values that are an input, with offsets that no input tells, or not one bag a sample.
    """
    found: dict[int, Flat] = {}
    for values, offsets, each, ends in calls:
        number = _which(values, inputs)
        if number is None:
            continue  # made by the model from inputs of its own, row by row
        # Words may look like offsets or lengths themselves.
        beside = [None if k == number else value for k, value in enumerate(inputs)]
        bags = len(offsets) - ends
        lengths = _lengths(values, offsets, ends)
        single = len(values) == rows and bags == rows and bool((lengths == 1).all())
        if single and _which(offsets, beside) is None:
            continue  # one value a row: rows like any other
        if bags != rows:
            raise ValueError(
                f"model: an embedding bag makes {bags} bags of an input for {rows} labels; {ASK}"
            )
        bounds, kind = _which(offsets, beside), "offsets"
        if bounds is None:
            bounds, kind = _which(lengths, beside), "lengths"
        if bounds is None:
            raise ValueError(
                "model: an embedding bag takes an input in pieces that neither offsets nor lengths "
                f"among the inputs tell; {ASK}"
            )
        weights = None if each is None else _which(each, inputs)
        together: tuple[int, ...] = (number,) if weights is None else (number, weights)
        known = found.get(number)
        if known is not None:
            together = (*known.values, *(n for n in together if n not in known.values))
        found[number] = Flat(together, bounds, kind)
    return tuple(found.values())


def _lengths(values: Tensor, offsets: Tensor, ends: bool) -> Tensor:
    """Sizes of the bags of a look-up."""
    return (offsets if ends else torch.cat([offsets, offsets.new_tensor([len(values)])])).diff()


def _which(tensor: Tensor, inputs: Sequence[Any]) -> int | None:
    """Return the number of the input that is this tensor: the same memory, else the same values."""
    lists = [
        (number, value)
        for number, value in enumerate(inputs)
        if isinstance(value, Tensor) and value.shape == tensor.shape
    ]
    for number, value in lists:
        if value.data_ptr() == tensor.data_ptr() and value.stride() == tensor.stride():
            return number
    if not tensor.is_floating_point():
        # Numbers such as 0.3 are no offsets, although they would be 0 as integers.
        lists = [(n, v) for n, v in lists if torch.equal(v.to(tensor).to(v), v)]
    equal = [n for n, v in lists if torch.equal(v.to(tensor), tensor)]
    return equal[0] if len(equal) == 1 else None
