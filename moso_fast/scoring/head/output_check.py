"""The second assumption of the last-layer path: the model's logits are the output of its head.

Most models return the very tensor that the head made, which is seen at no cost. Of the others the
first batch of a checkpoint is run once more with random numbers in the place of the head's output:
what the model makes of them tells rows that were chosen or reordered from a known map, and both
from a model that does something else, also where the real numbers would hide it (a head of zeros,
say). Every batch is then held against what was found. Whatever remains is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.logit_map import LogitMap
from ...sources.find_head import FULL_GRADIENT, is_convolution
from .map_search import agrees, find_map
from .outputs import Logits, arrangements, describe_outputs, output_tensors, same_memory
from .row_match import Match, distinct_share, match_rows, same_bits
from .weights import HeadCall, last_dim

Probe = Callable[[Tensor], Any]

# Numbers of a search or a comparison through a map.
_NUMBERS = 2**20
# What a probe must have, in all: numbers to tell maps apart, and bits to tell rows apart.
_PROBE_NUMBERS = 96
_PROBE_BITS = 40
_MOST_PROBES = 16
# Sizes of a probe's numbers, row by row: what bends large numbers only must show.
_SIZES = (1.0, 8.0, 64.0)
_ROUNDED = (None, torch.bfloat16, torch.float16)


class OutputCheck:
    """Says for every batch which rows of the head's input belong to the rows of the logits.

    ``map`` is what the logits of the current checkpoint went through, None = nothing; ``notes``
    are facts for the record, in words.
    """

    def __init__(self, name: str, head: nn.Module) -> None:
        self.name, self.head = name, head
        self.map: LogitMap | None = None
        self.notes: dict[str, str] = {}
        self._where: Logits | None = None
        self._unchanged = False  # a probe has shown logits to be the head's output, unmapped
        self._mean = False  # logits (B, C) are the mean of the head's output (B, ..., C)
        self._first = True

    def begin(self) -> None:
        """Start with the first batch of another checkpoint."""
        self._first, self.map, self._mean = True, None, False
        self.notes = {}

    def features(self, call: HeadCall, outputs: Any, probe: Probe) -> Tensor:
        """Features (..., D) of one batch, one row for each row of the logits (..., C).

        ``probe`` runs the batch again with another output of the head, and returns the model's.

        Raises
        ------
        ValueError
            The logits are not the head's output, nor that through a known map or in other rows.
        """
        value, z = last_dim(call.value, self.head), last_dim(call.output, self.head)
        if not z.numel():
            return value
        first, self._first = self._first, False
        live = last_dim(call.live, self.head)
        if not call.overwritten()[1]:
            found = same_memory(outputs, live)
            if found is not None and self.map is None and not self._mean:
                return value.reshape(*found.shape[:-1], value.shape[-1])
        logits = self._find(outputs, z)
        if first and not (self._unchanged and self._equal(logits, z)):
            return self._first_batch(value, z, logits, probe)
        if self._mean:
            if not _is_mean(z, logits):
                raise self._refused("in this batch they are not its mean over the positions")
            return _mean(value)
        if self.map is not None:
            self._check_map(z, logits)
            return value.reshape(*logits.shape[:-1], value.shape[-1])
        if self._equal(logits, z):
            flat = z.reshape(-1, z.shape[-1])
            # Where most rows are one of a kind and in their place, the others are too.
            if distinct_share(flat, value.reshape(len(flat), -1)) > 0.5:
                return value.reshape(*logits.shape[:-1], value.shape[-1])
        rows = self._match(logits, z, value)
        if rows is Match.AMBIGUOUS:
            rows, _ = self._probe_rows(z, probe, 1)
        if not isinstance(rows, Tensor) or not self._equal(logits, z, rows):
            raise self._refused("in this batch they are not, although in an earlier one they were")
        return self._take(value, rows, logits.shape[:-1])

    def _first_batch(self, value: Tensor, z: Tensor, logits: Tensor, probe: Probe) -> Tensor:
        """Find the rows and the map of a checkpoint by probes, and check them on real numbers."""
        rows, (given, seen) = self._probe_rows(z, probe, _PROBE_NUMBERS)
        if isinstance(rows, Tensor):
            self._unchanged = True
            if not self._equal(logits, z, rows):
                raise self._refused("they depend on it in a way that differs from input to input")
            self._note_rows(rows, z)
            return self._take(value, rows, logits.shape[:-1])
        if _is_mean(given, seen) and _is_mean(z, logits):
            self._mean = True
            self.notes["rows"] = "the logits are the mean of the head's output over the positions"
            return _mean(value)
        if seen.shape[:-1].numel() != given.shape[:-1].numel():
            raise self._refused(
                f"they have {logits.shape[:-1].numel()} rows, the head's output has "
                f"{z.shape[:-1].numel()}, and they are none of these"
            )
        eps = _eps(z, logits)
        given, seen = _flat(given), _flat(seen)
        most = max(8, _NUMBERS // given.shape[1])
        few = given[:most].double(), seen[:most].double()
        self.map = find_map(*few, eps)
        if self.map is None or not _holds(self.map, given, seen, eps):
            raise self._refused(_seen(*few))
        self._check_map(z, logits)
        self.notes["logits"] = f"{self.map.describe()} of the head's output z"
        return value.reshape(*logits.shape[:-1], value.shape[-1])

    def _probe_rows(
        self, z: Tensor, probe: Probe, least: int
    ) -> tuple[Tensor | Match, tuple[Tensor, Tensor]]:
        """Rows of the head's output that the logits are, by random numbers put in its place.

        Also these numbers, ``least`` or more, and the logits that came of them: (..., C), one probe
        below the other in the first dimension.
        """
        bits = z.shape[-1] * 4 * min(z.dtype.itemsize, 4)  # half of them are as good as random
        count = max(-(-least // z.numel()), -(-_PROBE_BITS // bits))
        assert self._where is not None
        given, seen = [], []
        random_numbers = torch.Generator(z.device).manual_seed(20231210)
        sizes = torch.tensor(_SIZES, device=z.device)
        for _ in range(min(count, _MOST_PROBES)):
            options: dict[str, Any] = {"generator": random_numbers, "device": z.device}
            chosen = torch.randint(len(sizes), (*z.shape[:-1], 1), **options)
            random = (torch.randn(z.shape, **options) * sizes[chosen]).to(z.dtype)
            replaced = random.movedim(-1, 1) if is_convolution(self.head) else random
            try:
                outputs = probe(replaced.contiguous().clone())  # the model may write to it
            except Exception as error:
                raise self._refused(
                    f"with other numbers in its place the model fails ({type(error).__name__})"
                ) from error
            logits = self._where.of(outputs, z.shape)
            if logits is None:
                raise self._refused("with other numbers in its place they are no more there")
            given.append(random)
            seen.append(logits)
        pairs = torch.cat(given), torch.cat(seen)
        wide = [torch.cat([_flat(t) for t in side], 1) for side in (given, seen)]
        for rounded in _ROUNDED:
            known = _rounded(wide[0], rounded, wide[1].dtype)
            rows = match_rows(wide[1], known, None)
            if isinstance(rows, Tensor):
                self._where.rounded = rounded
                return rows, pairs
        return Match.NONE, pairs

    def _find(self, outputs: Any, z: Tensor) -> Tensor:
        """Return the logits in the model's output, which are to be explained."""
        if self._where is not None:
            logits = self._where.of(outputs, z.shape)
            if logits is not None:
                return logits
        classes, tensors = z.shape[-1], output_tensors(outputs)
        readings = [
            (Logits(path, reading), logits)
            for path, tensor in tensors.items()
            for reading, logits in arrangements(tensor, z.shape).items()
            if logits.shape[:-1].numel() <= z.shape[:-1].numel()
        ]
        if not readings:
            rows = z.shape[:-1].numel()
            for tensor in tensors.values():
                if classes == 1 and tensor.dim() == 2 and tensor.numel() == rows:
                    raise self._refused(
                        f"each row of the logits {tuple(tensor.shape)} is made of several rows of "
                        f"the head's output {tuple(z.shape)}, as in multiple choice"
                    )
            raise self._refused(
                f"the model returned {describe_outputs(outputs)}, the head {tuple(z.shape)}"
            )
        exact = [one for one in readings if self._equal(one[1], z)]
        if len(readings) > 1 and exact:
            readings = exact
        if len({where.path for where, _ in readings}) > 1:
            raise self._refused(
                f"the model returned {describe_outputs(outputs)}, and which of these are the "
                "logits cannot be told"
            )
        self._where = readings[0][0]
        return readings[0][1]

    def _equal(self, logits: Tensor, z: Tensor, rows: Tensor | None = None) -> bool:
        flat, wanted = _flat(z), _flat(logits)
        if rows is not None:
            flat = flat[rows]
        if flat.shape != wanted.shape:
            return False
        rounded = None if self._where is None else self._where.rounded
        return same_bits(_rounded(flat, rounded, wanted.dtype), wanted)

    def _match(self, logits: Tensor, z: Tensor, value: Tensor) -> Tensor | Match:
        rounded = None if self._where is None else self._where.rounded
        wanted, known = _flat(logits), _rounded(_flat(z), rounded, logits.dtype)
        inputs = value.reshape(len(known), -1)
        if logits.dim() < z.dim() and logits.shape[0] == z.shape[0]:
            numbers = torch.arange(z.shape[0], device=z.device)
            samples = [
                numbers.repeat_interleave(t.shape[:-1].numel() // z.shape[0]) for t in (logits, z)
            ]
            rows = match_rows(wanted, known, inputs, (samples[0], samples[1]))
            if rows is not Match.NONE:
                return rows
        return match_rows(wanted, known, inputs)

    def _check_map(self, z: Tensor, logits: Tensor) -> None:
        """Hold the real logits against the map of the real output of the head."""
        assert self.map is not None
        if _holds(self.map, _flat(z), _flat(logits), _eps(z, logits)):
            return
        raise self._refused(
            f"with random numbers in its place they are {self.map.describe()} of it, with the real "
            "ones they are not"
        )

    def _note_rows(self, rows: Tensor, z: Tensor) -> None:
        count = z.shape[:-1].numel()
        if len(rows) < count:
            self.notes["rows"] = "the logits are some rows of the head's output"
        elif not _in_order(rows, count):
            self.notes["rows"] = "the logits are the head's rows in another order"

    def _take(self, value: Tensor, rows: Tensor, lead: torch.Size) -> Tensor:
        flat = _flat(value)
        if _in_order(rows, len(flat)):
            return value.reshape(*lead, value.shape[-1])
        return flat[rows].reshape(*lead, value.shape[-1])

    def _refused(self, why: str) -> ValueError:
        kind = type(self.head).__name__
        return ValueError(
            f"the model's logits are not the output of head {self.name!r} ({kind}): {why}; choose "
            f"another head= if this is not the last layer, else {FULL_GRADIENT}"
        )


def _holds(found: LogitMap, given: Tensor, seen: Tensor, eps: float) -> bool:
    """Tell whether m(given) = seen; block by block, since vocabularies are not widened whole."""
    if given.shape != seen.shape:
        return False
    rows = max(1, _NUMBERS // given.shape[1])
    pairs = zip(given.split(rows), seen.split(rows), strict=True)
    return all(agrees(found, one.double(), other.double(), eps) for one, other in pairs)


def _in_order(rows: Tensor, count: int) -> bool:
    """Tell whether ``rows`` are all of ``count``, one after the other."""
    return len(rows) == count and bool((rows.cpu() == torch.arange(count, device="cpu")).all())


def _is_mean(z: Tensor, logits: Tensor) -> bool:
    """Tell whether logits (B, C) are the mean of z (B, ..., C) over all between, up to rounding."""
    if z.dim() < 3 or logits.shape != (z.shape[0], z.shape[-1]):
        return False
    wide = z.double().flatten(1, -2)
    allowed = 8 * _eps(z, logits) * wide.abs().mean(1) + torch.finfo(torch.float32).tiny
    return bool(((logits.double() - wide.mean(1)).abs() <= allowed).all())


def _mean(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).flatten(1, -2).mean(1)


def _eps(*tensors: Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _rounded(z: Tensor, through: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    return (z if through is None else z.to(through)).to(dtype)


def _seen(given: Tensor, seen: Tensor) -> str:
    """Say in a few words how the logits depend on the head's output."""
    x, z = seen - seen.mean(), given - given.mean()
    size = float(x.square().sum() * z.square().sum()) ** 0.5
    alike = float((x * z).sum()) / size if size else 0.0
    if not bool(torch.isfinite(seen).all()):
        return "some of them are masked (not finite)"
    if alike > 0.3:
        return (
            f"they go with it (correlation {alike:.2f}), but through no map that is known: "
            "something is added to it (a skip, a second head, an adapter), or it is normalised"
        )
    return "they hardly depend on it"
