"""Which parameters of a network count."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

Scope = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


def choose_parameters(model: nn.Module, scope: Scope = None) -> dict[str, nn.Parameter]:
    """Return the parameters whose gradients count, by name: those in scope that require grad.

    Parameters
    ----------
    model
        The network.
    scope
        None (all), a name or several (of parameters or modules, or patterns such as
        ``"*.lora_?.*"``), or a predicate ``(name, parameter) -> bool``.

    Raises
    ------
    TypeError, ValueError
        A scope of another kind, a name that matches nothing, nothing left.
    """
    free = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if scope is None:
        chosen = free
    elif callable(scope):
        chosen = {n: p for n, p in free.items() if scope(n, p)}
    elif isinstance(scope, (str, list, tuple, set)):
        patterns = [scope] if isinstance(scope, str) else list(scope)
        chosen = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"scope must hold names, got {type(pattern).__name__}")
            found = {n: p for n, p in free.items() if _matches(n, pattern)}
            if not found:
                known = ", ".join(list(free)[:4]) or "none"
                raise ValueError(
                    f"scope {pattern!r} matches no parameter that requires grad; the first are "
                    f"{known}"
                )
            chosen |= found
        chosen = {n: p for n, p in free.items() if n in chosen}
    else:
        raise TypeError(
            "scope must be None, names or a predicate (name, parameter), "
            f"got {type(scope).__name__}"
        )
    if not chosen:
        what = "requires grad" if scope is None else "is in scope"
        raise ValueError(f"model: no parameter {what}, so there is no gradient to score")
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


@contextmanager
def only_these_require_grad(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Run the block with gradients for ``parameters`` alone; what is frozen costs nothing."""
    wanted = {id(p) for p in parameters}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
