"""Every rule of full/norms with every option of its layer: traced, and as plain autograd has it.

A rule that is wrong is found by the engine, which then takes explicit gradients: the scores stay
right. So these tests also want that nothing fell back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import ROWS, batch_of, check_once, check_rule, gradients_by_name, network_of
from torch import Tensor, nn

from moso_fast.full.methods import Methods
from moso_fast.full.norms import convolution, factors
from moso_fast.full.passes import traced


class Calls(nn.Module):
    """Calls ``run(x, *parameters)`` behind a layer, so that the input has a gradient, too."""

    def __init__(self, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.run = run
        self.weights = nn.ParameterList(torch.randn(shape) + 2.0 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.weights)


def inputs_of(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, dtype=torch.float64)


def check(layer: nn.Module, *shape: int, explicit: tuple[str, ...] = (), calls: int = 0) -> None:
    """Check a layer for inputs (B, *shape), behind another, and where it comes first.

    ``explicit`` parameters have no rule; ``calls`` are traced. In front, no gradient of the layer's
    input is asked for.
    """
    for tensor in layer.buffers():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.3, 1.5)
    first = nn.Linear(shape[-1], shape[-1])
    model = nn.Sequential(first, layer).double().eval()
    names = tuple(f"1.{name}" for name in explicit)
    check_once(model, inputs_of(*shape), names, calls + 1)
    check_rule(model[1:], inputs_of(*shape), names, calls)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear": (F.linear, (4,), [(3, 4)]),
    "linear, bias": (F.linear, (4,), [(3, 4), (3,)]),
    "linear by keywords": (lambda x, w, b: F.linear(x, w, bias=b), (4,), [(3, 4), (3,)]),
    "linear, tokens": (F.linear, (6, 4), [(3, 4), (3,)]),
    "linear, many tokens": (F.linear, (60, 4), [(3, 4), (3,)]),
    "linear, tokens of tokens": (F.linear, (2, 3, 4), [(3, 4), (3,)]),
    "linear, tokens first": (
        lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1),
        (6, 4),
        [(3, 4), (3,)],
    ),
    "linear, tokens folded": (
        lambda x, w, b: F.linear(x.flatten(0, 1), w, b).view(len(x), -1, 3),
        (6, 4),
        [(3, 4), (3,)],
    ),
    "@": (lambda x, w: x @ w, (4,), [(4, 3)]),
    "@, tokens": (lambda x, w: x @ w, (6, 4), [(4, 3)]),
    "torch.matmul": (torch.matmul, (6, 4), [(4, 3)]),
    "torch.mm": (torch.mm, (4,), [(4, 3)]),
    "Tensor.matmul": (Tensor.matmul, (6, 4), [(4, 3)]),
    "Tensor.mm": (Tensor.mm, (4,), [(4, 3)]),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (4,), [(4, 3), (3,)]),
    "used twice": (lambda x, w, b: F.linear(F.linear(x, w, b), w, b), (4,), [(4, 4), (4,)]),
    "used both ways": (lambda x, w: F.linear(x @ w, w), (4,), [(4, 3)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    run, shape, weights = PRODUCTS[name]
    check(Calls(run, *weights), *shape, calls=2 if "used" in name else 1)


CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (2, {}),
    "no bias": (2, {"bias": False}),
    "1d": (1, {"stride": 2, "padding": 1, "dilation": 2}),
    "3d": (3, {"stride": (1, 2, 1), "padding": (1, 0, 1), "dilation": (1, 1, 2)}),
    "groups": (2, {"groups": 2, "padding": (1, 2), "stride": (2, 1)}),
    "depthwise": (2, {"groups": 4, "dilation": (2, 1)}),
    "same": (2, {"padding": "same", "dilation": (1, 2)}),
    "valid": (1, {"padding": "valid"}),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices, gradients of all samples, or one sample at a time, whatever is cheaper."""
    rank, options = CONVOLUTIONS[name]
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    for ghost, alone in ((1e9, 1e12), (-1e9, 1e12), (-1e9, 0)):
        monkeypatch.setattr(factors, "_OPERATIONS_PER_ENTRY", ghost)
        monkeypatch.setattr(convolution, "_ONE_BY_ONE", alone)
        layer = kind(4, 8, 3, **options)
        check(layer, 4, *[6] * (rank - 1), 7, calls=1)


def test_convolutions_by_the_way_that_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time from so many operations on, unless Gram matrices are cheaper."""
    asked, singles = [], []
    native = convolution._native

    def watched(gradient: Tensor, *args: Any, of_input: bool) -> Tensor:
        singles.append((not of_input, len(gradient)))
        return native(gradient, *args, of_input=of_input)

    monkeypatch.setattr(convolution, "_native", watched)
    # Two images a sample, of 5 x 6 places; blocks of 4 rows and 2 * 3 * 2 columns.
    work = 2 * (2 * 5 * 6) * 2 * 4 * (2 * 3 * 2)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1), w, groups=2).unflatten(0, (len(x), 2))

    for ghost, most, alone in ((False, work - 1, True), (False, work, False), (True, 0, False)):
        monkeypatch.setattr(convolution, "_ONE_BY_ONE", most)
        monkeypatch.setattr(
            convolution,
            "ghost_is_cheaper",
            lambda *sizes, ghost=ghost: asked.append(sizes) or ghost,
        )
        singles.clear()
        check(Calls(run, (8, 2, 3, 2)), 2, 4, 7, 7, calls=1)
        assert set(asked) == {(60, 4, 12, 4)}
        assert ((True, 10) not in singles) is alone


@pytest.mark.parametrize("name", ["by keywords", "numbers in lists"])
def test_convolutions_called_as_functions(name: str) -> None:
    ways = {
        "by keywords": lambda x, w, b: F.conv2d(x, w, bias=b, stride=2, padding=1),
        "numbers in lists": lambda x, w, b: F.conv2d(x, w, b, [2], [1], [1], 2),
    }
    check(Calls(ways[name], (6, 4 if name == "by keywords" else 2, 3, 3), (6,)), 4, 6, 7, calls=1)


def test_convolution_of_images_in_the_batch() -> None:
    """Several images of a sample lie one after the other, of one place in the end or of more."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(x.flatten(0, 1), w, b, padding=1).view(len(x), -1)

    for length in (1, 7):
        check(Calls(run, (6, 4, 3), (6,)), 3, 4, length, calls=1)


def test_convolution_with_one_more_row_on_one_side_has_no_rule() -> None:
    layer = nn.Conv1d(4, 6, 2, padding="same")
    check(layer, 4, 7, explicit=("weight", "bias"))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch, vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch, lines": (lambda: nn.BatchNorm1d(4, eps=0.1), (4, 6)),
    "batch, images": (lambda: nn.BatchNorm2d(4), (4, 3, 6)),
    "batch, volumes": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 6)),
    "layer": (lambda: nn.LayerNorm(4), (4,)),
    "layer, tokens": (lambda: nn.LayerNorm(4, eps=0.1), (6, 4)),
    "layer, two dimensions": (lambda: nn.LayerNorm((6, 4)), (3, 6, 4)),
    "layer, no bias": (lambda: nn.LayerNorm(4, bias=False), (6, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group, lines": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 6)),
    "group, images": (lambda: nn.GroupNorm(1, 4), (4, 3, 6)),
    "rms": (lambda: nn.RMSNorm(4), (4,)),
    "rms, tokens": (lambda: nn.RMSNorm(4, eps=0.1), (6, 4)),
    "rms, two dimensions": (lambda: nn.RMSNorm((6, 4)), (3, 6, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    build, shape = NORMS[name]
    check(build(), *shape, calls=1)


@pytest.mark.parametrize("kind", [F.layer_norm, F.rms_norm])
def test_norms_over_the_samples_too_are_left_to_torch(kind: Callable[..., Tensor]) -> None:
    """Here of a table that is the same for all samples."""
    table = torch.randn(6, 4, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return x * kind(table, table.shape, weight)

    check(Calls(run, (6, 4)), 6, 4, explicit=("weights.0",))


def test_one_vector_in_every_kind_of_layer() -> None:
    """Its uses are of one kind, so that they can be added."""

    def run(x: Tensor, p: Tensor, w: Tensor, k: Tensor) -> Tensor:
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        x = F.rms_norm(F.layer_norm(x, (4,), p, p), (4,), p)
        x = F.group_norm(F.batch_norm(x.transpose(1, 2), mean, var, p, p), 2, p, p)
        return F.linear(F.conv1d(x, k, p).transpose(1, 2), w, p) * p

    check(Calls(run, (4,), (4, 4), (4, 4, 1)), 6, 4, calls=7)


ELEMENTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "x + p": (lambda x, p: x + p, (4,)),
    "p + x": (lambda x, p: p + x, (4,)),
    "x - p": (lambda x, p: x - p, (6, 4)),
    "p - x": (lambda x, p: p - x, (1, 6, 4)),
    "x * p": (lambda x, p: x * p, ()),
    "p * x": (lambda x, p: p * x, (1, 1, 4)),
    "x / p": (lambda x, p: x / p, (6, 1)),
    "p / x": (lambda x, p: p / (x.square() + 1), (1, 4)),
    "torch.add": (lambda x, p: torch.add(x, p, alpha=3), (4,)),
    "torch.sub": (lambda x, p: torch.sub(p, x, alpha=3), (6, 4)),
    "torch.mul": (torch.mul, (4,)),
    "torch.div": (torch.div, (4,)),
    "Tensor.add": (lambda x, p: x.add(p), (4,)),
    "Tensor.sub": (lambda x, p: p.sub(x), (4,)),
    "Tensor.mul": (lambda x, p: p.mul(x), (6, 4)),
    "Tensor.div": (lambda x, p: x.div(p), (4,)),
    "expand": (lambda x, p: p.expand(len(x), -1, -1) * x, (1, 6, 4)),
    "expand, a tuple": (lambda x, p: p.expand((len(x), 6, 4)) * x, (6, 4)),
    "expand, a size": (lambda x, p: p.expand(x.shape) * x, (4,)),
    "twice": (lambda x, p: (x * p).sin() + p, (4,)),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_parameters_among_the_rows(name: str) -> None:
    run, shape = ELEMENTS[name]
    check(Calls(run, shape), 6, 4, calls=2 if name == "twice" else 1)


LOW: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (300, 4)),
    "convolution": (lambda: nn.Conv1d(4, 3, 3), (4, 300)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (4, 300)),
    "layer norm": (lambda: nn.LayerNorm(4), (300, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 300)),
    "rms norm": (lambda: nn.RMSNorm(4), (300, 4)),
    "one each": (lambda: Calls(torch.mul, (4,)), (300, 4)),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LOW)
def test_sums_over_many_positions_are_not_taken_in_16_bits(
    name: str, autocast: torch.dtype | None
) -> None:
    """As 16-bit parameters and inputs, or within autocast; all of it is traced."""
    build, shape = LOW[name]
    model = build().bfloat16().double().eval()
    inputs = inputs_of(*shape).bfloat16().double()
    expected = gradients_by_name(model, inputs)
    kind = torch.float32 if autocast else torch.bfloat16
    network = network_of(model.to(kind), autocast=autocast)
    methods = Methods(network)
    methods.prepare(batch_of(inputs.to(kind)))
    assert methods.plan.others == {}
    _, sums, tape = traced(network, methods.plan, batch_of(inputs.to(kind)))
    for (key, name), total in zip(network.names.items(), sums, strict=True):
        g = expected[name]
        square = g.square().flatten(1).sum(1)
        assert total is not None and total.dtype == kind
        assert (total.double() - g.sum(0)).norm() <= 0.02 * g.sum(0).norm()
        assert tape.norms[key].dtype == torch.float64
        assert ((tape.norms[key] - square).abs() <= 0.05 * square).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LOW if name.endswith("norm")])
def test_16_bit_norms_of_small_inputs(name: str, dtype: torch.dtype) -> None:
    """There an eps of 16 bits would outweigh them: PyTorch takes that of float32."""
    build, (channels, size) = LOW[name]
    model = build().to(dtype).double().eval()
    inputs = (0.02 * inputs_of(channels, min(size, 6))).to(dtype).double()
    expected = gradients_by_name(model, inputs)
    network = network_of(model.to(dtype))
    methods = Methods(network)
    methods.prepare(batch_of(inputs.to(dtype)))
    _, _, tape = traced(network, methods.plan, batch_of(inputs.to(dtype)))
    for key, name in network.names.items():
        square = expected[name].square().flatten(1).sum(1)
        assert (tape.norms[key] - square).norm() <= 0.02 * square.norm()
