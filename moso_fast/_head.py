"""Finding the last layer of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

_SHOWN = 4


def find_head(model: nn.Module, head: str | nn.Module | None = None) -> tuple[str, nn.Linear]:
    """Return the name and the module of the last layer.

    Parameters
    ----------
    model
        The network, possibly wrapped (DataParallel, torch.compile).
    head
        Name or module; None asks the model (timm's ``get_classifier``, transformers'
        ``get_output_embeddings``), else takes the `nn.Linear` that is registered last, provided
        that no other module with parameters is registered after it.

    Raises
    ------
    TypeError
        ``head`` is no name, module or None, or names a module that is no `nn.Linear`.
    ValueError
        Not a module of the model, or none can be chosen; the message names the candidates.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    if isinstance(head, nn.Module):
        if id(head) not in names:
            raise ValueError(f"head ({type(head).__name__}) is no module of the model")
        return _checked(names[id(head)], head, "head")
    if isinstance(head, str):
        modules = dict(model.named_modules())
        if head not in modules:
            raise ValueError(f"head {head!r} is no module of the model; {_candidates(model)}")
        return _checked(head, modules[head], "head")
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
            return _checked(names[id(found)], found, f"head found by {method}()")
    with_parameters = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    if not with_parameters or not isinstance(with_parameters[-1][1], nn.Linear):
        last = "no module has parameters"
        if with_parameters:
            name, module = with_parameters[-1]
            last = f"the last module with parameters is {name!r} ({type(module).__name__})"
        raise ValueError(
            f"head cannot be found: {last}; choose one with head=; {_candidates(model)}"
        )
    return _checked(*with_parameters[-1], "head")


def _checked(name: str, module: nn.Module, what: str) -> tuple[str, nn.Linear]:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{what} {name!r} must be an nn.Linear, got {type(module).__name__}")
    return name, module


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
