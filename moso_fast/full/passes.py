"""The passes over one batch of a whole network: explicit gradients, traced norms, tangents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..util.forward_mode import load_forward_mode
from .batches import Batch
from .chunks import out_of_memory
from .loss import OutputLoss, RowLosses
from .modes import Sound, Substitution
from .norms.checkpointing import whole_graph
from .norms.tape import Plan, Tape, UnknownCall
from .norms.trace import Trace, leaves, untraced_uses

Gradients = dict[int, Tensor]


class NoOtherOrder(Exception):
    """A model that takes samples in the order of the batch alone; the cause is its own error."""


class Network:
    """A model, its loss and the parameters whose gradients count.

    Parameters
    ----------
    model, loss
        The network and the loss of its outputs.
    parameters
        Name -> parameter, each once.
    device, dtype
        Where, and for floating-point inputs in which dtype, the model runs.
    autocast
        16-bit dtype of `torch.autocast` for forward passes; None takes the caller's, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: OutputLoss,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.names = {id(p): name for name, p in parameters.items()}
        self.parameters = list(parameters.values())
        if autocast is None and torch.is_autocast_enabled(device.type):
            autocast = torch.get_autocast_dtype(device.type)
        self.device, self.dtype, self.autocast = device, dtype, autocast
        #: Whether a row that is alone goes through the model twice; None = not known yet.
        self.pairs: bool | None = None

    def enough(self, batch: Batch) -> Batch:
        """Return the rows that the model is given for those of ``batch``: two where one fails.

        A bare ``.squeeze()`` takes the samples' own dimension away from a batch of one.
        """
        if self.pairs and batch.rows == 1:
            return batch.take(torch.tensor([0, 0], device="cpu"))
        return batch

    def forward(self, batch: Batch) -> Any:
        """Call the model."""
        given = self.enough(batch)
        return self.model(*given.args, **given.kwargs)

    def losses(self, outputs: Any, batch: Batch) -> RowLosses:
        """Losses of the rows of a batch."""
        given = self.enough(batch)
        losses = self.loss(outputs, given.labels)
        return losses if given is batch else losses.first(batch.rows)

    def context(self, plain_attention: bool = False) -> contextlib.ExitStack:
        """Open the surroundings of a pass: the whole graph, and autocast without its cache.

        The cache would hide how often a weight is used, and outlive the checkpoint.
        """
        stack = contextlib.ExitStack()
        stack.enter_context(whole_graph())
        if plain_attention:
            # The fused kernels have neither a forward-mode nor a second derivative, nor vmap.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.autocast is not None:
            kind = self.device.type
            stack.enter_context(torch.autocast(kind, self.autocast, cache_enabled=False))
        return stack

    def per_sample(self, rows: Tensor, batch: Batch) -> Tensor:
        """Mean over the views of each sample."""
        return rows if batch.views == 1 else rows.reshape(batch.samples, -1).mean(1)


def explicit_gradients(
    network: Network, batch: Batch, only: Sequence[int] = (), whole: bool = False
) -> Gradients:
    """Gradient of the loss of a batch of one sample, by plain autograd: id -> tensor.

    ``whole``: the backward pass also goes where it leads to none of the parameters.
    """
    chosen = [p for p in network.parameters if not only or id(p) in only]
    with torch.enable_grad(), network.context():
        with Sound():
            outputs = network.forward(batch)
        total = network.losses(outputs, batch).differentiable.sum() / batch.views
    if not total.requires_grad:
        return {id(p): torch.zeros_like(p) for p in chosen}
    others = leaves(total, {id(p) for p in chosen}) if whole else []
    found = torch.autograd.grad(total, [*chosen, *others], allow_unused=True)[: len(chosen)]
    return {
        id(p): torch.zeros_like(p) if g is None else dense(g.detach())
        for p, g in zip(chosen, found, strict=True)
    }


@contextlib.contextmanager
def keeps_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Run explicit gradients; raise ValueError where the model keeps some of them to itself.

    Gradient checkpointing of a model's own may run a backward pass within the backward pass: what
    that finds lands in ``parameter.grad``, and plain autograd does not return it.
    """
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
        if any(p.grad is not None for p in parameters):
            raise ValueError(
                "model: its backward pass writes to the gradients of parameters instead of "
                "returning them, as some gradient checkpointing does; switch that off to score it"
            )
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


def traced(
    network: Network, plan: Plan, batch: Batch, expanding: bool = True, marked: bool = False
) -> tuple[RowLosses, list[Tensor | None], Tape]:
    """One forward and backward pass: losses, summed gradients, and a tape with the norms.

    Parameters that the trace has missed are added to ``plan.others``, and the pass begins again.
    ``marked``: the tape also tells the samples in the calls' outputs apart (see `order_changes`).
    """
    while True:
        trace, tape = new_trace(network, plan, batch, expanding, marked)
        with torch.enable_grad(), network.context():
            with trace:
                outputs = network.forward(batch)
            network.loss.check(outputs, batch.labels, batch.index, batch.views)
            losses = network.losses(outputs, batch)
            total = losses.differentiable.sum() / batch.views
        if not total.requires_grad:
            return losses, [None] * len(network.parameters), tape
        if not missed(plan, total):
            break
    gradients = torch.autograd.grad(total, network.parameters, allow_unused=True)
    tape.finish()
    return losses, [None if g is None else dense(g) for g in gradients], tape


def new_trace(
    network: Network,
    plan: Plan,
    batch: Batch,
    expanding: bool,
    marked: bool = False,
    probing: bool = False,
) -> tuple[Trace, Tape]:
    """Make a trace for a pass of ``batch``, and the tape that it writes to (see `Tape`)."""
    given = network.enough(batch)
    tape = Tape(plan, given.rows, given.samples, network.device, probing, expanding)
    tape.marks = {} if marked else None
    trace = Trace(tape)
    trace.know_packed((given.args, given.kwargs))
    return trace, tape


def order_changes(
    network: Network, plan: Plan, batch: Batch, tape: Tape, expanding: bool, tolerance: float
) -> set[int]:
    """Find calls in which the samples do not lie as they do in the batch: ids of their parameters.

    The batch goes through the model once more, the last sample first. What a call makes of a sample
    must be where that sample is now, and is what it was, up to rounding.

    Raises
    ------
    NoOtherOrder
        The model fails for the samples in that order.
    """
    assert tape.marks is not None
    turned = batch.take(torch.arange(batch.samples, device="cpu").flip(0))
    trace, again = new_trace(network, plan, turned, expanding, True)
    with torch.no_grad(), network.context(), trace:
        try:
            network.forward(turned)
        except UnknownCall:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise NoOtherOrder from error
    assert again.marks is not None
    if [call.key for call, _, _ in tape.calls] != [call.key for call, _, _ in again.calls]:
        return {key for _, _, used in (*tape.calls, *again.calls) for key in used}
    wrong: set[int] = set()
    for call, _, used in tape.calls:
        one, other = tape.marks.get(call.number), again.marks.get(call.number)
        if one is None or other is None:
            wrong.update(used)
            continue
        scale = one.abs().max().clamp_min(1e-30)
        if not bool(((one - other.flip(0)).abs() <= tolerance * scale).all()):
            wrong.update(used)
    return wrong


def dense(gradient: Tensor) -> Tensor:
    """Fill a gradient with the zeros that it leaves out."""
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def missed(plan: Plan, total: Tensor) -> bool:
    """Find parameters with uses that no trace has seen; note them in the plan."""
    new = untraced_uses(total, plan.names) - plan.others.keys()
    for key in new:
        plan.others[key] = "used by an operation without a rule of its own"
    return bool(new)


def alignment_forward(network: Network, batch: Batch, tangents: Gradients) -> RowLosses:
    """Losses and their derivatives along ``tangents`` by one forward-mode pass."""
    load_forward_mode()
    with torch.no_grad(), network.context(True), forward_ad.dual_level():
        duals = {
            id(p): forward_ad.make_dual(p.detach(), tangents[id(p)]) for p in network.parameters
        }
        with Substitution(duals):
            outputs = network.forward(batch)
        losses = network.losses(outputs, batch)
        if losses.tangent is None:
            losses.tangent = torch.zeros_like(losses.loss)
        return losses


def alignment_double_backward(network: Network, batch: Batch, tangents: Gradients) -> RowLosses:
    """Compute the same by differentiating <sum of v_i g_i, tangents> with respect to v."""
    with torch.enable_grad(), network.context(True):
        with Sound():
            outputs = network.forward(batch)
        losses = network.losses(outputs, batch)
        rows = losses.differentiable
        weights = torch.ones_like(rows, requires_grad=True)
        found = torch.autograd.grad(
            rows, network.parameters, weights, create_graph=True, allow_unused=True
        )
    with torch.enable_grad():
        total = [
            (g * tangents[id(p)]).sum()
            for p, g in zip(network.parameters, found, strict=True)
            if g is not None and g.requires_grad
        ]
        product = torch.stack(total).sum() if total else (weights * 0).sum()
    (losses.tangent,) = torch.autograd.grad(product, weights)
    return losses
