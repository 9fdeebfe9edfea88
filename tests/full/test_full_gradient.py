"""Whole-network scores against batch-size-1 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, MODELS, Vit, build, data, gradients, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.core.formulas import FORMULAS
from moso_fast.scorer import MoSoScorer
from moso_fast.tables.table import ScoreTable

N = 13


def score(
    model: nn.Module, inputs: Tensor, labels: Tensor, formula: str = "moso", **kw: object
) -> ScoreTable:
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False, **kw)
    return scorer.score(TensorDataset(inputs, labels), formula=formula)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_formula_in_double_precision(name: str) -> None:
    model, (inputs, labels) = build(name), data(name, N)
    g = gradients(model, inputs, labels)
    for formula in FORMULAS:
        table = score(model, inputs, labels, formula)
        expected = scores(g, formula)
        error = (table.scores - expected).abs().max() / expected.abs().max()
        assert error < 1e-10, formula
    square = g.square().sum(1)
    torch.testing.assert_close(table.metrics["grad_sqnorm"], square, rtol=1e-10, atol=0)
    losses = F.cross_entropy(model(inputs), labels, reduction="none").detach()
    torch.testing.assert_close(table.metrics["loss"], losses, rtol=1e-10, atol=0)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_single_precision(name: str) -> None:
    inputs, labels = data(name, N)
    expected = scores(gradients(build(name), inputs, labels), "moso")
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    table = score(build(name, torch.float32), inputs, labels)
    assert table.scores.dtype == torch.float32
    assert (table.scores - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.exhaustive
def test_what_is_traced_and_what_falls_back() -> None:
    for name in MODELS:
        facts = score(build(name), *data(name, N)).provenance
        explicit = facts["norms_explicit"]
        if name != "odd":
            assert facts["alignment"] == "forward mode", name
            assert explicit == [], name
            continue
        reason = "double backward; no forward mode: _weight_norm_interface does not support it"
        assert facts["alignment"] == reason
        assert {one.split()[0] for one in explicit} == {
            *("slope.weight", "pair.weight", "pair.bias", "fc.bias"),
            *("fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"),
        }
        assert facts["norms_explicit_by"] == "vmap"


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Random stacks of layers over (B, C, 6, 6), closed by one of three heads."""
    channels, layers = 3, []
    torch.manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, channels]))
        width = groups * draw(st.integers(1, 3))
        kernel, dilation = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (3, 2)]))
        stride, bias = draw(st.integers(1, 2)), draw(st.booleans())
        layers.append(
            nn.Conv2d(channels, width, kernel, stride, 2, dilation, groups=groups, bias=bias)
        )
        channels = width
        norm = draw(st.sampled_from(["none", "batch", "group"]))
        if norm != "none":
            layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width))
        layers.append(draw(st.sampled_from([nn.ReLU(True), nn.Tanh(), nn.GELU()])))
    head = draw(st.sampled_from(["pool", "tokens", "twice"]))
    if head == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        shared = nn.Linear(channels, channels)
        layers += [nn.Flatten(2), Transpose(), nn.LayerNorm(channels), shared, nn.Tanh()]
        layers += [shared] if head == "twice" else []
        layers += [Transpose(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES)).double().eval()


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.exhaustive
@settings(max_examples=25, deadline=None)
@given(networks())
def test_random_architectures(model: nn.Module) -> None:
    inputs, labels = data("cnn", 6)
    table = score(model, inputs, labels)
    g = gradients(model, inputs, labels, copies=2)
    expected = scores(g, "moso")
    scale = g.square().sum(1).max()
    assert (table.scores - expected).abs().max() <= 1e-10 * scale
    torch.testing.assert_close(
        table.metrics["grad_sqnorm"], g.square().sum(1), rtol=1e-10, atol=1e-12 * float(scale)
    )
    assert table.provenance["norms_explicit"] == []


@pytest.mark.exhaustive
def test_autocast_has_the_stated_error() -> None:
    for name in ("cnn", "vit"):
        inputs, labels = data(name, N)
        expected = scores(gradients(build(name), inputs, labels), "moso")
        model = build(name, torch.float32)
        table = score(model, inputs.float(), labels, autocast=torch.bfloat16)
        error = float((table.scores - expected).abs().max() / expected.abs().max())
        assert 1e-6 < error < 5e-2, name
        assert table.provenance["autocast"] == "torch.bfloat16"


def test_channels_last_gives_the_same() -> None:
    inputs, labels = data("resnet", N)
    expected = score(build("resnet"), inputs, labels).scores
    model = build("resnet").to(memory_format=torch.channels_last)
    found = score(model, inputs.to(memory_format=torch.channels_last), labels).scores
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class NoForwardMode(torch.autograd.Function):
    """x^2, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class OnlyOnce(NoForwardMode):
    """Neither that nor a second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(108, 6), nn.Linear(6, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function.apply(self.first(x.flatten(1))))


@pytest.mark.parametrize(
    ("function", "way"), [(NoForwardMode, "double backward"), (OnlyOnce, "one by one")]
)
def test_operation_without_forward_mode(function: type, way: str) -> None:
    torch.manual_seed(0)
    model = Custom(function).double()
    inputs, labels = data("cnn", N)
    expected = scores(gradients(model, inputs, labels), "moso")
    table = score(model, inputs, labels)
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    facts = table.provenance
    assert facts["alignment"].startswith(way)
    assert "no forward mode: " in facts["alignment"]
    assert facts["norms_explicit"] == []


def test_peak_memory_does_not_hold_a_gradient_for_each_sample() -> None:
    """What is allocated at most, in bytes, must stay below batch x parameters."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.size = max(self.size, result.untyped_storage().nbytes())
            return result

    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 700), nn.ReLU(), nn.Linear(700, 700))
    inputs, labels = data("cnn", 64, torch.float32)
    with Largest() as largest:
        MoSoScorer(model, gradient="full", batch_size=64, progress=False).score(
            TensorDataset(inputs, labels)
        )
    assert largest.size <= 8 * 700 * 700 < 64 * 4 * 700 * 700


def test_vit_scope_costs_and_counts_only_what_is_in_it() -> None:
    model = build("vit")
    assert isinstance(model, Vit)
    inputs, labels = data("vit", N)
    chosen = ["norm2.weight", *(n for n, _ in model.named_parameters() if n.startswith("mlp"))]
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    expected = scores(gradients(model, inputs, labels), "moso")
    model.requires_grad_(True)
    for scope in (["mlp", "norm2.*"], lambda name, _: name in chosen):
        table = score(model, inputs, labels, scope=scope)
        torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.patch.requires_grad_(False)
    table = score(model, inputs, labels, scope="mlp")
    assert table.provenance["parameters"].startswith("4 (")
    assert not model.patch.weight.requires_grad
