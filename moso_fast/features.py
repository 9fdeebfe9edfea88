"""Finding the last layer of a network and collecting what goes into it, for every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ._batches import batch_count, sample_count, split_batch, to_device
from ._head import find_head, predicts_next_token

__all__ = ["FeatureCapture", "Features", "evaluating", "find_head", "predicts_next_token"]

# A cache on a GPU leaves this share of its free memory to the model.
_GPU_CACHE_SHARE = 0.6


@dataclass
class Features:
    """Inputs of the last layer over a whole data set.

    ``features`` (rows, D) and ``labels`` (rows,) or (rows, C) have one row a sample, or with
    ``cu_seqlens`` (samples + 1 offsets) the tokens of one sequence after those of the other.
    """

    features: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None

    @property
    def samples(self) -> int:
        """N: rows, or sequences."""
        return len(self.labels) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def counted(self, ignore_index: int) -> Tensor:
        """(N,) bool on the CPU: whether the sample has a label that is not ``ignore_index``."""
        if self.labels.dim() > 1:
            return torch.ones(self.samples, dtype=torch.bool)
        counted = (self.labels != ignore_index).cpu()
        if self.cu_seqlens is None:
            return counted
        running = torch.cat([torch.zeros(1, dtype=torch.int64), counted.long().cumsum(0)])
        return running[self.cu_seqlens.cpu()].diff() > 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; then every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    try:
        model.eval()
        # Not inference_mode: what a model caches in it during a forward pass (rotary tables, say)
        # could never be used in training again.
        with torch.no_grad(), _eager(model):
            yield
    finally:
        # First the method, for modules that act on the change (merged adapters), then each flag.
        model.train(was_training)
        for module, mode in modes:
            module.training = mode


def _eager(model: nn.Module) -> Any:
    """Run a compiled model as it was written: compiled code may ignore a hook that came later."""
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class FeatureCapture:
    """Runs a model over a loader and keeps the inputs of its head in one preallocated tensor.

    Parameters
    ----------
    model, name, head
        The network, and its last layer as `find_head` gives it.
    loader
        In data-set order, see ``_batches.make_loader``.
    cache
        ``"auto"``: features keep a 16-bit or float64 dtype and are float32 otherwise;
        ``"float32"`` or ``"bfloat16"``.
    shift
        Token features (B, T, D) at t go with the label at t + 1.
    ignore_index
        Tokens with this label are left out of the cache; a sequence keeps at least one.
    device, dtype
        Where, and for floating-point inputs in which dtype, the model runs; None as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        head: nn.Linear,
        loader: DataLoader[Any],
        *,
        cache: str = "auto",
        shift: bool = False,
        ignore_index: int = -100,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.name, self.head, self.loader = model, name, head, loader
        self.cache_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(cache)
        self.shift, self.ignore_index = shift, ignore_index
        self.device = device or _device_of(model)
        self.dtype = dtype
        self.passes = 0
        self._cache: Tensor | None = None
        self._labels: Tensor | None = None
        self._rows = 0
        self._calls = 0
        self._batch_labels: Tensor | None = None
        self._label_blocks: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def run(self, on_batch: Callable[[], None] = lambda: None) -> Features:
        """One pass over the data with the weights that the model has now.

        The result is valid until the next call, which writes to the same memory.

        Raises
        ------
        TypeError, ValueError
            Batches, labels or head inputs of the wrong kind; a head that is not called once in a
            forward pass; a loader that yields other samples than in the pass before.
        """
        self._rows, self._label_blocks, self._lengths = 0, [], []
        handle = self.head.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            with evaluating(self.model):
                for batch in self.loader:
                    args, kwargs, self._batch_labels = split_batch(batch)
                    self._calls = 0
                    args, kwargs = to_device((args, kwargs), self.device, self.dtype)
                    self.model(*args, **kwargs)
                    if self._calls == 0:
                        raise ValueError(
                            f"head {self.name!r} was not called in the forward pass of the model; "
                            "choose the last layer with head="
                        )
                    on_batch()
        finally:
            handle.remove()
        self.passes += 1
        return self._finish()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the head's input to the cache (a forward pre-hook)."""
        self._calls += 1
        if self._calls > 1:
            raise ValueError(
                f"head {self.name!r} was called more than once in one forward pass; "
                "its gradient is then no product of one input and one residual"
            )
        value = args[0] if args else kwargs.get("input")
        labels = self._batch_labels
        assert labels is not None
        if not isinstance(value, Tensor):
            raise TypeError(f"head {self.name!r} got no tensor, but {type(value).__name__}")
        if value.dim() == 3:
            value, labels = self._tokens(value, labels)
        elif value.dim() != 2:
            raise ValueError(
                f"head {self.name!r} must get (N, D) or (B, T, D) features, "
                f"got {tuple(value.shape)}"
            )
        if len(value) != len(labels):
            raise ValueError(
                f"head {self.name!r} got features {tuple(value.shape)} for labels "
                f"{tuple(labels.shape)}; it must see one row per label"
            )
        end = self._rows + len(value)
        self._reserve(value, end)
        assert self._cache is not None
        self._cache[self._rows : end].copy_(value, non_blocking=True)
        self._label_blocks.append(labels)
        self._rows = end

    def _tokens(self, value: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that count, and their labels; notes the length of each sequence."""
        if labels.shape != value.shape[:2]:
            raise ValueError(
                f"head {self.name!r} got token features {tuple(value.shape)}, so labels must have "
                f"shape {tuple(value.shape[:2])}, got {tuple(labels.shape)}"
            )
        if self.shift:
            value, labels = value[:, :-1], labels[:, 1:]
        if labels.shape[1] == 0:
            raise ValueError(
                f"head {self.name!r} got sequences of {int(self.shift)} token(s), "
                "which leaves nothing to predict"
            )
        counts = labels != self.ignore_index
        # Its only label being ignored, this token gives the sequence its NaN.
        counts[:, 0] |= ~counts.any(1)
        self._lengths.append(counts.sum(1))
        # The selection is worked out where the labels are, on the CPU as a rule: no wait for a GPU.
        rows = counts.flatten().nonzero().squeeze(1)
        labels = labels.flatten()[rows]
        value = value.reshape(-1, value.shape[-1])
        if len(rows) < len(value):
            value = value.index_select(0, rows.to(value.device, non_blocking=True))
        return value, labels

    def _reserve(self, value: Tensor, rows: int) -> None:
        if self._cache is None or self._cache.shape[1] != value.shape[1]:
            if self._rows:
                raise ValueError(f"head {self.name!r} got inputs of different widths")
            expected = sample_count(self.loader) if not self._lengths else None
            if expected is None:
                expected = rows * (batch_count(self.loader) or 1)
            self._cache = self._allocate(value, max(rows, expected))
        if rows > len(self._cache):
            larger = self._allocate(value, max(rows, 2 * len(self._cache)))
            larger[: self._rows] = self._cache[: self._rows]
            self._cache = larger

    def _allocate(self, value: Tensor, rows: int) -> Tensor:
        dtype = self.cache_dtype or (value.dtype if value.dtype in _KEPT else torch.float32)
        shape, device = (rows, value.shape[1]), value.device
        if device.type == "cuda":
            needed = rows * value.shape[1] * dtype.itemsize
            if needed > _GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0]:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.empty(shape, dtype=dtype, device=device)

    def _finish(self) -> Features:
        if self._cache is None or not self._rows:
            raise ValueError("data holds no samples")
        labels = torch.cat(self._label_blocks)
        samples = sum(map(len, self._lengths)) if self._lengths else self._rows
        expected = sample_count(self.loader)
        if expected is not None and samples != expected:
            raise ValueError(
                f"data: the loader yields {samples} samples of a data set of {expected}; "
                "every sample must come once"
            )
        if self._labels is not None and not torch.equal(labels, self._labels):
            raise ValueError(
                "data: the loader yields other labels in this pass than in the one before; "
                "it must give the same samples in the same order every time"
            )
        self._labels = labels
        device = self._cache.device
        if self._cache.is_pinned() and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to the CPU did not wait
        cu_seqlens = None
        if self._lengths:
            ends = torch.cat(self._lengths).cumsum(0)
            cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(device)
        return Features(self._cache[: self._rows], labels.to(device), cu_seqlens)


_KEPT = (torch.bfloat16, torch.float16, torch.float64)


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
