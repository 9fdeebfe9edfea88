"""What the forward of a model takes, and what of a batch goes there."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..find_head import unwrapped

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def innermost(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, torch.compile and the adapters of peft."""
    while True:
        inside = unwrapped(model)
        if any(c.__name__ == "PeftModel" for c in type(inside).__mro__):
            inside = inside.get_base_model()  # type: ignore[operator]
        if inside is model:
            return model
        model = inside


class Arguments:
    """Chooses what of a batch the forward of ``model`` is called with.

    Parameters
    ----------
    model
        The network, possibly wrapped; None takes everything.
    columns
        Names of the entries of a dict batch that the model gets; None = those that its forward
        names, or all where it takes any (``**kwargs``).

    Raises
    ------
    TypeError
        ``columns`` that are no names.
    """

    def __init__(self, model: nn.Module | None, columns: Sequence[str] | None = None) -> None:
        if columns is not None:
            columns = list(columns) if not isinstance(columns, str) else [columns]
            if not columns or not all(isinstance(name, str) for name in columns):
                raise TypeError(f"columns must be names of entries of a batch, got {columns!r}")
        self.columns = columns
        self.model = model
        self.kind = "the model"
        self.named: set[str] = set()  # what can be given by name
        self.required: list[str] = []
        self.places: float = float("inf")  # how many can be given by place
        self.anything = True
        self._noticed = self._transformers = False
        if model is None:
            return
        inner = innermost(model)
        self.kind = type(inner).__name__
        # Only tensors mean anything to a network of transformers, whatever its **kwargs let in.
        self._transformers = any(c.__name__ == "PreTrainedModel" for c in type(inner).__mro__)
        try:
            parameters = list(inspect.signature(inner.forward).parameters.values())
        except (TypeError, ValueError):  # a forward without a signature
            return
        kinds = {p.kind for p in parameters}
        self.anything = inspect.Parameter.VAR_KEYWORD in kinds
        self.named = {p.name for p in parameters if p.kind in _BY_NAME}
        fixed = [p for p in parameters if p.kind in (*_BY_NAME, *_BY_PLACE)]
        if not inner._forward_pre_hooks:  # which may add what is missing
            self.required = [p.name for p in fixed if p.default is p.empty]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            self.places = sum(p.kind in _BY_PLACE for p in parameters)

    def accepts(self, name: str) -> bool:
        """Tell whether forward can be given an argument of that name."""
        return self.anything or name in self.named

    def gets(self, name: str) -> bool:
        """Tell whether the model gets a column of numbers of that name from a dict batch."""
        if self.columns is not None:
            return name in self.columns
        return name in self.named or (self.anything and not self._transformers)

    def choose(self, entries: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a dict batch, of which the labels are taken out.

        Raises
        ------
        ValueError
            A column that is not there or that forward does not take; nothing for what it needs.
        """
        if self.columns is not None:
            missing = [name for name in self.columns if name not in entries]
            if missing:
                raise ValueError(
                    f"columns: a batch has no {missing[0]!r}; it has {_names(entries)}"
                )
            entries = {name: entries[name] for name in self.columns}
        taken = {name: value for name, value in entries.items() if self._takes(name, value)}
        left = {name: value for name, value in entries.items() if name not in taken}
        if not left:
            return (), self._complete(taken, entries)
        if not taken:
            # An input under another name than forward has for it, such as "image" for "x".
            inputs = left
            if self.columns is None:
                inputs = {n: v for n, v in left.items() if isinstance(v, Tensor)}
                if len(inputs) > 1:  # numbers beside images, say
                    inputs = {name: v for name, v in inputs.items() if v.dim() > 1}
            if len(inputs) == max(1, len(self.required)) and (
                len(inputs) == 1 or self.columns is not None
            ):
                self._notice([name for name in left if name not in inputs])
                return tuple(inputs.values()), {}
        elif self.columns is not None:
            raise ValueError(
                f"columns: forward of {self.kind} takes no {next(iter(left))!r}; "
                f"it takes {', '.join(sorted(self.named))}"
            )
        self._complete(taken, entries)
        self._notice(list(left))
        return (), taken

    def _takes(self, name: str, value: Any) -> bool:
        if name in self.named or not self.anything:
            return name in self.named
        return self.model is None or not (self._transformers and _is_text(value))

    def _complete(self, taken: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in self.required if name not in taken]
        if missing:
            raise ValueError(
                f"data: forward of {self.kind} needs {missing[0]!r}, and a batch has "
                f"{_names(entries)}; rename the entry, or choose the model's input with columns="
            )
        return taken

    def _notice(self, left: list[str]) -> None:
        if left and not self._noticed:
            self._noticed = True
            warnings.warn(
                f"data: {', '.join(map(repr, left))} of a batch left out, which forward of "
                f"{self.kind} does not take (columns= chooses what it gets)",
                stacklevel=2,
            )


def decoder_inputs(
    model: nn.Module | None, arguments: Arguments, kwargs: dict[str, Any], labels: Tensor
) -> dict[str, Any]:
    """Add what an encoder-decoder of transformers builds the inputs of its decoder from.

    Its own method makes them of the labels where it has one; else it gets the labels themselves.
    """
    if model is None or labels.dim() != 2 or labels.is_floating_point():
        return kwargs
    if any(name in kwargs for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return kwargs
    for module in model.modules():
        config = getattr(module, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            continue
        prepare = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if callable(prepare) and arguments.accepts("decoder_input_ids"):
            return {**kwargs, "decoder_input_ids": prepare(labels=labels)}
        generates = getattr(module, "can_generate", None)
        if callable(generates) and generates() and arguments.accepts("labels"):
            return {**kwargs, "labels": labels}
        return kwargs
    return kwargs


def _is_text(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (str, bytes))


def _names(entries: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, entries)) or "nothing but labels"
