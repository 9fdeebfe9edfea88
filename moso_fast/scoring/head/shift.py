"""Which label belongs to which token: the one at its place, or the one behind it.

A language model's logits at t are a prediction of token t + 1, those of a tagger of the label at t,
and the name of a class does not tell which (adapters and wrappers hide it; BART, XLM and XLNet
predict the token at its place). So the model's own loss is asked, once, by the first batch: it is
the mean over the counted tokens of one of the two readings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...sources.data.arguments import innermost
from ...sources.find_head import predicts_next_token

# What transformers leaves out of its losses, whatever the caller's ignore_index.
_IGNORED = -100
# The nearer reading is taken where the model's loss is that much nearer to it than to the other.
_NEARER = 0.2
# Readings that differ by less, relative to the loss, differ by rounding alone.
_APART = 1e-5

Forward = Callable[[], Any]


class LabelShift:
    """Decides whether token logits at t go with the label at t + 1.

    Parameters
    ----------
    model
        The network, possibly wrapped.
    given
        True or False, or ``"auto"``: decided by the first batch of token labels.
    ignore_index
        Label of what does not count.

    Attributes
    ----------
    value
        The decision; None until there is one.
    reason
        How it was come by.
    """

    def __init__(self, model: nn.Module, given: str | bool, ignore_index: int = -100) -> None:
        self.model, self.ignore_index = model, ignore_index
        self.value: bool | None = None if given == "auto" else bool(given)
        self.reason = "" if self.value is None else "given"

    def decide(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> bool:
        """Return the decision, made by this batch where there is none yet.

        Parameters
        ----------
        args, kwargs
            What the model is called with.
        labels
            Those of the batch: ids (B, T), or anything for which there is nothing to shift.

        Raises
        ------
        ValueError
            The batch shows that labels may be meant either way, and nothing says which.
        """
        if self.value is not None:
            return self.value
        if labels.dim() < 2 or labels.is_floating_point() or labels.shape[1] < 2:
            return False
        if bool((self._ids(labels)[:, 1:] == _IGNORED).all()):
            return False  # nothing that tells: a later batch decides
        self.value, self.reason = self._by_loss(args, kwargs, labels) or self._by_name(
            args, kwargs, labels
        )
        return self.value

    def stored(self) -> str:
        """Return the decision as a text that `restore` takes; empty without one."""
        return "" if self.value is None else f"{self.value}: {self.reason}"

    def restore(self, stored: str) -> None:
        """Take over the decision of an earlier run over the same data."""
        if self.value is None and stored:
            word, _, self.reason = stored.partition(": ")
            self.value = word == "True"

    def describe(self) -> str | bool:
        """Return the decision and its reason for the record; False where nothing was shifted."""
        if not self.value or self.reason == "given":
            return bool(self.value)
        return f"{self.value}, {self.reason}"

    def _by_loss(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor
    ) -> tuple[bool, str] | None:
        """Decide by the model's own loss; None where it gives none that tells."""
        outputs = self._with_labels(args, kwargs, labels)
        loss, logits = (_entry(outputs, name) for name in ("loss", "logits"))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(logits, Tensor):
            return None
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            return None
        own, ids = float(loss), self._ids(labels)
        read = {shift: _mean_loss(logits, ids, shift) for shift in (False, True)}
        if not abs(read[True] - read[False]) > _APART * max(1.0, abs(own)):
            return None  # a head of zeros predicts all tokens alike; also NaN
        apart = {shift: abs(own - value) for shift, value in read.items()}
        near = min(apart, key=lambda shift: apart[shift])
        if apart[near] <= _NEARER * apart[not near]:
            return near, "as in the model's own loss"
        if near == predicts_next_token(innermost(self.model)):
            # The loss has other parts, such as that of a router.
            return near, "as its class and, roughly, the model's own loss have it"
        return None

    def _with_labels(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Any:
        """Run the outermost network that takes labels, with them; None without one."""
        target = _takes_labels(self.model)
        if target is None:
            return None
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = (args, kwargs)
        if target is not innermost(self.model):
            inner = _inputs_of(target, self.model, args, kwargs)
            if inner is None:
                return None
            inputs = inner
        elif self.model is not target:
            target = self.model  # through its wrappers, which may bring the inputs to their devices
        device = next(
            (t.device for t in (*inputs[0], *inputs[1].values()) if isinstance(t, Tensor)),
            labels.device,
        )
        given = {**inputs[1], "labels": self._ids(labels).to(device)}
        try:
            return target(*inputs[0], **given)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
            # Its "labels" are something else than ours: it says nothing, as if it took none.
            return None

    def _ids(self, labels: Tensor) -> Tensor:
        ids = labels.long()
        return torch.where(ids == self.ignore_index, _IGNORED, ids)

    def _by_name(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor
    ) -> tuple[bool, str]:
        """Decide by the class of the network, and by what the labels are."""
        if predicts_next_token(innermost(self.model)):
            return True, "by the model's class"
        if _are_inputs(labels, (*args, *kwargs.values()), self.ignore_index):
            raise ValueError(
                "labels are the tokens that the model reads, and it gives no loss that tells "
                "whether its logits at t predict the token at t or the next one; say so by "
                "shift_labels=True (the next one: language models) or shift_labels=False"
            )
        return False, "the label at its place"


def _takes_labels(model: nn.Module) -> nn.Module | None:
    """Return the outermost network in ``model`` whose forward has an argument ``labels``."""
    inner = innermost(model)
    for module in inner.modules():
        try:
            names = inspect.signature(module.forward).parameters
        except (TypeError, ValueError):  # a forward without a signature
            continue
        if "labels" in names:
            return module
    return None


def _inputs_of(
    target: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what a network within the model is called with, or None where it is not."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = target.register_forward_pre_hook(
        lambda module, given, named: seen.append((given, named)), with_kwargs=True
    )
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 else None


def _entry(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)


def _mean_loss(logits: Tensor, ids: Tensor, shift: bool) -> float:
    """Mean cross-entropy over the tokens that count; NaN where none does."""
    if shift:
        logits, ids = logits[:, :-1], ids[:, 1:]
    ids = ids.to(logits.device)
    return float(
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), ignore_index=_IGNORED)
    )


def _are_inputs(labels: Tensor, given: tuple[Any, ...], ignore_index: int) -> bool:
    """Tell whether the labels that count are the tokens at their places that the model is given."""
    ids = labels.long()
    for value in given:
        if (
            not isinstance(value, Tensor)
            or value.shape != labels.shape
            or value.is_floating_point()
        ):
            continue
        tokens = value.long().to(ids.device)
        counted = ids != ignore_index
        if bool(counted.any()) and bool((tokens == ids)[counted].all()):
            return len(ids[counted].unique()) > 1  # a mask of ones is not the text
    return False
