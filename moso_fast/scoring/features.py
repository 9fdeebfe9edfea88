"""Collecting what goes into the last layer of a network, for every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader

from ..core.errors import DataError
from ..core.labels import document_rows, fit_labels, token_rows
from ..sources.data.batches import SampleBatch, SampleBatches, batch_count, sample_count, to_device
from .eval_mode import evaluating
from .head.capture import HeadCapture
from .head.shift import LabelShift

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
            return torch.ones(self.samples, dtype=torch.bool, device="cpu")
        counted = (self.labels != ignore_index).cpu()
        if self.cu_seqlens is None:
            return counted
        running = torch.cat(
            [torch.zeros(1, dtype=torch.int64, device="cpu"), counted.long().cumsum(0)]
        )
        return running[self.cu_seqlens.cpu()].diff() > 0

    def of_a_sample(self, error: DataError) -> DataError:
        """Return an error about a row of the features as one about a sample of the data set."""
        if self.cu_seqlens is None:
            return error
        offsets = self.cu_seqlens.cpu()
        sample = int(torch.searchsorted(offsets, error.row, right=True)) - 1
        token = error.row - int(offsets[sample])
        return error.moved(sample, f"token {token} of those that count in sample {sample}: ")


class FeatureCapture:
    """Runs a model over a loader and keeps the inputs of its head in one preallocated tensor.

    Parameters
    ----------
    model, name, head
        The network, and its last layer as `find_head` gives it.
    loader
        In data-set order, see ``sources.data.loaders.make_loader``; or its ``SampleBatches``.
    cache
        ``"auto"``: features keep a 16-bit or float64 dtype and are float32 otherwise;
        ``"float32"`` or ``"bfloat16"``.
    loss
        Name of the loss, which decides what its labels look like.
    shift
        Whether token features (B, T, D) at t go with the label at t + 1, or what decides that.
    ignore_index
        Tokens with this label are left out of the cache; a sequence keeps at least one.
    device, dtype
        Where, and for floating-point inputs in which dtype, the model runs; None as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        head: nn.Module,
        loader: DataLoader[Any] | SampleBatches,
        *,
        cache: str = "auto",
        loss: str = "cross_entropy",
        shift: bool | LabelShift = False,
        ignore_index: int = -100,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.name, self.head = model, name, head
        if not isinstance(loader, SampleBatches):
            loader = SampleBatches(loader, model, ignore_index=ignore_index)
        self.samples, self.loader, self.loss = loader, loader.loader, loss
        self.cache_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(cache)
        self.ignore_index = ignore_index
        if not isinstance(shift, LabelShift):
            shift = LabelShift(model, shift, ignore_index)
        self.shift = shift
        self.device = device or _device_of(model)
        self.dtype = dtype
        self.passes = 0
        self._cache: Tensor | None = None
        self._labels: Tensor | None = None
        self._rows = 0
        self.inputs = HeadCapture(model, name, head)
        self._label_blocks: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def run(self, on_batch: Callable[[], None] = lambda: None) -> Features:
        """One pass over the data with the weights that the model has now.

        The result is valid until the next call, which writes to the same memory. Afterwards
        ``inputs`` says what was read and seen of the head.

        Raises
        ------
        TypeError, ValueError
            Batches, labels or head inputs of the wrong kind; a head that is not called once in a
            forward pass, whose output is not that of a linear map, or is not the model's logits; a
            loader that yields other samples than in the pass before.
        """
        self._rows, self._label_blocks, self._lengths = 0, [], []
        self.samples.run = self._outputs
        self.samples.lists.quietly = self.inputs.ignored
        with self.inputs.one_pass(), evaluating(self.model):
            for batch in self.samples:
                args, kwargs = to_device((batch.args, batch.kwargs), self.device, self.dtype)
                with self.samples.forward_of(batch):
                    value = self._features(batch, args, kwargs)
                    if value.dim() == 3:
                        with self.inputs.ignored():
                            self.shift.decide(args, kwargs, batch.labels)
                self._keep(value, batch)
                on_batch()
        self.passes += 1
        return self._finish()

    def _features(
        self, batch: SampleBatch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Features of a batch; of a last batch of one sample as in a batch of two.

        A model that squeezes its batch takes a single sample for something else, which would show
        at the end of the data only.
        """
        twice = None
        if len(batch.labels) == 1 and self.samples.was_larger:
            twice = _twice((args, kwargs))
        if twice is None:
            return self.inputs.features(args, kwargs)
        value = self.inputs.features(*twice)
        if len(value) % 2 == 0:
            one, other = value.float().chunk(2)
            size = float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
            if torch.allclose(one, other, rtol=1e-2, atol=1e-2 * size, equal_nan=True):
                return value[: len(value) // 2]
        # What was doubled was no batch (the words of a bag, say): two samples would be alike.
        return self.inputs.features(args, kwargs)

    def _outputs(self, kwargs: dict[str, Any]) -> Any:
        return self.inputs.outputs((), to_device(kwargs, self.device, self.dtype))

    def _keep(self, value: Tensor, batch: SampleBatch) -> None:
        """Copy the features of a batch to the cache: (B, D), or (B, ..., D) of its tokens."""
        labels = batch.labels
        if value.dim() > 3 and labels.shape == value.shape[:-1]:  # the positions of an image
            value, labels = value.flatten(1, -2), labels.flatten(1)
        if value.dim() == 3:
            value, labels = self._tokens(value, labels, batch.documents)
        elif value.dim() != 2:
            raise ValueError(
                f"head {self.name!r} must get (N, D) or (B, T, D) features, "
                f"got {tuple(value.shape)}"
            )
        else:
            assert self.inputs.reading is not None
            labels = fit_labels(labels, len(self.inputs.reading.weight), self.loss)
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

    def _tokens(
        self, value: Tensor, labels: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the tokens that count, and their labels; notes the length of each sequence."""
        if labels.shape == (*value.shape[:2], 1):
            labels = labels[..., 0]
        if labels.shape != value.shape[:2]:
            raise ValueError(
                f"head {self.name!r} got token features {tuple(value.shape)}, so labels must have "
                f"shape {tuple(value.shape[:2])}, got {tuple(labels.shape)}"
            )
        shift = bool(self.shift.value)
        # The selection is worked out where the labels are, on the CPU as a rule: no wait for a GPU.
        if documents is not None:
            rows, labels, lengths = document_rows(labels.cpu(), documents, self.ignore_index, shift)
        else:
            if shift:
                value, labels = value[:, :-1], labels[:, 1:]
            if labels.shape[1] == 0:
                raise ValueError(
                    f"head {self.name!r} got sequences of {int(shift)} token(s), "
                    "which leaves nothing to predict"
                )
            rows, labels, lengths = token_rows(labels, self.ignore_index)
        self._lengths.append(lengths)
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
                return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")
        return torch.empty(shape, dtype=dtype, device=device)

    def _finish(self) -> Features:
        if self._cache is None or not self._rows:
            raise ValueError("data holds no samples")
        labels = torch.cat(self._label_blocks)
        samples = sum(map(len, self._lengths)) if self._lengths else self._rows
        expected = sample_count(self.loader)
        if self.samples.packed and self.samples.rows == expected:
            expected = None  # each of the rows may hold several documents
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


def _twice(inputs: Any) -> Any:
    """Make inputs of one sample those of two; None where they are no rows of a batch."""
    leaves, structure = tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(tensor.dim() and len(tensor) == 1 for tensor in tensors):
        return None
    return tree_unflatten(
        [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        structure,
    )


_KEPT = (torch.bfloat16, torch.float16, torch.float64)


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
