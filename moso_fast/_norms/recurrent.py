"""LSTM, GRU and plain RNN layers written out in linear layers, step by step.

The fused kernels have no forward-mode derivative, and their backward shows only the sum over the
samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(linear: Linear, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute what ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` and ``torch.rnn_relu`` give.

    Returns NotImplemented for packed sequences, projections (``proj_size``) and dropout.
    """
    if kwargs or len(args) != 9 or isinstance(args[3], (list, tuple)):
        return NotImplemented
    x, state, weights, has_bias, layers, dropout, training, two_way, batch_first = args
    hidden, cell = state if kind == "lstm" else (state, state)
    per_direction = 4 if has_bias else 2
    directions = 2 if two_way else 1
    if len(weights) != layers * directions * per_direction or (dropout and training):
        return NotImplemented
    if cell.shape[-1] != hidden.shape[-1]:
        return NotImplemented
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
            sequence = steps.flip(0) if direction else steps
            result, h, c = _layer(linear, kind, sequence, start, w_in, w_state, b_in, b_state)
            outputs.append(result.flip(0) if direction else result)
            last_hidden.append(h)
            if c is not None:
                last_cell.append(c)
        steps = torch.cat(outputs, -1) if two_way else outputs[0]
    result = steps.transpose(0, 1) if batch_first else steps
    if kind == "lstm":
        return result, torch.stack(last_hidden), torch.stack(last_cell)
    return result, torch.stack(last_hidden)


def _layer(
    linear: Linear,
    kind: str,
    x: Tensor,
    start: tuple[Tensor, Tensor | None],
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor | None,
    b_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one direction over (T, B, D)."""
    from_input = linear(x, w_in, b_in)
    h, c = start
    outputs = []
    for now in from_input:
        step = linear(h, w_state, b_state)
        if kind == "lstm":
            assert c is not None
            i, f, g, o = (now + step).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif kind == "gru":
            reset_x, update_x, new_x = now.chunk(3, -1)
            reset_h, update_h, new_h = step.chunk(3, -1)
            update = (update_x + update_h).sigmoid()
            new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
            h = new + update * (h - new)
        else:
            h = (now + step).tanh() if kind == "rnn_tanh" else (now + step).relu()
        outputs.append(h)
    return torch.stack(outputs), h, c
