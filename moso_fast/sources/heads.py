"""Linear heads: weight and bias from files by name, or found where only one pair is possible."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.array_like import as_tensor
from .arrays import open_array, open_safetensors, safetensors_names, split_spec
from .checkpoints.checkpoint import Checkpoint, read
from .checkpoints.files import TORCH_SUFFIXES
from .checkpoints.rates import ScoredParameters, Stated, learning_rate

SUFFIXES = (".safetensors", ".npz", ".npy", *TORCH_SUFFIXES)


@dataclass(frozen=True, eq=False)
class Head:
    """Weight (C, D), bias (C,) or None, and what the file says about the learning rate."""

    weight: Tensor
    bias: Tensor | None
    source: str
    stated: Stated | None = None
    scored: ScoredParameters | None = None

    @property
    def lr(self) -> float | None:
        """Learning rate of the head; ValueError where several are stated and it has none of them.

        None where the file states none.
        """
        return None if self.stated is None else self.stated.rate(self.scored)

    def on(self, device: torch.device) -> Head:
        """Return this head with its tensors on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def with_rate(self, lr: float) -> Head:
        """Return this head with a learning rate that comes before what its file says."""
        return replace(self, stated=Stated(self.source, learning_rate(lr, f"{self.source}: lr")))


def head_of(value: Any, name: str) -> Head:
    """Return the linear head that a caller means; ``name`` is what messages call it.

    Parameters
    ----------
    value
        A path as `read_head` takes it; a `Checkpoint` of such a file or of a state dict that holds
        one head, whose ``lr`` and ``entry`` are heeded; a weight (C, D), or (weight, bias).

    Raises
    ------
    TypeError, ValueError
        None of these, or a file, state dict or array that holds no head.
    FileNotFoundError
        No such file.
    """
    if isinstance(value, (str, os.PathLike)):
        return read_head(os.fspath(value))
    if isinstance(value, Mapping):
        value = Checkpoint(value)
    if isinstance(value, Checkpoint):
        return _of_checkpoint(value, name)
    weight, bias = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    weight = as_tensor(name, weight)
    bias = None if bias is None else as_tensor(f"bias of {name}", bias)
    return _checked(
        name, {"weight": weight, "bias": bias}, "weight", None if bias is None else "bias"
    )


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> Head:
    source = checkpoint.source
    if not isinstance(source, Mapping) and checkpoint.entry is None:
        head = read_head(os.fspath(source))
    else:
        loaded = read(checkpoint, check_rate=False)
        where = name if isinstance(source, Mapping) else os.fspath(source)
        head = _checked(where, loaded.state, *_find(where, loaded.state), loaded.stated)
    return head if checkpoint.lr is None else head.with_rate(checkpoint.lr)


def read_head(spec: str) -> Head:
    """Read ``FILE[:WEIGHT[,BIAS]]``: .safetensors, .npz, .npy (a weight alone) or .pt.

    Without names the file must hold one floating point matrix; its bias is the vector of the same
    name with "bias" for "weight". ``:WEIGHT`` alone means a head without a bias. Torch files are
    read with ``weights_only=True``.

    Raises
    ------
    ValueError
        Unknown suffix, damaged file, no such tensor, several possible ones, wrong shapes.
    FileNotFoundError
        No such file.
    """
    path, names = split_spec(spec, SUFFIXES)
    tensors, stated = _open(path)
    if names is None:
        weight_name, bias_name = _find(str(path), tensors, path.name)
    else:
        wanted = [name.strip() for name in names.split(",")]
        if len(wanted) > 2 or not all(wanted):
            raise ValueError(f"{spec}: the names are WEIGHT or WEIGHT,BIAS; got {names!r}")
        weight_name, bias_name = wanted[0], wanted[1] if len(wanted) == 2 else None
    return _checked(spec, tensors, weight_name, bias_name, stated, path)


def _checked(
    source: str,
    tensors: Mapping[str, Any],
    weight_name: str,
    bias_name: str | None,
    stated: Stated | None = None,
    path: Path | None = None,
) -> Head:
    """Return the head of two tensors by name, whose shapes go together."""
    where = source if path is None else str(path)
    weight = _tensor(where, tensors, weight_name)
    bias = None if bias_name is None else _tensor(where, tensors, bias_name)
    if weight.dim() != 2:
        raise ValueError(
            f"{where}: the weight {weight_name!r} must be (C, D); got {_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: the bias {bias_name!r} must be ({weight.shape[0]},) to go with "
            f"{weight_name!r} {_shape(weight)}; got {_shape(bias)}"
        )
    shapes = {weight_name: tuple(weight.shape)}
    if bias is not None and bias_name is not None:
        shapes[bias_name] = tuple(bias.shape)
    in_file = Counter(tuple(t.shape) for t in tensors.values() if t is not None)
    return Head(weight, bias, source, stated, ScoredParameters(shapes, "the head", in_file))


def check_finite(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError at the first entry of a head, called ``name``, that is not finite.

    To be asked before heads are stacked: their numbers in a stack mean nothing to a caller.
    """
    for what, value in (("weight", weight), ("bias", bias)):
        # A sum reads once and writes one number; isfinite would make a tensor of that size.
        if value is None or math.isfinite(float(value.sum())):
            continue
        found = (~torch.isfinite(value)).nonzero()
        if found.numel():  # else the sum alone is beyond the largest number
            at = found[0].tolist()
            raise ValueError(
                f"{name}: {what}{at} is {float(value[tuple(at)])}; heads and weights must be finite"
            )


def stack_heads(heads: list[Head]) -> list[tuple[list[int], Tensor, Tensor | None]]:
    """Stack heads of equal shape and dtype: (their numbers, weight (K, C, D), bias (K, C))."""
    groups: dict[Any, list[int]] = {}
    for number, head in enumerate(heads):
        kind = (head.weight.shape, head.weight.dtype, head.bias is None)
        groups.setdefault(kind, []).append(number)
    stacked = []
    for numbers in groups.values():
        biases = [bias for bias in (heads[n].bias for n in numbers) if bias is not None]
        weight = torch.stack([heads[n].weight for n in numbers])
        stacked.append((numbers, weight, torch.stack(biases) if biases else None))
    return stacked


def _open(path: Path) -> tuple[dict[str, Tensor], Stated | None]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"weight": open_array(path).clone()}, None
    if suffix == ".safetensors":
        return {name: open_safetensors(path, name) for name in safetensors_names(path)}, None
    if suffix == ".npz":
        return _open_npz(path), None
    # The rate may be given beside the file.
    loaded = read(Checkpoint(path), check_rate=False)
    return loaded.state, loaded.stated


def _open_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as an .npz of numbers: {reason}") from error


def _find(where: str, tensors: Mapping[str, Tensor], file: str = "") -> tuple[str, str | None]:
    """Names of the only matrix and of its bias; ``file`` is that in which names can be chosen."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    matrices = [name for name, value in floats.items() if value.dim() == 2]
    if len(matrices) != 1:
        found = ", ".join(f"{name} {_shape(floats[name])}" for name in matrices[:8]) or "none"
        choice = f"name the head as {file}:WEIGHT,BIAS" if file else "be given as (weight, bias)"
        raise ValueError(f"{where} must hold one matrix, or {choice}; matrices there: {found}")
    weight = matrices[0]
    stem, _, last = weight.rpartition(".")
    sibling = f"{stem}.{last.replace('weight', 'bias')}" if stem else last.replace("weight", "bias")
    classes = floats[weight].shape[:1]
    vectors = [name for name, value in floats.items() if value.shape == classes]
    if sibling != weight and sibling in vectors:
        return weight, sibling
    if vectors:
        say = "give the head as (weight, bias)"
        if file:
            say = (
                f"Say so as {file}:{weight},{vectors[0]}, or {file}:{weight} for a head without a "
                "bias"
            )
        raise ValueError(f"{where}: is {vectors[0]!r} the bias of {weight!r}? {say}")
    return weight, None


def _tensor(where: str, tensors: Mapping[str, Any], name: str) -> Tensor:
    if name not in tensors:
        known = ", ".join(list(tensors)[:8]) or "none"
        more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        raise ValueError(f"{where} has no tensor {name!r}; there are {known}{more}")
    value: Tensor = tensors[name]
    if not value.is_floating_point():
        raise ValueError(f"{where}: {name!r} must be floating point; got {value.dtype}")
    return value.detach()


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))
