"""Whole-network scores of models with gradient checkpointing: as if there were none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from full_cases import CLASSES, data, gradients, scores
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import TensorDataset

from moso_fast.full.norms import checkpointing
from moso_fast.scorer import MoSoScorer

N = 13


class Net(nn.Module):
    """``way`` runs the body; None runs it as it is."""

    def __init__(self, way: Callable[[nn.Sequential, Tensor], Tensor] | None) -> None:
        super().__init__()
        layers = [nn.Linear(48, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()]
        self.body, self.fc, self.way = nn.Sequential(*layers), nn.Linear(6, CLASSES), way

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :48]
        return self.fc(self.body(x) if self.way is None else self.way(self.body, x))


def net(way: Callable[[nn.Sequential, Tensor], Tensor] | None) -> Net:
    torch.manual_seed(0)
    return Net(way).double()


def recompute(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def nested(body: nn.Sequential, x: Tensor) -> Tensor:
    def run(z: Tensor) -> Tensor:
        inner = checkpoint(body[:3], z, use_reentrant=False)
        return checkpoint(body[3:], inner, use_reentrant=False)

    return checkpoint(run, x, use_reentrant=False)


contexts = functools.partial(create_selective_checkpoint_contexts, recompute)
WAYS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "reentrant": lambda body, x: checkpoint(body, x, use_reentrant=True),
    "not reentrant": lambda body, x: checkpoint(body, x, use_reentrant=False),
    "in segments": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=False),
    "in reentrant segments": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=True),
    "nested": nested,
    "selective": lambda body, x: checkpoint(body, x, use_reentrant=False, context_fn=contexts),
    "without early stop": lambda body, x: checkpoint(
        body, x, use_reentrant=False, early_stop=False, determinism_check="none"
    ),
}


def check(model: nn.Module) -> None:
    inputs, labels = data("cnn", N)
    g = gradients(net(None), inputs, labels)
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False)
    table = scorer.score(TensorDataset(inputs, labels))
    torch.testing.assert_close(table.scores, scores(g, "moso"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1))
    assert table.provenance["norms_explicit"] == []
    assert table.provenance["alignment"] == "forward mode"


@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_models(way: str) -> None:
    check(net(WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_releases_that_call_their_generator_by_another_name(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they drop is kept then, by their hooks."""
    if way == "nested" and hasattr(torch.utils.checkpoint, "_NoopSaveInputs"):
        # It has no forward mode. Later releases do without it; the names of earlier ones are known.
        pytest.skip("a generator of torch 2.9, whose name is known, saves inputs in its own way")
    monkeypatch.setattr(checkpointing, "_GENERATORS", ())
    check(net(WAYS[way]))


def test_wrappers_of_modules() -> None:
    from torch.distributed._composable import checkpoint as composable
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = net(None)
    wrapped.body = checkpoint_wrapper(wrapped.body)
    check(wrapped)
    composed = net(None)
    composable(composed.body)
    check(composed)


def test_torch_is_left_as_it_was() -> None:
    module: Any = torch.utils.checkpoint
    hook = module._checkpoint_hook

    def state() -> list[Any]:
        names = [n for n in checkpointing._GENERATORS if hasattr(module, n)]
        found = [vars(module)[n] for n in names]
        return [*found, *(vars(hook).get(n) for n in ("__enter__", "__exit__", "apply"))]

    before, applied = state(), "apply" in vars(module.CheckpointFunction)
    with checkpointing.whole_graph():
        assert state() != before
    assert state() == before
    assert ("apply" in vars(module.CheckpointFunction)) == applied


class Own(torch.autograd.Function):
    """A checkpoint of one's own, whose backward pass leaves gradients where they land."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x.detach()
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            ctx.run(ctx.x).backward(gradients[0])
        return None, None


def test_gradients_that_plain_autograd_does_not_return() -> None:
    def way(body: nn.Sequential, x: Tensor) -> Tensor:
        return Own.apply(body, x.requires_grad_(torch.is_grad_enabled()))

    model, (inputs, labels) = net(way), data("cnn", N)
    model.fc.weight.grad = kept = torch.ones_like(model.fc.weight)
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False)
    with pytest.raises(ValueError, match="writes to the gradients of parameters instead of"):
        scorer.score(TensorDataset(inputs, labels))
    assert model.fc.weight.grad is kept
    assert all(p.grad is None for p in model.body.parameters())
