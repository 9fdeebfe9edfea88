"""Linear heads from files: weight and bias by name, or found where only one pair is possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import open_array, open_safetensors, safetensors_names, split_spec
from .checkpoints.files import TORCH_SUFFIXES
from .checkpoints.rates import ScoredParameters, Stated

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
        weight_name, bias_name = _find(path, tensors)
    else:
        wanted = [name.strip() for name in names.split(",")]
        if len(wanted) > 2 or not all(wanted):
            raise ValueError(f"{spec}: the names are WEIGHT or WEIGHT,BIAS; got {names!r}")
        weight_name, bias_name = wanted[0], wanted[1] if len(wanted) == 2 else None
    weight = _tensor(path, tensors, weight_name)
    bias = None if bias_name is None else _tensor(path, tensors, bias_name)
    if weight.dim() != 2:
        raise ValueError(f"{path}: the weight {weight_name!r} must be (C, D); got {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{path}: the bias {bias_name!r} must be ({weight.shape[0]},) to go with "
            f"{weight_name!r} {_shape(weight)}; got {_shape(bias)}"
        )
    shapes = {weight_name: tuple(weight.shape)}
    if bias is not None and bias_name is not None:
        shapes[bias_name] = tuple(bias.shape)
    in_file = Counter(tuple(tensor.shape) for tensor in tensors.values())
    return Head(weight, bias, spec, stated, ScoredParameters(shapes, "the head", in_file))


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
    from .checkpoints.checkpoint import Checkpoint, read

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


def _find(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """Names of the only matrix and of its bias."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    matrices = [name for name, value in floats.items() if value.dim() == 2]
    if len(matrices) != 1:
        found = ", ".join(f"{name} {_shape(floats[name])}" for name in matrices[:8]) or "none"
        raise ValueError(
            f"{path} must hold one matrix, or name the head as {path.name}:WEIGHT,BIAS; "
            f"matrices there: {found}"
        )
    weight = matrices[0]
    stem, _, last = weight.rpartition(".")
    sibling = f"{stem}.{last.replace('weight', 'bias')}" if stem else last.replace("weight", "bias")
    classes = floats[weight].shape[:1]
    vectors = [name for name, value in floats.items() if value.shape == classes]
    if sibling != weight and sibling in vectors:
        return weight, sibling
    if vectors:
        raise ValueError(
            f"{path}: is {vectors[0]!r} the bias of {weight!r}? Say so as "
            f"{path.name}:{weight},{vectors[0]}, or {path.name}:{weight} for a head without a bias"
        )
    return weight, None


def _tensor(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        known = ", ".join(list(tensors)[:8]) or "none"
        more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        raise ValueError(f"{path} has no tensor {name!r}; there are {known}{more}")
    value = tensors[name]
    if not value.is_floating_point():
        raise ValueError(f"{path}: {name!r} must be floating point; got {value.dtype}")
    return value.detach()


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))
