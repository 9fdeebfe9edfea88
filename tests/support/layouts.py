"""What a layout of head, wrapper and labels is, and its scores by autograd: batch size 1, float64.

A layout is scored at three checkpoints: as it is, with all parameters moved, and with the head's
moved once more. The reference is the gradient of the model's own loss, of one sample at a time, by
the head's weight in force and bias (last layer), or by all parameters (full).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from moso_fast.scorer import MoSoScorer

# Of a layout that is there for the other gradient alone.
NOT_TRIED = ""

Loss = Callable[[nn.Module, Any, Tensor], Tensor]


def own_cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@dataclass
class Case:
    """A model, its samples [(input, label), ...], and how its loss is taken."""

    model: nn.Module
    data: Sequence[Any]
    head: nn.Module | None = None  # whose gradient is meant; None = what is chosen by itself
    loss: Loss = own_cross_entropy
    options: dict[str, Any] = field(default_factory=dict)
    full_options: dict[str, Any] = field(default_factory=dict)
    loader: Callable[[Sequence[Any]], Any] = list
    moved: bool = True  # False: scored as it is, at no checkpoint
    parameters: Callable[[nn.Module], list[Tensor]] | None = None


@dataclass
class Layout:
    """A name, how to build it, and what scoring it by the last layer does.

    ``last`` and ``full``: None = right, `NOT_TRIED`, or what the message of the refusal must hold.
    """

    name: str
    build: Callable[[], Case]
    last: str | None = None
    full: str | None = None
    tolerance: float = 1e-5
    library: str = "torch"


def states_of(case: Case, head: nn.Module) -> list[dict[str, Tensor]]:
    """Three state dicts: the model's own, all parameters moved, the head's moved again."""
    generator = torch.Generator().manual_seed(7)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return value * (1 + 0.2 * noise) + 0.1 * noise.flip(-1) if value.dim() else value * 1.3

    own = {n: v.detach().clone() for n, v in case.model.state_dict().items()}
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    within = {id(p) for p in head.parameters()}
    once, shared = dict(own), {}
    for name, p in parameters.items():
        if name in own:
            once[name] = shared.setdefault(id(p), moved(own[name]))
    twice, shared = dict(once), {}
    for name, p in parameters.items():
        if name in own and id(p) in within:
            twice[name] = shared.setdefault(id(p), moved(once[name]))
    return [own, once, twice]


def gradients(case: Case, model: nn.Module, state: dict[str, Tensor], of: str | None) -> Tensor:
    """(N, P) float64 gradients by the head called ``of``, or by all parameters where it is None."""
    model.load_state_dict(state)
    model = model.double().eval()
    if of is not None:  # also where an adapter is trained and the head is not
        model.get_submodule(of).requires_grad_(True)
    rows = []
    for x, y in case.data:
        x, y = to_double(batched(x)), to_double(torch.as_tensor(y))[None]
        with parametrize.cached():
            loss = case.loss(model, x, y)
            if of is None:
                wanted = [p for p in model.parameters() if p.requires_grad]
            elif case.parameters is not None:
                wanted = case.parameters(model)
            else:
                head = model.get_submodule(of)
                wanted = [head.weight, *([head.bias] if head.bias is not None else [])]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows)


def batched(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: batched(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(batched, value))
    return torch.as_tensor(value)[None]


def to_double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_double(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(to_double, value))
    return value.double() if value.is_floating_point() else value


def moso(g: Tensor) -> Tensor:
    """<mean gradient of the others, own gradient>."""
    total, n = g.sum(0), len(g)
    return torch.stack([((total - one) / (n - 1)) @ one for one in g])


def scorer_of(case: Case, gradient: str) -> MoSoScorer:
    options = {"batch_size": 8, **case.options}
    if gradient == "full":
        options = {**{k: v for k, v in options.items() if k != "head"}, **case.full_options}
    return MoSoScorer(case.model, gradient=gradient, progress=False, **options)


def errors(layout: Layout, gradient: str) -> list[float]:
    """Largest error of the scores at each checkpoint, relative to the largest score."""
    case = layout.build()
    scorer = scorer_of(case, gradient)
    head = case.head
    if head is None:
        head = scorer.head if gradient == "last_layer" else None
    states = [{n: v.detach().clone() for n, v in case.model.state_dict().items()}]
    if case.moved:
        states = states_of(case, head if head is not None else nn.Module())
    data = case.loader(case.data)
    # Scored as it was given where there is one state: nothing needs to be exchanged.
    table = scorer.score(data, states if case.moved else None)
    of = None
    if gradient == "last_layer":
        of = next(name for name, m in case.model.named_modules() if m is scorer.head)
    found = []
    for k, state in enumerate(states):
        want = moso(gradients(case, layout.build().model, state, of))
        got = table.per_checkpoint["score"][k].double()
        found.append(float((got - want).abs().max() / want.abs().max()))
    return found


def one_by_one(data: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=1)  # type: ignore[arg-type]


def check(layout: Layout, gradient: str) -> None:
    """Fail unless the scores are right, or refused in one line that says what was seen."""
    wanted = layout.last if gradient == "last_layer" else layout.full
    if wanted is None:
        assert max(errors(layout, gradient)) < layout.tolerance
        return
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        errors(layout, gradient)
    message = str(caught.value)
    assert wanted in message
    assert "\n" not in message
