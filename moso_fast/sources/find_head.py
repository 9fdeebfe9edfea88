"""Finding the last layer of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

_SHOWN = 4

#: The way out wherever the last layer cannot be scored by itself.
FULL_GRADIENT = "use gradient='full'"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_head(model: nn.Module, head: str | nn.Module | None = None) -> tuple[str, nn.Module]:
    """Return the name and the module of the last layer: an `nn.Linear` or a 1 x 1 convolution.

    Parameters
    ----------
    model
        The network, possibly wrapped (DataParallel, torch.compile).
    head
        Name or module; None asks the model (timm's ``get_classifier``, transformers'
        ``get_output_embeddings``), else takes the `nn.Linear` or 1 x 1 convolution that is
        registered last, provided that no other module with parameters is registered after it.

    Raises
    ------
    TypeError
        ``head`` is no name, module or None, or names a module that is no `nn.Linear`.
    ValueError
        Not a module of the model, or none can be chosen; the message names the candidates. A head
        under an adapter of peft (LoRA) that is not merged: what is trained is the adapter.
    """
    return _without_adapter(model, *_find(model, head))


def _find(model: nn.Module, head: str | nn.Module | None) -> tuple[str, nn.Module, str]:
    """Name and module, not checked yet, and how messages call it."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    if isinstance(head, nn.Module):
        if id(head) not in names:
            raise ValueError(f"head ({type(head).__name__}) is no module of the model")
        return names[id(head)], head, "head"
    if isinstance(head, str):
        modules = dict(model.named_modules(remove_duplicate=False))  # also its other names
        if head not in modules:
            raise ValueError(f"head {head!r} is no module of the model; {_candidates(model)}")
        return head, modules[head], "head"
    if head is not None:
        raise TypeError(f"head must be a name, a module or None, got {type(head).__name__}")
    inner = unwrapped(model)
    for method in ("get_classifier", "get_output_embeddings"):
        found = _asked(inner, method)
        if isinstance(found, (tuple, list)):
            raise ValueError(
                f"head: {method}() gives {len(found)} modules; choose one with head=; "
                f"{_candidates(model)}"
            )
        if isinstance(found, nn.Module) and id(found) in names:
            return names[id(found)], found, f"head found by {method}()"
    with_parameters = [
        _owner(model, name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    if not with_parameters or not _is_head(with_parameters[-1][1]):
        last = "no module has parameters"
        if with_parameters:
            name, module = with_parameters[-1]
            last = f"the last module with parameters is {name!r} ({type(module).__name__})"
        raise ValueError(
            f"head cannot be found: {last}; choose one with head=; {_candidates(model)}"
        )
    return *with_parameters[-1], "head"


def _owner(model: nn.Module, name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Return the module whose weight a parametrization computes, or the module itself."""
    owner = f".{name}".partition(".parametrizations.")[0][1:]
    return (name, module) if owner == name else (owner, model.get_submodule(owner))


def is_convolution(module: nn.Module) -> bool:
    """Tell whether ``module`` is a convolution, whose features are dimension 1."""
    return isinstance(module, _CONVOLUTIONS)


def _is_head(module: nn.Module) -> bool:
    """Tell whether ``module`` is a linear map of each position's features."""
    if not isinstance(module, _CONVOLUTIONS):
        return isinstance(module, nn.Linear)
    sizes = {
        *((k, 1) for k in (*module.kernel_size, *module.stride, module.groups)),
        *((p, 0) for p in module.padding if not isinstance(module.padding, str)),
    }
    return all(size == wanted for size, wanted in sizes)


def _checked(name: str, module: nn.Module, what: str) -> tuple[str, nn.Module]:
    if not _is_head(module):
        raise TypeError(f"{what} {name!r} must be an nn.Linear, got {type(module).__name__}")
    return name, module


def _without_adapter(
    model: nn.Module, name: str, module: nn.Module, what: str
) -> tuple[str, nn.Module]:
    """Return the linear map inside a wrapper of peft; refuse one with an adapter in force."""
    parts = name.split(".")
    for end in range(len(parts) + 1):
        path = ".".join(parts[:end])
        wrapper: Any = model.get_submodule(path)
        if not type(wrapper).__module__.startswith("peft."):
            continue
        kind, prefix = type(wrapper).__name__, f"{path}." if path else ""
        if isinstance(getattr(wrapper, "base_layer", None), nn.Module):
            if not wrapper.merged and not wrapper.disable_adapters:
                raise ValueError(
                    f"head {path!r} has an adapter (peft's {kind}), whose weights are trained "
                    "instead of its own, so the last layer has no gradient by itself; "
                    f"{FULL_GRADIENT}, or call merge_and_unload() first"
                )
            return _checked(f"{prefix}base_layer", wrapper.base_layer, what)
        saved = getattr(wrapper, "modules_to_save", None)
        if wrapper is module and isinstance(saved, nn.ModuleDict):
            active: Any = wrapper.active_adapter
            active = active[0] if isinstance(active, list) else active
            return _checked(f"{prefix}modules_to_save.{active}", saved[active], what)
    return _checked(name, module, what)


def describe_head(model: nn.Module, head: nn.Module) -> dict[str, Any]:
    """Return what a reader of the scores must know of the head's weights, in words.

    A *tied* weight is used elsewhere in the model too, and a *computed* one is made of other
    parameters in every forward pass (weight_norm, pruning, a parametrization).
    """
    facts: dict[str, Any] = {}
    weight = head._parameters.get("weight")
    if weight is None:
        facts["weight"] = (
            "computed from other parameters; the score is of the weight in force, not of these"
        )
        return facts
    own = {id(p) for p in head.parameters()}
    inside = {id(module) for module in head.modules()}
    tied = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) not in inside
        for key, p in module._parameters.items()
        if p is not None and (id(p) in own or _same_storage(p, weight))
    ]
    if tied:
        facts["tied"] = (
            f"weight is shared with {', '.join(tied)}; the score is of the head's own use of it"
        )
    return facts


def _same_storage(one: nn.Parameter, other: nn.Parameter) -> bool:
    if one.shape != other.shape or one.device != other.device or one.device.type == "meta":
        return False
    return bool(one.numel()) and one.data_ptr() == other.data_ptr()


def _asked(model: nn.Module, method: str) -> Any:
    ask = getattr(model, method, None)
    if not callable(ask):
        return None
    try:
        return ask()
    except NotImplementedError:  # how transformers answers for models without one
        return None


def _candidates(model: nn.Module) -> str:
    linear = [
        f"{name!r} ({m.in_features} -> {m.out_features})"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    if not linear:
        return "the model has no nn.Linear"
    more = "..., " if len(linear) > _SHOWN else ""
    return f"its nn.Linear modules are {more}{', '.join(linear[-_SHOWN:])}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel and torch.compile."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def predicts_next_token(model: nn.Module) -> bool:
    """Tell whether ``model`` is a causal language model as transformers names them."""
    endings = ("ForCausalLM", "LMHeadModel")
    return any(c.__name__.endswith(endings) for c in type(unwrapped(model)).__mro__)
