"""Which learning rate a checkpoint states for the parameters that are scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .pickled import plain_value

_WAY_OUT = "give the rate with Checkpoint(source, lr=...), or --lr on the command line"


@dataclass(frozen=True)
class ParameterGroup:
    """Learning rate of one parameter group of an optimiser, and what is known of its parameters.

    ``names``: names of the parameters where the optimiser keeps them, else None. ``shapes``: for
    each parameter, the shapes of what the optimiser remembers for it (momentum has the
    parameter's own shape); empty sets where it remembers nothing.
    """

    rate: Any
    names: tuple[str, ...] | None
    shapes: tuple[frozenset[tuple[int, ...]], ...]
    name: str


@dataclass(frozen=True)
class ScoredParameters:
    """Parameters whose gradients are scored: name -> shape; ``what`` says it in words.

    ``in_model`` counts the parameters of each shape in the whole model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    what: str
    in_model: Mapping[tuple[int, ...], int]


@dataclass(frozen=True)
class Stated:
    """What one checkpoint says about its learning rate.

    ``lr`` is a single rate: a number that was given, or what the file has there, which is looked
    at when it is asked for. ``groups`` are the optimiser's groups, and ``schedule`` the last rates
    of a scheduler. ``later`` are groups and rates of files beside the weights, asked only where
    other checkpoints of the same call have a rate or none has.
    """

    where: str
    lr: Any = None
    groups: tuple[ParameterGroup, ...] = ()
    schedule: tuple[Any, ...] = ()
    later: Stated | None = None

    def any(self) -> bool:
        """Tell whether anything is stated, apart from ``later``."""
        return self.lr is not None or bool(self.groups) or bool(self.schedule)

    def rate(self, scored: ScoredParameters | None) -> float | None:
        """Return the rate of the parameters in ``scored`` (None: of whatever parameters).

        Raises
        ------
        TypeError, ValueError
            What is stated is no number >= 0; several rates are stated and it cannot be told which
            of them belongs to the parameters.
        """
        if self.lr is not None:
            return learning_rate(self.lr, f"learning rate in {self.where}")
        if self.groups:
            return _rate_of_groups(self.groups, scored, self.where)
        if self.schedule:
            rates = [
                learning_rate(rate, f"learning rate in {self.where}") for rate in self.schedule
            ]
            if len(set(rates)) > 1:
                raise ValueError(
                    f"checkpoint ({self.where}) states learning rates {_listed(rates)} for several "
                    f"parameter groups, and not which is whose; {_WAY_OUT}"
                )
            return rates[0]
        return None


def learning_rate(value: Any, what: str) -> float:
    """Return a learning rate as a float; the last one of a list.

    Raises
    ------
    TypeError, ValueError
        No number; negative or not finite.
    """
    value = plain_value(value)
    if isinstance(value, (list, tuple)) and value:
        value = plain_value(value[-1])
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        rate = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number >= 0, got {value!r}") from None
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"{what} must be a number >= 0, got {rate}")
    return rate


def groups_of(optimizer: Mapping[str, Any], path: str) -> list[ParameterGroup]:
    """Return the parameter groups in the state dict of an optimiser."""
    groups = optimizer.get("param_groups")
    if isinstance(groups, Mapping):  # how torch.distributed.checkpoint stores a list
        groups = [groups[key] for key in sorted(groups, key=str)]
    if not isinstance(groups, (list, tuple)):
        return []
    state = optimizer.get("state")
    state = state if isinstance(state, Mapping) else {}
    found = []
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or group.get("lr") is None:
            continue
        members = group.get("params")
        members = members if isinstance(members, (list, tuple)) else []
        names = group.get("param_names")
        if not isinstance(names, (list, tuple)):
            named = bool(members) and all(isinstance(member, str) for member in members)
            names = members if named else None
        found.append(
            ParameterGroup(
                group["lr"],
                None if names is None else tuple(str(name) for name in names),
                # Numbers become text where a file keeps a dictionary by names.
                tuple(_shapes(state.get(member, state.get(str(member)))) for member in members),
                f"{path}.param_groups[{number}]",
            )
        )
    return found


def _shapes(remembered: Any) -> frozenset[tuple[int, ...]]:
    if not isinstance(remembered, Mapping):
        return frozenset()
    tensors = [value for value in remembered.values() if isinstance(value, Tensor)]
    return frozenset(tuple(t.shape) for t in tensors if t.dim())


def _rate_of_groups(
    groups: Sequence[ParameterGroup], scored: ScoredParameters | None, where: str
) -> float:
    rates = [learning_rate(group.rate, f"learning rate in {where}") for group in groups]
    if len(set(rates)) == 1:
        return rates[0]
    several = (
        f"checkpoint ({where}) has {len(groups)} parameter groups with learning rates "
        f"{_listed(rates)}"
    )
    if scored is None:
        raise ValueError(f"{several}; {_WAY_OUT}")
    found: dict[str, set[float]] = {}
    for name, shape in scored.shapes.items():
        found[name] = _candidates(name, shape, scored.in_model.get(shape, 1), groups, rates)
        if not found[name]:
            raise ValueError(
                f"{several}, and it cannot be told which of them holds {name!r} ({scored.what}); "
                f"{_WAY_OUT}"
            )
    # A bias may share its shape with others: it goes with the weight where it can.
    common = set.intersection(*found.values()) if found else set()
    decided = {next(iter(rates)) for rates in found.values() if len(rates) == 1}
    if len(common) == 1 and decided:
        return common.pop()
    if len(decided) > 1 or not common:
        raise ValueError(
            f"{several}, and parameters that are scored ({scored.what}) have different ones; "
            f"a score has one rate: {_WAY_OUT}"
        )
    raise ValueError(
        f"{several}, and it cannot be told which of them holds {scored.what} (other parameters "
        f"have its shape); {_WAY_OUT}"
    )


def _candidates(
    name: str,
    shape: tuple[int, ...],
    in_model: int,
    groups: Sequence[ParameterGroup],
    rates: Sequence[float],
) -> set[float]:
    """Rates of the groups that may hold the parameter; by name where the groups have names."""
    paired = list(zip(groups, rates, strict=True))
    if all(group.names is not None for group in groups):
        # A name of another part may end like this one: the very name comes first.
        for same in (str.__eq__, _ends_alike):
            found = {
                rate
                for group, rate in paired
                if any(same(other, name) for other in group.names or ())
            }
            if found:
                return found
        return set()
    # An optimiser numbers its parameters by group, so the order says nothing about the model's:
    # the shapes of what it remembers do.
    having = [rate for group, rate in paired for shapes in group.shapes if shape in shapes]
    unknown = any(not shapes for group in groups for shapes in group.shapes)
    if unknown and len(having) < in_model:
        return set()
    return set(having)


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _listed(rates: Sequence[float]) -> str:
    shown = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
    return shown
