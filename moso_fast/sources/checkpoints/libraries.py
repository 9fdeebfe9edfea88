"""Weights that only the library that saved them can name: transformers and peft.

Both are imported here, inside the functions, and only for models of theirs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .contents import Contents

# What decides the result of an adapter beside its weights.
_ADAPTER_FACTS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "num_virtual_tokens",
)
_SHOWN = 3


def adapted_network(model: nn.Module) -> nn.Module | None:
    """Return the outermost PeftModel in ``model``; None where there is none."""
    return next((m for m in model.modules() if _is_peft(m)), None)


def _is_peft(module: nn.Module) -> bool:
    return any(c.__module__.startswith("peft.") and c.__name__ == "PeftModel" for c in _mro(module))


def _mro(module: nn.Module) -> tuple[type, ...]:
    return type(module).__mro__


def adapter_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Mapping[str, str],
    where: str,
) -> dict[str, Tensor]:
    """Return tensors of a saved adapter by the model's names; the base is the model's own.

    Parameters
    ----------
    model
        The network, with a PeftModel that has the adapter in it.
    tensors, config
        What the adapter's file and its ``adapter_config.json`` hold.
    names
        State-dict name -> name under which a tensor of the model is known.
    where
        For messages.

    Raises
    ------
    ValueError
        A model without an adapter or with several, another kind of adapter (rank, scaling), or
        names and shapes that are not those of the model's adapter.
    """
    start = f"checkpoint ({where}) holds a peft adapter without its base model"
    network: Any = adapted_network(model)
    if network is None:
        raise ValueError(
            f"{start}; give the scorer the adapted model: "
            "peft.PeftModel.from_pretrained(base_model, folder)"
        )
    active = list(getattr(network, "active_adapters", None) or [network.active_adapter])
    if len(active) != 1:
        raise ValueError(f"{start}, and the model has {len(active)} active adapters; set one")
    _check_in_use(network, start)
    own = network.peft_config[active[0]].to_dict()
    for fact in _ADAPTER_FACTS:
        mine, stored = _plain(own.get(fact)), _plain(config.get(fact))
        if fact in config and mine != stored:
            raise ValueError(
                f"{start}, and {fact} of the adapter is {stored} there and {mine} in the model; "
                "build the model with the adapter's own configuration"
            )
    saved = _saved_names(network, active[0], tensors)
    by_tensor = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
    result: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in saved.items():
        at = by_tensor.get(id(tensor))
        if at is None or name not in tensors or tensors[name].shape != tensor.shape:
            wrong.append(name)
        else:
            result[names[at]] = tensors[name]
    unexpected = [name for name in tensors if name not in saved]
    if wrong or unexpected or not result:
        parts = [
            f"{len(some)} {what} ({', '.join(some[:_SHOWN])})"
            for some, what in ((wrong, "missing or of another shape"), (unexpected, "unexpected"))
            if some
        ]
        raise ValueError(f"{start}, and does not fit the model's adapter: {'; '.join(parts)}")
    return result


def _check_in_use(network: Any, start: str) -> None:
    """Refuse a network whose forward pass would not use the adapter's weights that are loaded."""
    # Asked of the class: peft's wrappers hand on the attributes of the module that they wrap.
    layers = [
        m for m in network.modules() if any(c.__module__.startswith("peft.") for c in _mro(m))
    ]
    if any(hasattr(type(m), "merged") and m.merged for m in layers):
        raise ValueError(
            f"{start}, and the model's adapter is merged into its base weights, which would be "
            "scored in place of the checkpoint's; call unmerge_adapter() of the PeftModel first"
        )
    if any(hasattr(type(m), "disable_adapters") and m.disable_adapters for m in layers):
        raise ValueError(
            f"{start}, and the model's adapter is disabled, so that it would not be scored; call "
            "enable_adapter_layers() of the PeftModel's base_model, or leave disable_adapter()"
        )


def _saved_names(network: Any, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name, as peft saves it, of each of the network's tensors that belong to the adapter."""
    from peft import get_peft_model_state_dict

    own = network.state_dict(keep_vars=True)
    # Embeddings are saved with some adapters; whether they were shows in the file alone.
    plain, whole = (
        get_peft_model_state_dict(
            network, state_dict=dict(own), adapter_name=adapter, save_embedding_layers=embeddings
        )
        for embeddings in (False, True)
    )
    return whole if tensors.keys() & (whole.keys() - plain.keys()) else plain


def _plain(value: Any) -> Any:
    """Return a setting as JSON would hold it."""
    value = getattr(value, "value", value)
    return value or None if isinstance(value, (dict, list, set, tuple)) else value


def pretrained_network(model: nn.Module) -> nn.Module | None:
    """Return the outermost model of transformers in ``model``; None where there is none."""
    for module in model.modules():
        if any(
            c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel"
            for c in _mro(module)
        ):
            return module
    return None


def converted(model: nn.Module, contents: Contents) -> dict[str, Tensor] | None:
    """Return the state dict of the transformers model in ``model``, loaded by the library itself.

    transformers saves some architectures under other names than their ``state_dict()`` has, or in
    other pieces (experts, fused projections), and turns them back on loading. None where the model
    is none of transformers', or its library does not take all of the weights.
    """
    network: Any = pretrained_network(model)
    if network is None or getattr(network.config, "quantization_config", None) is not None:
        return None
    state = {
        name.removeprefix(_container(contents)): tensor
        for name, tensor in contents.weights().items()
    }
    widest = torch.float64 if any(t.dtype == torch.float64 for t in state.values()) else None
    with torch.random.fork_rng(devices=[]), _quiet():
        try:
            loaded, report = type(network).from_pretrained(
                None,
                config=copy.deepcopy(network.config),
                state_dict=state,
                # Wide enough for every stored value; the scorer brings it to the model's dtype.
                dtype=widest or torch.float32,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError):
            return None  # shapes that differ: the caller's own error names them
    if any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    return {name: tensor.detach() for name, tensor in loaded.state_dict().items()}


def _container(contents: Contents) -> str:
    """Return the dictionary of the file that all weights lie in; empty where it is the file."""
    found = {contents.containers[name] for name in contents.weights()}
    return found.pop() if len(found) == 1 else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's report of the loading from the terminal: errors here say what is wrong."""
    logger = logging.getLogger("transformers")
    before, bars = logger.level, _progress_bars()
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars is not None:
            bars()


def _progress_bars() -> Any:
    """Switch the library's progress bars off; returns what switches them on again, if they were."""
    from transformers.utils import logging as library

    if not getattr(library, "is_progress_bar_enabled", lambda: False)():
        return None
    library.disable_progress_bar()
    return library.enable_progress_bar
