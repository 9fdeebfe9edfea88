"""Putting the weights of a checkpoint into a model for a while, without writing to the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...util.array_like import bytes_of
from .checkpoint import LoadedCheckpoint
from .fit import Fitted
from .models import fitted


class ModelWeights:
    """The tensors of a model by their state-dict names, and a way to exchange them for others.

    Tensors are exchanged by reference (``tensor.data``), never copied over the model's own: the
    model's memory stays as it is, putting it back is exact, and a state dict that shares memory
    with the model keeps its values. Load hooks of modules are not run.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.device, self.dtype = device, dtype
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        head = nn.Module() if head is None else head
        self._head = {id(t) for t in (*head.parameters(), *head.buffers())}
        self._buffers = {id(t) for t in model.buffers()}
        self._foreign = ""
        self._names: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        first_name: dict[int, str] = {}
        uses: dict[int, int] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor) or id(value) not in own:
                self._foreign = name
                continue
            first = first_name.setdefault(id(value), name)
            self._names[name] = first
            self.tensors[first] = value
            uses[id(value)] = uses.get(id(value), 0) + 1
        head_uses: dict[int, int] = {}
        for _, value in (
            *head.named_parameters(remove_duplicate=False),
            *head.named_buffers(remove_duplicate=False),
        ):
            head_uses[id(value)] = head_uses.get(id(value), 0) + 1
        # A head tied to an embedding belongs to the backbone too: its value decides the features.
        self.head_names = {
            name
            for name, t in self.tensors.items()
            if id(t) in self._head and uses[id(t)] == head_uses[id(t)]
        }
        known = {id(t) for t in self.tensors.values()}
        self._others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in known]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by its first name."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    def own(self) -> dict[str, Tensor]:
        """Return the model's own tensors, in the form that `resolve` gives."""
        return {name: t.detach() for name, t in self.tensors.items()}

    def resolve(self, loaded: LoadedCheckpoint) -> Fitted:
        """Tensors of a checkpoint by the model's names, each tied weight once.

        Raises
        ------
        ValueError
            Missing or unexpected names, or shapes that differ: first few names and counts; a
            model whose state dict is not made of its own tensors alone.
        """
        if self._foreign:
            raise ValueError(
                f"model: its state dict has {self._foreign!r}, which is no tensor of the model and "
                "cannot be exchanged; load each checkpoint yourself and score it with "
                "checkpoints=None"
            )
        return fitted(self.model, self._names, self.tensors, loaded)

    def backbone(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of ``tensors`` that decide the features."""
        return {name: t for name, t in tensors.items() if name not in self.head_names}

    @contextmanager
    def lent(self, tensors: Mapping[str, Tensor], head_only: bool = False) -> Iterator[None]:
        """Run the block with ``tensors`` in the model; afterwards it has its own back.

        With a ``device`` or ``dtype``, the tensors (and buffers that are in no state dict) are
        there in that form during the block.
        """
        exchange = [
            (self.tensors[name], source)
            for name, source in tensors.items()
            if not head_only or id(self.tensors[name]) in self._head
        ]
        if not head_only and (self.device is not None or self.dtype is not None):
            exchange += [(t, t.detach()) for t in self._others]
        saved: list[tuple[Tensor, Tensor]] = []
        computed = computed_tensors(self.model)
        try:
            for target, source in exchange:
                saved.append((target, target.data))
                target.data = self._placed(source, target)
            # Within a caller's autocast, 16-bit copies of weights are kept by their parameter.
            torch.clear_autocast_cache()
            yield
        finally:
            for target, data in reversed(saved):
                target.data = data
            for module, tensors_of in computed:
                module.__dict__.update(tensors_of)
            torch.clear_autocast_cache()

    def _placed(self, source: Tensor, target: Tensor) -> Tensor:
        device = self.device or target.device
        floating = self.dtype is not None and target.is_floating_point()
        dtype = self.dtype if floating and self.dtype is not None else target.dtype
        source = source.detach()
        fits = (source.device, source.dtype) == (device, dtype)
        # Buffers are copied: a forward pass may write to them, and the source is not ours.
        private = id(target) in self._buffers or source.is_inference()
        if fits and not private and source.stride() == target.stride():
            return source
        return torch.empty_like(target, device=device, dtype=dtype).copy_(source)


def computed_tensors(model: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """List the tensors that modules hold as plain attributes, by module and name.

    The hooks of weight_norm, spectral_norm and pruning put the weight of a module there in every
    forward pass: after one with other parameters it would be that of a checkpoint.
    """
    found = []
    for module in model.modules():
        tensors = {n: v for n, v in module.__dict__.items() if isinstance(v, Tensor)}
        if tensors:
            found.append((module, tensors))
    return found


class Snapshot:
    """Tensors of one checkpoint to compare the next one with."""

    def __init__(self, tensors: Mapping[str, Tensor], copy: bool) -> None:
        self.tensors = {n: t.detach().clone() if copy else t.detach() for n, t in tensors.items()}

    def equals(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether all values are the same; the same memory is not read."""
        if tensors.keys() != self.tensors.keys():
            return False
        return all(self._same(self.tensors[n], t) for n, t in tensors.items())

    def _same(self, mine: Tensor, other: Tensor) -> bool:
        if mine.dtype != other.dtype or mine.shape != other.shape or mine.device != other.device:
            return False
        if same_memory(mine, other):
            return True
        return torch.equal(mine, other)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same view of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.data_ptr() != 0
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a name for the values of ``tensors``: equal names, shapes, dtypes and bits agree."""
    result = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            result.update(bytes_of(tensor))
    return result.hexdigest()
