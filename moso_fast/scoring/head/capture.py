"""Runs a model and returns what went into its head, row by row as its logits go with the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ...sources.find_head import FULL_GRADIENT
from .linear_check import read_head
from .output_check import OutputCheck
from .reads import watched
from .weights import HeadCall, HeadReading, Sample, autocast_dtype, is_plain, version


class HeadCapture:
    """The inputs of a head, after the checks that the model's loss is that of a linear map of them.

    Parameters
    ----------
    model, name, head
        The network, and its last layer as `find_head` gives it.

    Attributes
    ----------
    reading
        The weights of the head in force, and factors in its forward.
    sample
        Some of its inputs, to read it again with other weights.
    check
        What lies between the head's output and the model's logits.
    """

    def __init__(self, model: nn.Module, name: str, head: nn.Module) -> None:
        self.model, self.name, self.head = model, name, head
        self.check = OutputCheck(name, head)
        self.reading: HeadReading | None = None
        self.sample: Sample | None = None
        self.plain = is_plain(head)
        self._call: HeadCall | None = None
        self._replacement: Tensor | None = None
        self._writes = False  # to its inputs
        self._deaf = False  # to calls that are none of ours
        #: Whether the model reads the head's tensors outside of the head, where other weights of
        #: the head then make other features.
        self.read_elsewhere = False
        self._copies = False  # of the head's input and output, since the model writes to them

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Listen to the head in the block, which goes over the data once with the same weights."""
        self.reading, self.sample = None, None
        self.check.begin()
        self.plain = is_plain(self.head)
        self.read_elsewhere = False
        handle = self.head.register_forward_hook(self._called, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._call = self._replacement = None

    def features(self, args: Any, kwargs: Any) -> Tensor:
        """Run one batch: features (..., D), one row for each row of the model's logits (..., C).

        Raises
        ------
        TypeError, ValueError
            A head that is not called once, whose output is not that of a linear map, or is not the
            model's logits.
        """
        # A batch may be run again, and some models write to their inputs: of the first one a copy
        # is kept, and from then on of every one where that was seen.
        kept = _copied((args, kwargs)) if self.reading is None or self._writes else None
        before = _versions((args, kwargs))
        with watched(self.head) if self.reading is None else nullcontext() as reads:
            call, outputs = self._forward(args, kwargs)
        self.read_elsewhere |= reads is not None and reads.found
        wrote = _versions((args, kwargs)) != before
        self._writes |= wrote

        def again(output: Tensor | None = None) -> tuple[HeadCall, Any]:
            if wrote and kept is None:
                raise ValueError(
                    "model: it writes to its inputs in this batch, not in the first one, so that "
                    f"it cannot be run again to be checked; {FULL_GRADIENT}"
                )
            inputs, named = _copied(kept) if wrote else (args, kwargs)
            return self._forward(inputs, named, output)

        if any(call.overwritten()) and not self._copies:
            # The model writes to the head's tensors afterwards: from now on they are copied.
            self._copies = True
            call, outputs = again()
        if self.reading is None or not self.plain:
            known = self.reading
            self.reading, self.sample = read_head(self.name, self.head, call, self.plain, known)
        return self.check.features(call, outputs, lambda output: again(output)[1])

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Let others run the model in the block, during a pass, and note nothing of it."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def outputs(self, args: Any, kwargs: Any) -> Any:
        """Return what the model makes of one batch, and keep nothing of it."""
        return self._forward(args, kwargs)[1]

    def _forward(
        self, args: Any, kwargs: Any, output: Tensor | None = None
    ) -> tuple[HeadCall, Any]:
        """Run the model, with ``output`` in the place of the head's; its call and the result."""
        self._call, self._replacement = None, output
        outputs = self.model(*args, **kwargs)
        call: HeadCall | None = self._call
        self._call = self._replacement = None
        if call is None:
            raise ValueError(
                f"head {self.name!r} was not called in the forward pass of the model; "
                "choose the last layer with head="
            )
        return call, outputs

    def _called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """Note what went into the head and what came out (a forward hook)."""
        if self._deaf:
            return None
        if self._call is not None:
            raise ValueError(
                f"head {self.name!r} was called more than once in one forward pass; "
                "its gradient is then no product of one input and one residual"
            )
        value = args[0] if args else kwargs.get("input")
        for tensor, what in ((value, "got"), (output, "returned")):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"head {self.name!r} {what} no tensor, but {type(tensor).__name__}")
        assert isinstance(value, Tensor)
        # Writes to a tensor of inference mode are not counted: those are copied at once.
        kept, made = (t.clone() if self._copies or t.is_inference() else t for t in (value, output))
        self._call = HeadCall(
            kept, made, output, (version(kept), version(output)), autocast_dtype(value.device.type)
        )
        return self._replacement


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _versions(value: Any) -> list[int]:
    return [version(tensor) for tensor in _tensors(value)]


def _copied(value: Any) -> Any:
    """Copy the tensors of a nested input."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    return type(value)(map(_copied, value)) if isinstance(value, (tuple, list)) else value
