"""Inputs that are Python lists in the samples, which a model takes as a list or as one tensor.

torch's own collate_fn makes [1, 2, 3] of each sample a list of three tensors (B,). A model that was
trained on such batches wants that list, one entry a field (``zip(self.embeddings, fields)``); one
that was trained with another collate_fn, its own or that of a library, wants the tensor (B, 3).
Both are tried on a few samples, and the outputs tell: the right form yields one row a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .batch_parts import to_device

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# With more lists than these in a batch they are all taken alike: 2^4 forms are tried at most.
_MIXED = 4


class ListInputs:
    """Chooses between a list and a tensor, once for every input, by the model itself.

    Parameters
    ----------
    model
        The network; None leaves lists as they came.
    dtype
        To which floating-point inputs are brought; None = as they are.
    """

    def __init__(self, model: nn.Module | None, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        # Surrounds the forward passes here; whoever listens to the model sets it.
        self.quietly: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._stacks: dict[int | str, bool] = {}

    def settled(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        came: Mapping[int, list[Any]],
        rows: int,
    ) -> Arguments:
        """Return the arguments with every list in the form that the model takes.

        The model must be ready to be run: its weights in place, in eval mode.

        Parameters
        ----------
        args, kwargs
            The arguments with tensors in place of lists.
        came
            By the ``id`` of such a tensor, the list that it was made of.
        rows
            B, of the batch.

        Raises
        ------
        ValueError
            A model that takes places for samples in both forms.
        """
        given = _by_place(args, kwargs)
        lists = {key: came[id(value)] for key, value in given.items() if id(value) in came}
        if self.model is not None and not lists.keys() <= self._stacks.keys():
            self._stacks = self._decide(args, kwargs, lists, rows)
        return _with(args, kwargs, {k: v for k, v in lists.items() if not self._stacks.get(k)})

    def _decide(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        lists: Mapping[int | str, list[Any]],
        rows: int,
    ) -> dict[int | str, bool]:
        """Find for each list whether the model takes it as a tensor."""
        given = _by_place(args, kwargs)
        # A number of samples that divides no other size of these inputs: who takes places for
        # samples yields another number of rows.
        sizes = {size for key in lists for size in given[key].shape[1:]}
        few = next(n for n in itertools.count(2) if all(size % n for size in sizes if size))
        chosen = torch.arange(few, device="cpu") % rows
        forms = list(itertools.product((False, True), repeat=len(lists)))
        # As torch's own loader has it comes first, as libraries have it second.
        forms = [forms[0], forms[-1], *(forms[1:-1] if len(lists) <= _MIXED else [])]
        possible: list[tuple[bool, ...]] = []
        wrong, about_lists = "", False
        for form in forms:
            kept = {key: lists[key] for key, stacks in zip(lists, form, strict=True) if not stacks}
            inputs = _cut(_with(args, kwargs, kept), chosen, rows)
            try:
                outputs = self._run(*inputs)
            except Exception as error:  # whatever a model makes of inputs that are none for it
                if form == forms[0]:
                    wrong_type = isinstance(error, (TypeError, AttributeError))
                    about_lists = wrong_type and "list" in str(error)
                continue
            shape = _shape(outputs)
            if shape[:1] == (few,):
                return dict(zip(lists, form, strict=True))
            if not shape or shape[0] % few == 0 or few in shape[1:-1]:
                possible.append(form)  # tokens one after the other, say, or no tensor at all
            else:
                wrong = f"{shape[0]} rows of {few} samples"
        if wrong and not possible:
            name = next((repr(key) for key in lists if isinstance(key, str)), "the input")
            raise ValueError(
                f"data: {name} is a list in the samples, of which forward of "
                f"{type(self.model).__name__} makes {wrong}, given as a list or as a tensor; give "
                "a DataLoader whose collate_fn makes what the model takes"
            )
        # What fails in every form fails again, with its own message, in the forward pass proper.
        stacked = (True,) * len(lists)
        best = stacked if stacked in possible or (not possible and about_lists) else forms[0]
        if possible and best not in possible:
            best = possible[0]
        return dict(zip(lists, best, strict=True))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.model is not None
        tensor = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        args, kwargs = to_device((args, kwargs), device, self.dtype)
        with torch.no_grad(), self.quietly():
            return self.model(*args, **kwargs)


def _by_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def _with(
    args: tuple[Any, ...], kwargs: dict[str, Any], lists: Mapping[int | str, list[Any]]
) -> Arguments:
    """Arguments with some of them exchanged."""
    places = tuple(lists.get(at, value) for at, value in enumerate(args))
    return places, {name: lists.get(name, value) for name, value in kwargs.items()}


def _cut(value: Any, chosen: Tensor, rows: int) -> Any:
    """Take some samples out of a nested input, of every tensor and list with one entry a sample."""
    if isinstance(value, Tensor):
        whole = value.dim() > 0 and len(value) == rows
        return value.index_select(0, chosen.to(value.device)) if whole else value.clone()
    if isinstance(value, Mapping):
        return {name: _cut(one, chosen, rows) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(one, chosen, rows) for one in value))
    if isinstance(value, (list, tuple)):
        plain = not any(isinstance(one, (Tensor, Mapping, list, tuple)) for one in value)
        if plain and len(value) == rows:  # texts, say
            return type(value)(value[at] for at in chosen.tolist())
        return type(value)(_cut(one, chosen, rows) for one in value)
    return value


def _shape(outputs: Any) -> tuple[int, ...]:
    """Return the shape of the model's logits, or of the first tensor that it returns."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        found = next((leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    return tuple(found.shape) if isinstance(found, Tensor) else ()
