"""What a checkpoint holds, whatever its layout: tensors by their dotted names, and facts.

A file is a tree of dictionaries. Its tensors are named by the way to them: the weight
``0.weight`` under ``state_dict`` is ``state_dict.0.weight``. Containers are then prefixes like
those of wrappers, and one search for the prefix (`names`) finds the weights in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .pickled import StandIn, module_state, plain_value
from .rates import ParameterGroup, groups_of

# Deeper dictionaries than any known layout has them are not searched.
_DEPTH = 5
_SHOWN = 12
# Where training scripts put the weights inside the dictionary that they save.
USUAL = ("state_dict", "model_state_dict", "model", "net")
# What these hold has names of parameters and is no weights.
_NOT_WEIGHTS = re.compile(
    r"(^|[._])(opt|optim\w*|\w*sched\w*|scaler|rng|grads?|gradients?|momentum\w*|exp_avg\w*|fisher|hessian"
    r"|callbacks|loops|velocity|deltas?|masks?)([._]|$)"
)
_OPTIMIZER = re.compile(r"(^|[._])(opt|optim\w*|last_optimizer\w*)([._]|$)|optimizer")
_SCHEDULER = re.compile(r"sched")
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter", "num_updates", "epoch")


@dataclass
class Contents:
    """Tensors of a checkpoint by dotted names, and what it says about the training.

    ``containers`` gives, for each tensor, the dotted path (with a last dot, or empty) of the
    dictionary that it lies in. ``odd`` names entries ``..._extra_state`` that are no tensors.
    ``keys`` describes the top of the file in words; empty where it is a plain state dict.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    keys: str = ""
    lr: Any = None
    groups: list[ParameterGroup] = field(default_factory=list)
    last_rates: list[Any] = field(default_factory=list)
    step: Any = None

    def weights(self) -> dict[str, Tensor]:
        """Tensors that lie in no container of an optimiser, a scheduler or the like."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not _NOT_WEIGHTS.search(self.containers[name].lower())
        }


def contents_of(source: Mapping[Any, Any], where: str) -> Contents:
    """Return the contents of a dictionary as a training script saved it."""
    found = Contents(keys=_described(source))
    for path, value in _leaves(source, (), 0):
        container = "".join(f"{part}." for part in path[:-1])
        name = container + path[-1]
        if isinstance(value, Tensor):
            if name in found.tensors:
                raise ValueError(
                    f"checkpoint ({where}) has two tensors named {name!r}, in nested dictionaries "
                    "and by a dotted name; save one state dict"
                )
            found.tensors[name], found.containers[name] = value, container
        elif path[-1].endswith("_extra_state"):
            found.odd.append(name)
    _add_facts(found, source)
    return found


def _leaves(
    node: Mapping[Any, Any], path: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, raw in node.items():
        if not isinstance(key, str):
            continue  # the state of an optimiser is numbered
        value = plain_value(raw)
        inner: Any = module_state(value) if isinstance(value, StandIn) else value
        if isinstance(inner, Mapping):
            if depth < _DEPTH:
                yield from _leaves(inner, (*path, key), depth + 1)
        else:
            yield (*path, key), value


def _add_facts(found: Contents, source: Mapping[Any, Any]) -> None:
    """Read learning rates and the step beside the weights."""
    for key in ("lr", "learning_rate"):
        value = plain_value(source.get(key))
        # Beside the weights of a bare state dict, a tensor of that name is a parameter.
        bare = any(not at and found.tensors[name].dim() for name, at in found.containers.items())
        parameter = isinstance(value, Tensor) and (bare or value.numel() != 1)
        if found.lr is None and value is not None and not (parameter or isinstance(value, Mapping)):
            found.lr = value
    # Numbers of the training may be tensors too, beside what has the rate; dictionaries with
    # tensors are weights as a rule, and are searched only where nothing else states a rate.
    for among_tensors in (False, True):
        for path, node in _dictionaries(source, "", 0, among_tensors):
            if _OPTIMIZER.search(path.lower()) and "param_groups" in node:
                found.groups += groups_of(node, path)
            elif _is_schedule(path, node):
                found.last_rates += [plain_value(rate) for rate in node["_last_lr"]]
        if found.groups or found.last_rates:
            break
    for key in _STEPS:
        step = plain_value(source.get(key))
        if isinstance(step, int) and not isinstance(step, bool):
            found.step = step
            break


def _is_schedule(path: str, node: Mapping[Any, Any]) -> bool:
    """Tell whether this is the state of a scheduler that says its last rates."""
    return bool(_SCHEDULER.search(path.lower())) and isinstance(node.get("_last_lr"), (list, tuple))


def _dictionaries(
    node: Mapping[Any, Any], path: str, depth: int, among_tensors: bool, inside: bool = False
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield dictionaries with their dotted path, also those in lists.

    Of those that hold a tensor themselves, states of optimisers and schedulers alone, unless
    ``among_tensors``. Schedulers ``inside`` of another one are left out.
    """
    schedule = _is_schedule(path, node)
    if path and not (inside and schedule):
        yield path, node
    if depth > _DEPTH:
        return
    for key, value in node.items():
        # Composer keeps everything under `state`; in an optimiser it is what that remembers.
        remembered = key == "state" and "param_groups" in node
        if not isinstance(key, str) or key == "param_groups" or remembered:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items[:16]:
            if isinstance(item, StandIn):
                item = item.state
            if not isinstance(item, Mapping):
                continue
            # A step counter or the best loss so far may be a tensor in them.
            known = "param_groups" in item or "_last_lr" in item
            if known or among_tensors or not any(isinstance(v, Tensor) for v in item.values()):
                # SequentialLR and the like hold the schedulers of other phases: theirs is the rate.
                yield from _dictionaries(
                    item,
                    f"{path}.{key}" if path else key,
                    depth + 1,
                    among_tensors,
                    inside or schedule,
                )


def _described(source: Mapping[Any, Any]) -> str:
    """Return the top-level keys in words, with what they hold; empty for a plain state dict."""
    if all(isinstance(value, Tensor) for value in source.values()):
        return ""
    words = []
    for key, value in list(source.items())[:_SHOWN]:
        kind = type(value).__name__
        if isinstance(value, StandIn):
            kind = value.path
        elif isinstance(value, Tensor):
            kind = f"tensor {tuple(value.shape)}"
        elif isinstance(value, Mapping):
            kind = f"dictionary of {len(value)}"
        words.append(f"{key} ({kind})")
    more = f", and {len(source) - _SHOWN} more" if len(source) > _SHOWN else ""
    return (", ".join(words) + more) or "none"
