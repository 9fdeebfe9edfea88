"""Choosing the weights in a checkpoint that belong to a model, openly or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contents import USUAL, Contents
from .names import MANY, Mapped, Target, mappings

_SHOWN = 3
# Averages of the weights over training, and weights of another moment: not those that the
# learning rate in the file belongs to.
_ASIDE = frozenset({"ema", "swa", "average", "averaged", "avg", "polyak", "shadow", "best"})
# What stands beside a network in a wrapper without changing what the network computes.
_BESIDE = re.compile(
    r"(^|[._])(loss|losses|criterion|metrics?|acc\w*|auroc|f1|(train|val|valid|test)_\w+|ema"
    r"|\w*teacher\w*|n_averaged|num_batches_tracked)([._]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fitted:
    """Tensors for a model, by the names of `Target.tensors`; those it lacks keep their own values.

    ``entry``: the prefix in the file below which they lie. ``notes``: what a user should know.
    """

    tensors: dict[str, Tensor]
    entry: str
    notes: tuple[str, ...] = ()


def fit(contents: Contents, target: Target, where: str, entry: str | None = None) -> Fitted:
    """Return the tensors of a checkpoint that fit the model.

    Raises
    ------
    ValueError
        None fit (first few names and counts, and what the file holds), or several with different
        values do and it is not known which are meant.
    """
    ways = mappings(contents, target, entry)
    fitting = [way for way in ways if way.fits]
    if not fitting or _hides_another(fitting, ways):
        raise ValueError(_misfit(ways, contents, target, where, entry))
    chosen, notes = _choose(fitting, contents, where)
    _check_values(chosen, contents, target, where)
    left = _left_out(chosen, contents)
    if entry is not None:
        notes = []  # the caller has said which are meant
    elif left:
        notes.append(
            f"checkpoint ({where}): the weights below {chosen.prefix.rstrip('.')!r} are those of "
            f"the model; others beside them are left out: {_names(left)}"
        )
    tensors = {target.names[name]: contents.tensors[at] for name, at in chosen.pairs.items()}
    own = {name: tensor.detach() for name, tensor in target.tensors.items() if name not in tensors}
    return Fitted({**tensors, **own}, chosen.prefix, tuple(notes))


def _hides_another(fitting: Sequence[Mapped], ways: Sequence[Mapped]) -> bool:
    """Tell whether what fits lies inside weights that have all names of the model and more.

    A network that keeps a copy of itself (an average, a teacher) has both; which one is the model
    cannot be told from the names.
    """
    larger = [way for way in ways if not way.errors and way.unexpected]
    return all(
        any(one.prefix.startswith(other.prefix) or _aside(one.prefix) for other in larger)
        for one in fitting
    )


def _choose(fitting: Sequence[Mapped], contents: Contents, where: str) -> tuple[Mapped, list[str]]:
    different: list[Mapped] = []
    for way in fitting:
        if not any(_same(way, other, contents) for other in different):
            different.append(way)
    if len(different) == 1:
        passed = _passed_over(different[0], contents)
        if passed is None:
            return different[0], []
        return different[0], [
            f"checkpoint ({where}): weights under {passed!r} do not fit the model, those under "
            f"{different[0].prefix.rstrip('.')!r} do and are taken"
        ]
    names = " and ".join(repr(way.prefix.rstrip(".")) for way in different[:_SHOWN])
    running = [way for way in different if not _aside(way.prefix)]
    usual = [way for way in running if way.prefix.split(".")[0] in ("", *USUAL)]
    for kind in (running, usual):
        if len(kind) == 1 and len(fitting) < MANY:
            entry, other = kind[0].prefix.rstrip("."), next(w for w in different if w != kind[0])
            return kind[0], [
                f"checkpoint ({where}) holds different weights that fit the model under {names}; "
                f"those under {entry!r} are taken; Checkpoint(source, "
                f"entry={other.prefix.rstrip('.')!r}) takes others"
            ]
    raise ValueError(
        f"checkpoint ({where}) holds different weights that fit the model under {names}; choose "
        f"one with Checkpoint(source, entry={different[0].prefix.rstrip('.')!r}) or another"
    )


def _passed_over(chosen: Mapped, contents: Contents) -> str | None:
    """Return the usual place of weights in the file, where an average beside it is taken."""
    if not _aside(chosen.prefix):
        return None
    places = {contents.containers[name] for name in contents.weights()}
    usual = (name for name in places if name.rstrip(".") in USUAL and not _aside(name))
    return next((name.rstrip(".") for name in usual if not chosen.prefix.startswith(name)), None)


def _aside(prefix: str) -> bool:
    return not _ASIDE.isdisjoint(re.split(r"[._]", prefix.lower()))


def _same(one: Mapped, other: Mapped, contents: Contents) -> bool:
    if one.pairs.keys() != other.pairs.keys():
        return False
    pairs = ((one.pairs[name], other.pairs[name]) for name in one.pairs)
    return all(a == b or _equal(contents.tensors[a], contents.tensors[b]) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _check_values(chosen: Mapped, contents: Contents, target: Target, where: str) -> None:
    """Refuse tensors that are no plain numbers of the model's kind, and ties that do not hold."""
    first: dict[str, str] = {}
    for name, at in chosen.pairs.items():
        stored, own = contents.tensors[at], target.tensors[target.names[name]]
        plain = stored.layout == torch.strided and not (stored.is_quantized or stored.is_meta)
        kinds = (_kind(stored.dtype), _kind(own.dtype))
        rounded = kinds == ("number", "integer") and bool((stored == stored.round()).all())
        if not plain or (kinds[0] != kinds[1] and not rounded and own.numel()):
            if name.endswith("num_batches_tracked"):
                continue
            held = "no values (a meta tensor)" if stored.is_meta else str(stored.dtype)
            raise ValueError(
                f"checkpoint ({where}) does not fit the model: {at} holds {held}, and the model "
                f"{own.dtype}; quantised or packed weights need the model in the same form"
            )
        other = first.setdefault(target.names[name], at)
        if not _equal(contents.tensors[other], stored):
            raise ValueError(
                f"checkpoint ({where}) does not fit the model: it has different values for "
                f"{other} and {at}, which are one tied weight of the model"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "number" if dtype.is_floating_point else "integer"


def _left_out(chosen: Mapped, contents: Contents) -> list[str]:
    """Weights beside the chosen ones that belong to something which may change the result."""
    taken = set(chosen.pairs.values())
    containers = {contents.containers[name] for name in taken}
    return [
        name
        for name, tensor in contents.weights().items()
        if name not in taken
        and contents.containers[name] in containers
        and tensor.is_floating_point()
        and tensor.dim() >= 1
        and not name.startswith(chosen.prefix)
        and not _BESIDE.search(name[len(contents.containers[name]) :])
    ]


def _misfit(
    ways: Sequence[Mapped], contents: Contents, target: Target, where: str, entry: str | None
) -> str:
    start = f"checkpoint ({where}) does not fit the model"
    holds = f"; it holds {contents.keys}" if contents.keys else ""
    if entry is not None and not any(
        name.startswith(entry.rstrip(".") + ".") for name in contents.tensors
    ):
        return f"checkpoint ({where}) has no weights under entry {entry!r}{holds}"
    if not ways:
        weights = contents.weights()
        parts = [
            _listed(list(target.tensors), "missing"),
            _listed(list(weights), "unexpected"),
        ]
        if not weights:
            parts.append(
                "its tensors lie under names of optimisers, gradients and the like, which are "
                "searched with Checkpoint(source, entry=...) alone"
            )
        return f"{start}: {'; '.join(part for part in parts if part)}{holds}"
    best = min(ways, key=lambda way: (way.fits, way.errors, len(way.unexpected)))
    if best.misshapen and not best.missing and not best.unexpected:
        name = best.misshapen[0]
        shape = tuple(contents.tensors[best.pairs[name]].shape)
        own = tuple(target.tensors[target.names[name]].shape)
        return f"{start}: {name} has shape {shape}, in the model {own}"
    parts = [
        _listed(best.missing, "missing"),
        _listed(best.unexpected, "unexpected"),
        _listed(best.misshapen, "of another shape"),
    ]
    inner = next((way for way in ways if way.fits), None)
    if inner is not None:
        parts.append(
            f"others that fit it alone lie below {inner.prefix.rstrip('.')!r}: take those with "
            f"Checkpoint(source, entry={inner.prefix.rstrip('.')!r}), or save those of the model "
            "alone"
        )
    return f"{start}: {'; '.join(part for part in parts if part)}{holds}"


def _listed(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what} ({_names(names)})" if names else ""


def _names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
