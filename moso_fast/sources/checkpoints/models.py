"""From what a checkpoint holds to the tensors of a given model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .contents import contents_of
from .fit import Fitted, fit
from .libraries import adapter_tensors, converted, pretrained_network
from .names import Target, mappings, target_of

if TYPE_CHECKING:
    from .checkpoint import LoadedCheckpoint


def fitted(
    model: nn.Module,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    loaded: LoadedCheckpoint,
) -> Fitted:
    """Return the tensors of a checkpoint by the model's names.

    Parameters
    ----------
    model
        The network.
    names, tensors
        State-dict name -> name under which its tensor is known (tied weights share one), and that
        name -> the model's tensor.
    loaded
        As `checkpoints.read` returns it.

    Raises
    ------
    ValueError
        The weights do not fit the model, or several do; the message says what the file holds.
    """
    where = loaded.description
    if loaded.adapter is not None:
        found = adapter_tensors(model, loaded.contents.tensors, loaded.adapter, names, where)
        own = {name: t.detach() for name, t in tensors.items() if name not in found}
        return Fitted({**own, **found}, "adapter; base weights as given")
    target = target_of(model, names, tensors)
    try:
        return fit(loaded.contents, target, where, loaded.entry)
    except ValueError:
        state = None if loaded.entry else _renamed(model, loaded, target)
        by = "torch"
        if state is None and loaded.entry is None and pretrained_network(model) is not None:
            state, by = converted(model, loaded.contents), "transformers"
        if state is None:
            raise
    result = fit(contents_of(state, where), target, where)
    return replace(result, entry=f"{result.entry or 'names'} converted by {by}")


def _renamed(
    model: nn.Module, loaded: LoadedCheckpoint, target: Target
) -> dict[str, Tensor] | None:
    """Return the tensors by the names into which torch's own load hooks turn older ones.

    Such are those of weight norm, which became a parametrization. Hooks of others are left alone:
    they may write to the model. None where the model has no such hooks, or they change nothing.
    """
    hooks = [
        (name, hook)
        for name, module in model.named_modules()
        for hook in module._load_state_dict_pre_hooks.values()
        if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.nn.utils.")
    ]
    ways = mappings(loaded.contents, target)
    if not hooks or not ways:
        return None
    prefix = ways[0].prefix
    state = {
        name[len(prefix) :]: tensor
        for name, tensor in loaded.contents.weights().items()
        if name.startswith(prefix)
    }
    before = set(state)
    for name, hook in hooks:
        hook(state, f"{name}." if name else "", {}, True, [], [], [])
    return None if set(state) == before else state
