"""The passes over one batch of a whole network: explicit gradients, traced norms, tangents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ._full_batches import Batch
from ._full_loss import OutputLoss, RowLosses
from ._norms.normalization import with_strides_of
from ._norms.recurrent import recurrent
from ._norms.tape import Plan, Tape
from ._norms.trace import RECURRENT, Trace, untraced_uses, whole_graph

Gradients = dict[int, Tensor]


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

    def forward(self, batch: Batch) -> Any:
        """Call the model."""
        return self.model(*batch.args, **batch.kwargs)

    def losses(self, outputs: Any, batch: Batch) -> RowLosses:
        """Losses of the rows of a batch."""
        return self.loss(outputs, batch.labels)

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


def explicit_gradients(network: Network, batch: Batch, only: Sequence[int] = ()) -> Gradients:
    """Gradient of the loss of a batch of one sample, by plain autograd: id -> tensor."""
    chosen = [p for p in network.parameters if not only or id(p) in only]
    with torch.enable_grad(), network.context():
        with _Sound():
            outputs = network.forward(batch)
        total = network.losses(outputs, batch).differentiable.sum() / batch.views
    if not total.requires_grad:
        return {id(p): torch.zeros_like(p) for p in chosen}
    found = torch.autograd.grad(total, chosen, allow_unused=True)
    return {
        id(p): torch.zeros_like(p) if g is None else g.detach()
        for p, g in zip(chosen, found, strict=True)
    }


def traced(
    network: Network, plan: Plan, batch: Batch, expanding: bool = True
) -> tuple[RowLosses, list[Tensor | None], Tape]:
    """One forward and backward pass: losses, summed gradients, and a tape with the norms.

    Parameters that the trace has missed are added to ``plan.others``, and the pass begins again.
    """
    while True:
        tape = Tape(plan, batch.rows, batch.samples, network.device)
        with torch.enable_grad(), network.context():
            with Trace(tape, expanding):
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
    return losses, list(gradients), tape


def missed(plan: Plan, total: Tensor) -> bool:
    """Find parameters with uses that no trace has seen; note them in the plan."""
    new = untraced_uses(total, plan.names) - plan.others.keys()
    for key in new:
        plan.others[key] = "used by an operation without a rule of its own"
    return bool(new)


class _Sound(TorchFunctionMode):
    """Keeps plain autograd clear of two faults.

    That of batch norm in `with_strides_of`; and cuDNN's recurrent layers have no backward in eval
    mode: they are written out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in RECURRENT and args[0].is_cuda:
            result = recurrent(F.linear, RECURRENT[func], args, kwargs or {})
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            return with_strides_of(args[0], result)
        return result


class Substitution(TorchFunctionMode):
    """Within this mode, every call gets other tensors in place of some: id -> tensor.

    Recurrent layers are written out, since their fused kernels know neither forward mode nor vmap.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Exchange the arguments of one call."""
        args = tuple(map(self._replaced, args))
        kwargs = {k: self._replaced(v) for k, v in kwargs.items()} if kwargs else {}
        if func in RECURRENT:
            result = recurrent(F.linear, RECURRENT[func], args, kwargs)
            if result is not NotImplemented:
                return result
        if func is F.batch_norm and args[0].dtype in (torch.float16, torch.bfloat16):
            # Its forward-mode rule gives a tangent of another dtype than the 16-bit result.
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        result = func(*args, **kwargs)
        if func is F.embedding:
            return _padding_held(result, *args, **kwargs)
        return result

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensors.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        return value


def _padding_held(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Take the tangent from the padding token's row: its gradient is 0 by definition."""
    primal, tangent = forward_ad.unpack_dual(result)
    if padding_idx is None or tangent is None:
        return result
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding[..., None], primal, result)


def alignment_forward(network: Network, batch: Batch, tangents: Gradients) -> RowLosses:
    """Losses and their derivatives along ``tangents`` by one forward-mode pass."""
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
        with _Sound():
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
