"""LSTM, GRU and plain RNN layers and cells written out in linear layers, step by step.

The fused kernels have no forward-mode derivative, and their backward shows only the sum over the
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .packed import Places

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

RECURRENT: dict[Any, str] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
CELLS: dict[Any, str] = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "rnn_tanh",
    torch.rnn_relu_cell: "rnn_relu",
}


def is_packed(args: tuple[Any, ...]) -> bool:
    """Tell whether the arguments of a recurrent layer begin with a packed sequence."""
    return len(args) == 9 and isinstance(args[3], (list, tuple))


def weights_of(args: tuple[Any, ...]) -> Sequence[Tensor]:
    """Weights among the arguments of a recurrent layer, packed or not."""
    found = args[3] if is_packed(args) else args[2]
    return found if isinstance(found, (list, tuple)) else ()


def recurrent(
    linear: Linear,
    kind: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    order: Tensor | None = None,
) -> Any:
    """Compute what ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu`` give.

    ``order`` (B,): the sample of each column of a packed sequence; None = as they are packed.
    Returns NotImplemented for projections (``proj_size``) and dropout.
    """
    if kwargs or len(args) != 9:
        return NotImplemented
    places = None
    if is_packed(args):
        x, sizes, state, weights, has_bias, layers, dropout, training, two_way = args
        batch_first = False
        places = Places(sizes, order, x.device)
    else:
        x, state, weights, has_bias, layers, dropout, training, two_way, batch_first = args
    hidden, cell = state if kind == "lstm" else (state, state)
    per_direction = 4 if has_bias else 2
    directions = 2 if two_way else 1
    if len(weights) != layers * directions * per_direction or (dropout and training):
        return NotImplemented
    if cell.shape[-1] != hidden.shape[-1]:
        return NotImplemented
    active = None
    if places is not None:
        steps, active = places.unpacked(x), places.active
        hidden, cell = places.by_sample(hidden), places.by_sample(cell)
    else:
        steps = x.transpose(0, 1) if batch_first else x
    last_hidden: list[Tensor] = []
    last_cell: list[Tensor] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * per_direction : (number + 1) * per_direction]
            w_in, w_state, b_in, b_state = own if has_bias else (*own, None, None)
            start = (hidden[number], cell[number] if kind == "lstm" else None)
            result, h, c = _layer(
                linear, kind, steps, start, (w_in, w_state, b_in, b_state), active, direction == 1
            )
            outputs.append(result)
            last_hidden.append(h)
            if c is not None:
                last_cell.append(c)
        steps = torch.cat(outputs, -1) if two_way else outputs[0]
    states = [torch.stack(last_hidden)] + ([torch.stack(last_cell)] if kind == "lstm" else [])
    if places is not None:
        return places.packed(steps), *map(places.as_packed, states)
    return (steps.transpose(0, 1) if batch_first else steps), *states


def cell(linear: Linear, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute what ``torch.lstm_cell``, ``torch.gru_cell`` and ``torch.rnn_..._cell`` give."""
    if kwargs or not 4 <= len(args) <= 6:
        return NotImplemented
    x, state, w_in, w_state, b_in, b_state = (*args, None, None)[:6]
    h, c = state if kind == "lstm" else (state, None)
    h, c = _step(kind, linear(x, w_in, b_in), linear(h, w_state, b_state), h, c)
    return h if c is None else (h, c)


def _layer(
    linear: Linear,
    kind: str,
    x: Tensor,
    start: tuple[Tensor, Tensor | None],
    weights: Sequence[Tensor | None],
    active: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one direction over (T, B, D); ``active`` (T, B): where a sequence has a step."""
    w_in, w_state, b_in, b_state = weights
    assert w_in is not None and w_state is not None
    from_input = linear(x.flip(0) if backwards else x, w_in, b_in)
    if active is not None and backwards:
        active = active.flip(0)
    h, c = start
    outputs = []
    for time, now in enumerate(from_input):
        new_h, new_c = _step(kind, now, linear(h, w_state, b_state), h, c)
        if active is not None:
            # The state of a sequence that has ended, or backwards not begun, stays as it is.
            goes_on = active[time, :, None]
            new_h = torch.where(goes_on, new_h, h)
            new_c = None if new_c is None or c is None else torch.where(goes_on, new_c, c)
        h, c = new_h, new_c
        outputs.append(h)
    result = torch.stack(outputs)
    return (result.flip(0) if backwards else result), h, c


def _step(
    kind: str, now: Tensor, step: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Next state from what the input (``now``) and the state (``step``) contribute."""
    if kind == "lstm":
        assert c is not None
        i, f, g, o = (now + step).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        reset_x, update_x, new_x = now.chunk(3, -1)
        reset_h, update_h, new_h = step.chunk(3, -1)
        update = (update_x + update_h).sigmoid()
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        return new + update * (h - new), None
    total = now + step
    return (total.tanh() if kind == "rnn_tanh" else total.relu()), None
