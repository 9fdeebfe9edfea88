"""Finding the one prefix under which the names and shapes of a checkpoint are those of a model.

Wrappers put prefixes in front of names (``module.``, ``model.``, ``_orig_mod.`` and any attribute
of a LightningModule, nested in any order), and containers in a file are prefixes too (see
`contents`). So weights fit where one prefix of the file and one of the model make all
names and shapes agree. Several such places with other values are told apart openly or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .contents import Contents

# Wrappers in the middle of a name that no module of a network is called by.
_WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_forward_module",  # Lightning Fabric, DeepSpeed
        "_original_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",  # activation checkpointing
    }
)
_ANCHORS = 12
# A single layer may fit every layer of a large file: nobody wants to know all the places.
MANY = 16
# Buffers that no result depends on: torch's BatchNorm fills in the counter where it is missing,
# transformers computes positions anew; the others are counters of averages and fixed tables.
_HARMLESS_MISSING = re.compile(r"(^|\.)(num_batches_tracked|position_ids|n_averaged)$")
_HARMLESS_EXTRA = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")

Clean = Callable[[str], str]


@dataclass(frozen=True)
class Target:
    """Names and tensors that a model needs.

    ``names``: state-dict name -> name under which its tensor is known (tied weights share one).
    ``tensors``: that name -> the model's tensor. ``passing``: buffers in no state dict.
    ``may_lack``, ``may_exceed``: patterns that the model's own library ignores on loading.
    """

    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    passing: Mapping[str, Tensor]
    may_lack: tuple[str, ...] = ()
    may_exceed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """One way to read the weights: model name -> name in the file, below ``prefix`` there.

    ``missing``: first names without a tensor; ``unexpected``: names in the file, in the same
    containers below the same prefix, that the model does not have; ``misshapen``: model names.
    """

    prefix: str
    pairs: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Tell whether all names and shapes agree."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def errors(self) -> int:
        """How far from fitting."""
        return len(self.missing) + len(self.misshapen)


def target_of(model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Target:
    """Return the target for a model whose state-dict names and tensors are given."""
    passing = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in names}
    lack: list[str] = []
    exceed: list[str] = []
    for module in model.modules():
        # How transformers says what its own loader ignores.
        lack += getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
        exceed += getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {n for n, _ in model.named_buffers(remove_duplicate=False)}
    # Only of buffers: a pattern may name weights, and those are never left as they were.
    lack = [p for p in dict.fromkeys(lack) if not _matches_any(set(names) - buffers, p)]
    return Target(names, tensors, passing, tuple(lack), tuple(dict.fromkeys(exceed)))


def mappings(contents: Contents, target: Target, entry: str | None = None) -> list[Mapped]:
    """All ways in which names of the file meet names of the model; those that fit come first.

    ``entry`` limits them to what lies below a container or prefix of the file. After `MANY` that
    fit, no more are looked for.
    """
    tensors = contents.tensors if entry else contents.weights()
    if entry:
        inside = entry.rstrip(".") + "."
        tensors = {n: t for n, t in tensors.items() if n.startswith(inside)}
    found: list[Mapped] = []
    for clean in (_without_wrappers, _without_modules):
        seen: set[frozenset[tuple[str, str]]] = set()
        fitting = 0
        # Where two names of the file would become one, all are left as they are, throughout.
        own = clean if len({clean(name) for name in tensors}) == len(tensors) else str
        in_file = {own(name): name for name in tensors}
        passing = {clean(name): buffer for name, buffer in target.passing.items()}
        for prefix, pairs in _pairings(in_file, _by_clean(target.names, clean)):
            key = frozenset(pairs.items())
            if key not in seen:
                seen.add(key)
                found.append(_judged(prefix, pairs, tensors, passing, contents, target, own))
                fitting += found[-1].fits
            if fitting == MANY:
                break
        if any(one.fits for one in found):
            break
    return sorted(found, key=lambda one: (not one.fits, one.errors, len(one.unexpected)))


def _pairings(
    in_file: Mapping[str, str], in_model: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a prefix of the file, and model name -> name in the file, for every possible prefix."""
    needed = [name for name in in_model if not _HARMLESS_MISSING.search(name)]
    for own in _common_prefixes(needed or list(in_model)):
        short = {n[len(own) :]: full for n, full in in_model.items() if n.startswith(own)}
        prefixes: dict[str, None] = {}
        for anchor in _anchors(list(short)):
            for name in in_file:
                if name == anchor or name.endswith(f".{anchor}"):
                    prefixes[name[: len(name) - len(anchor)]] = None
        for prefix in prefixes:
            pairs = {
                full: in_file[prefix + name]
                for name, full in short.items()
                if prefix + name in in_file
            }
            yield prefix, pairs


def _judged(
    prefix: str,
    pairs: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    passing: Mapping[str, Tensor],
    contents: Contents,
    target: Target,
    clean: Clean,
) -> Mapped:
    misshapen = []
    for name, source in pairs.items():
        if tensors[source].shape != target.tensors[target.names[name]].shape:
            misshapen.append(name)
    # A harmless buffer of another length keeps the model's own value.
    own = {name for name in misshapen if _may_lack(name, target)}
    pairs = {name: source for name, source in pairs.items() if name not in own}
    found = {target.names[name] for name in pairs}
    missing = tuple(
        name for name in target.tensors if name not in found and not _may_lack(name, target)
    )
    used = {contents.containers[source] for source in pairs.values()}
    taken = set(pairs.values())
    unexpected = [
        name
        for name, tensor in tensors.items()
        if name not in taken
        and contents.containers[name] in used
        and clean(name).startswith(prefix)
        and not _may_exceed(clean(name)[len(prefix) :], tensor, passing, target)
    ]
    unexpected += [
        name
        for name in contents.odd
        if clean(name).startswith(prefix) and _parent(name, used) is not None
    ]
    return Mapped(
        prefix,
        pairs,
        missing,
        tuple(unexpected),
        tuple(name for name in misshapen if name not in own),
    )


def _parent(name: str, used: Collection[str]) -> str | None:
    return next((container for container in used if container and name.startswith(container)), None)


def _may_lack(name: str, target: Target) -> bool:
    return bool(_HARMLESS_MISSING.search(name)) or _matches_any({name}, *target.may_lack)


def _may_exceed(name: str, tensor: Tensor, passing: Mapping[str, Tensor], target: Target) -> bool:
    """Tell whether loading may leave out a tensor that the model's state dict does not have."""
    if _HARMLESS_EXTRA.search(name) or _matches_any({name}, *target.may_exceed):
        return True
    own = passing.get(name)
    if own is None:
        own = next((b for n, b in passing.items() if n.endswith(f".{name}")), None)
    if own is not None:
        return _same_values(own, tensor)
    if name.rpartition(".")[2] == "position_ids":
        flat = tensor.flatten()
        return not tensor.is_floating_point() and flat.tolist() == list(range(len(flat)))
    return False


def _same_values(own: Tensor, stored: Tensor) -> bool:
    """Tell whether a stored buffer is the model's own, up to the rounding of its dtype."""
    if own.shape != stored.shape or own.is_meta:
        return False
    own = own.detach().cpu().to(stored.dtype)
    stored = stored.detach().cpu()
    if not stored.is_floating_point():
        return bool((own == stored).all())
    # Tables such as rotary frequencies differ in the last bits from one machine to another.
    # Of an infinity, as masks hold it, everything would be that close.
    own64, stored64 = own.double(), stored.double()
    close = (own64 - stored64).abs() <= 1e-6 * own64.abs() + 1e-12
    return bool(((close & own64.isfinite()) | (own == stored)).all())


def _matches_any(names: Iterable[str], *patterns: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _by_clean(names: Collection[str], clean: Clean) -> dict[str, str]:
    """Names without wrappers -> names; as they are where two would become one."""
    cleaned = {clean(name): name for name in names}
    return cleaned if len(cleaned) == len(names) else {name: name for name in names}


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    if _WRAPPERS.isdisjoint(parts):
        return name
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _without_modules(name: str) -> str:
    """Also without ``module``, which a data-parallel wrapper inside a network puts there."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS and part != "module")


def _common_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes that all names share, from none to the longest."""
    split = [name.split(".")[:-1] for name in names]
    result, depth = [""], 0
    while split and all(len(parts) > depth for parts in split):
        first = split[0][depth]
        if any(parts[depth] != first for parts in split):
            break
        result.append(f"{result[-1]}{first}.")
        depth += 1
    return result


def _anchors(names: list[str]) -> list[str]:
    """Return some of the names, spread over all, the longest among them."""
    step = max(1, len(names) // _ANCHORS)
    longest = max(names, key=lambda name: (name.count("."), len(name)), default="")
    return list(dict.fromkeys([longest, *names[::step]]))
