"""All parameters of a network: ours, one forward-mode derivative, and the authors' loop."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...scorer import MoSoScorer
from ...util.forward_mode import load_forward_mode
from ..cases import Case
from ..inputs import Inputs
from ..networks import per_sample_gradient
from .autograd import two_passes, vmap_job
from .base import Job, Provider
from .ours import NAMES, OURS

__all__ = ["PROVIDERS"]

_BATCH = 256


def _ours(case: Case, inputs: Inputs) -> Job:
    """Score through the public scorer, data loader included."""
    assert inputs.model is not None
    scorer = MoSoScorer(inputs.model, gradient="full", progress=False)
    loader = DataLoader(TensorDataset(inputs.features, inputs.labels), batch_size=_BATCH)

    def run() -> dict[str, Tensor]:
        metrics = scorer.score(loader).metrics
        return {name: metrics[name] for name in NAMES}

    return run


def _loop(case: Case, inputs: Inputs) -> Job:
    """Batch size 1 and two passes, as the authors' script does it."""
    model = inputs.model
    assert model is not None
    parameters = list(model.parameters())
    samples = zip(inputs.features, inputs.labels, strict=True)
    gradients = [partial(per_sample_gradient, model, parameters, x, y) for x, y in samples]
    return lambda: two_passes(gradients)


def _vmap(case: Case, inputs: Inputs) -> Job:
    model = inputs.model
    assert model is not None
    point = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss_of(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, (p, buffers), x[None]), y[None])

    return vmap_job(loss_of, point, inputs.features, inputs.labels)


def _jvp(case: Case, inputs: Inputs) -> Job:
    """Mean gradient by one backward pass of everything, alignments along it."""
    model = inputs.model
    assert model is not None
    point: dict[str, Tensor] = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def losses(p: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, (p, buffers), inputs.features)
        return F.cross_entropy(logits, inputs.labels, reduction="none")

    load_forward_mode()

    def run() -> dict[str, Tensor]:
        grads = torch.autograd.grad(losses(point).mean(), list(point.values()))
        plain = {name: p.detach() for name, p in point.items()}
        with torch.no_grad():
            tangents = dict(zip(point, grads, strict=True))
            loss, alignment = torch.func.jvp(losses, (plain,), (tangents,))[:2]
        return {"loss": loss, "alignment": alignment}

    return run


_KINDS = frozenset({"network"})
PROVIDERS = (
    Provider(OURS, "ours", _KINDS, _ours),
    Provider("torch.func.jvp", "plain", _KINDS, _jvp, note="no norms"),
    Provider("torch.func.vmap(grad)", "autograd", _KINDS, _vmap),
    Provider("autograd, batch size 1", "autograd", _KINDS, _loop),
)
