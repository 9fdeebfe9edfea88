"""The first assumption of the last-layer path: the head's output is F.linear(input, weight, bias).

The weights that are scored are those in force right after a forward pass (weight_norm, pruning and
parametrizations compute them there). They are held against what the head really returned; where
that is something else, the head is refused by name, unless a constant factor is all there is to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.precision import rounds_to
from ...sources.find_head import is_convolution
from .map_search import tidy
from .weights import (
    HeadCall,
    HeadReading,
    Sample,
    check_trained,
    effective,
    last_dim,
    refused,
    version,
)

# Numbers of one comparison, and classes of one at most: a vocabulary is not widened whole.
_NUMBERS = 2**16
_CLASSES = 2048
_ROWS = 32
# A factor is believed where that many numbers show it.
_ENOUGH = 64
# Relative rounding of float32 operands, by what PyTorch is allowed to round them to.
_EPS = {
    "ieee": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "bf16": torch.finfo(torch.bfloat16).eps,
}


def read_head(
    name: str, head: nn.Module, call: HeadCall, plain: bool, known: HeadReading | None = None
) -> tuple[HeadReading, Sample]:
    """Read the weights in force after ``call``, checked against what it returned.

    ``plain`` heads are checked on some rows, the others on all, and against ``known``: what was
    read after an earlier batch with the same weights.

    Raises
    ------
    ValueError
        The output is not that of a linear map with these weights.
    """
    if known is None and not plain:
        # One sample, or one class, proves no linear map.
        known = _read(name, head, _similar_call(head, call), plain, None)
    known = _read(name, head, call, plain, known)
    rows = last_dim(call.value, head)
    rows = rows.reshape(-1, rows.shape[-1])
    few = _spread(len(rows), _ROWS).to(rows.device)
    return known, Sample(rows[few].clone(), _shape_of(head, call.value), call.autocast)


def _read(
    name: str, head: nn.Module, call: HeadCall, plain: bool, known: HeadReading | None
) -> HeadReading:
    value, output = last_dim(call.value, head), last_dim(call.output, head)
    rows = value.reshape(-1, value.shape[-1])
    output = output.reshape(-1, output.shape[-1])
    at_once = max(_ROWS, _NUMBERS // min(output.shape[1], _CLASSES))
    for part in _spread(len(rows), at_once if plain else len(rows)).split(at_once):
        part = part.to(rows.device)
        known = _judge(name, head, rows[part], output[part], call.autocast, plain, known)
    assert known is not None
    return known


def _similar_call(head: nn.Module, call: HeadCall) -> HeadCall:
    """Call ``head`` with rows like those of ``call``: half to twice as long, with noise."""
    value = last_dim(call.value, head)
    rows = value.reshape(-1, value.shape[-1]).float().nan_to_num(0, 0, 0)
    random = torch.Generator().manual_seed(20231210)
    noise = torch.randn(2 * _ROWS, rows.shape[1], generator=random, device="cpu")
    factor = torch.rand(2 * _ROWS, 1, generator=random, device="cpu")
    chosen = rows[torch.arange(2 * _ROWS, device="cpu") % len(rows)]
    size = rows.square().mean().sqrt()
    near = chosen * (0.5 + 1.5 * factor.to(rows)) + 0.1 * size * noise.to(rows)
    return _call(
        head, near.reshape(_shape_of(head, call.value)).to(call.value.dtype), call.autocast
    )


def _shape_of(head: nn.Module, value: Tensor) -> tuple[int, ...]:
    """Shape in which rows (n, D) go into a head that was called with ``value``."""
    ones = (1,) * (value.dim() - 2)
    dim = last_dim(value, head).shape[-1]
    return (-1, dim, *ones) if is_convolution(head) else (*ones, -1, dim)


def read_again(name: str, head: nn.Module, sample: Sample, plain: bool) -> HeadReading:
    """Read the weights after calling the head with rows that an earlier checkpoint gave it."""
    call = _call(head, sample.rows.reshape(sample.shape), sample.autocast)
    return read_head(name, head, call, plain)[0]


def _call(head: nn.Module, value: Tensor, autocast: torch.dtype | None) -> HeadCall:
    allowed = torch.autocast(value.device.type, dtype=autocast, enabled=autocast is not None)
    with torch.no_grad(), allowed:
        output = head(value)
    return HeadCall(value, output, output, (version(value), version(output)), autocast)


def rounding(*tensors: Tensor, autocast: torch.dtype | None = None) -> float:
    """Relative rounding of a matrix product of ``tensors``: eps of the coarsest format used."""
    eps = [torch.finfo(t.dtype).eps for t in tensors]
    if autocast is not None:
        eps.append(torch.finfo(autocast).eps)
    if any(t.dtype == torch.float32 for t in tensors):
        eps.append(_EPS[rounds_to(tensors[0].device.type)])
    return max(eps)


def _spread(count: int, most: int) -> Tensor:
    """At most ``most`` numbers below ``count``, evenly spaced."""
    if count <= most:
        return torch.arange(count, device="cpu")
    return torch.arange(most, device="cpu") * count // most


def _judge(
    name: str,
    head: nn.Module,
    rows: Tensor,
    output: Tensor,
    autocast: torch.dtype | None,
    plain: bool,
    known: HeadReading | None = None,
) -> HeadReading:
    """Return the weights of ``head``; ``rows`` (n, D) went in and ``output`` (n, C) came out."""
    weight, bias = effective(name, head, (output.shape[1], rows.shape[1]))
    eps = rounding(rows, output, weight, autocast=autocast)
    # Sums of D products round once a product, in float32 at least.
    eps_sum = (1e-15 if rows.dtype == torch.float64 else 1e-7) * rows.shape[1] ** 0.5
    classes = _spread(len(weight), _CLASSES).to(weight.device)
    w, out = weight[classes].to(rows.device).double(), output[:, classes].double()
    b = torch.zeros_like(out[0]) if bias is None else bias[classes].to(rows.device).double()
    h = rows.double()
    linear = h @ w.T
    size = (h.square() @ w.square().T).sqrt_()
    # What is not finite, or overflows in the output alone, is for the scoring itself to refuse.
    limit = torch.finfo(output.dtype).max / 4
    usable = torch.isfinite(linear + b) & ((linear + b).abs() < limit)
    linear, size = torch.where(usable, linear, 0), torch.where(usable, size, 0)
    expected = torch.where(usable, linear + b, 0)
    out = torch.where(usable, out, 0)
    b = torch.where(usable, b, 0)

    def agrees(wanted: Tensor) -> bool:
        allowed = (4 * eps + eps_sum) * (size + wanted.abs() + b.abs()) + 1e-30
        return bool(((out - wanted).abs() <= allowed).all())

    if known is not None:
        if not agrees(known.output_scale * (known.input_scale * linear + b)):
            raise _differs(name, head, out, expected)
        return known
    slope = _slope(expected, out)
    enough = int(usable.sum()) >= _ENOUGH
    near_one = True
    if slope is not None and enough:
        # A factor near 1 hides in the rounding of each number, not in that of all together. A GPU's
        # TF32 cuts digits off, which is a factor itself.
        terms = (size + expected.abs() + b.abs()).norm() / expected.norm()
        rounded = eps_sum + eps * (0.5 if eps > 2e-3 or eps < 1e-6 else 1.5)
        near_one = abs(slope - 1) <= rounded * float(terms)
    if agrees(expected) and near_one:
        if not plain and not bool(linear.any()) and bool(h.any()):
            raise refused(name, head, "its weights are all zero, which hides what it does")
        check_trained(name, head)
        _check_all_classes(name, head, rows[:4], output[:4], weight, bias, eps + eps_sum)
        return HeadReading(weight, bias)
    inside = _slope(linear, out - b)
    if not enough:
        raise _differs(name, head, out, expected)
    candidates = []  # by what they leave unexplained: in 16 bits both may agree
    if slope and agrees(slope * expected):
        reading = HeadReading(weight, bias, output_scale=tidy(slope, eps))
        candidates.append((float((out - slope * expected).norm()), reading))
    if inside and bias is not None and agrees(inside * linear + b):
        reading = HeadReading(weight, bias, input_scale=tidy(inside, eps))
        candidates.append((float((out - inside * linear - b).norm()), reading))
    if not candidates:
        raise _differs(name, head, out, expected)
    reading = min(candidates, key=lambda one: one[0])[1]
    if bias is not None and not bool(b.any()):
        why = "it multiplies by a factor, and a bias of zeros hides whether that too"
        raise refused(name, head, why)
    check_trained(name, head)
    return reading


def _check_all_classes(
    name: str,
    head: nn.Module,
    rows: Tensor,
    output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Hold a few rows against all classes of a large vocabulary, which may be masked in places."""
    if len(weight) <= _CLASSES:
        return
    dtype = weight.dtype
    bias = None if bias is None else bias.to(rows.device, dtype)
    with torch.autocast(rows.device.type, enabled=False):
        expected = nn.functional.linear(rows.to(dtype), weight.to(rows.device), bias).float()
    # An upper bound of the rounding, without a copy of the weights: gross differences show.
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).to(rows.device)
    allowed = 8 * eps * (rows.float().abs().amax(1, keepdim=True) * norms + expected.abs()) + 1e-30
    out = output.float()
    usable = torch.isfinite(expected) & (expected.abs() < torch.finfo(output.dtype).max / 4)
    wrong = usable & ~((out - expected).abs() <= allowed)
    if bool(wrong.any()):
        raise _differs(name, head, torch.where(wrong, out, expected), expected)


def _differs(name: str, head: nn.Module, out: Tensor, expected: Tensor) -> ValueError:
    off = (out - expected).abs().nan_to_num(nan=float("inf"))
    row, column = divmod(int(off.argmax()), off.shape[1])
    return refused(
        name,
        head,
        f"it returned {float(out[row, column]):.6g} where its weight and bias give "
        f"{float(expected[row, column]):.6g}, so it is no plain linear map (a cosine head, an "
        "adapter, a normalisation, weights changed in its forward)",
    )


def _slope(given: Tensor, seen: Tensor) -> float | None:
    total = float(given.square().sum())
    return float((given * seen).sum()) / total if total else None
