"""Scores as one operator of PyTorch: compiled, exported, transformed, under every mode."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from core_support import (
    BACKENDS_AND_DTYPES,
    CPU_BACKENDS,
    FIELDS,
    assert_close,
    generator,
    random_case,
    score_with,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moso_fast import functional
from moso_fast.core import operator
from moso_fast.functional import last_layer_stats, moso_scores

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@each_backend
def test_requires_grad_autocast_and_inference_mode(backend):
    case = random_case("ids", n=40)
    expected = moso_scores(*case.args, backend=backend)
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()
    features = (case.features.clone().requires_grad_() * 1.0).view(40, 7)
    got = moso_scores(features, weight, case.labels, bias, backend=backend)
    assert not got.requires_grad and got.grad_fn is None and torch.equal(got, expected)
    parameter = torch.nn.Linear(7, 5)
    got = moso_scores(case.features, parameter.weight, case.labels, parameter.bias, backend=backend)
    assert not got.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moso_scores(*case.args, backend=backend), expected)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert torch.equal(moso_scores(*case.args, backend=backend), expected)
        inner = [t.clone() for t in case.args]  # inference tensors
    with torch.no_grad():
        assert torch.equal(moso_scores(*inner, backend=backend), expected)
    assert torch.is_grad_enabled()


@each_backend
def test_global_settings_neither_matter_nor_change(backend):
    case = random_case("ids", n=40)
    expected = moso_scores(*case.args, backend=backend)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        got = moso_scores(*case.args, backend=backend)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
    assert torch.equal(got, expected)


@pytest.mark.quick(2)
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("heads", [None, 2])
@each_backend
def test_torch_compile_without_a_graph_break(backend, heads, sequences):
    case = random_case("ids", heads=heads)
    options = {"cu_seqlens": torch.tensor([0, 4, 17])} if sequences else {}

    def model(features, weight, labels, bias):
        hidden = features * 2 - 1
        scores = moso_scores(hidden, weight, labels, bias, backend=backend, scale=0.5, **options)
        stats = last_layer_stats(hidden, weight, labels, bias, backend=backend, **options)
        return scores + 1, stats.loss * 2, stats.margin.sum(-1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*case.args), model(*case.args), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.quick(2)
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_operator_passes_opcheck(backend, dtype, heads, sequences):
    case = random_case("ids", heads=heads, dtype=dtype)
    offsets = torch.tensor([0, 4, 17]) if sequences else None
    weight = torch.rand(17, generator=generator(0)).to(dtype)
    features, head, labels, bias = case.args
    if heads is None:  # the operator gets heads as a checked problem has them
        head, bias = head[None], None if bias is None else bias[None]
    args = (features, head, labels, bias, weight, offsets)
    options = ("cross_entropy", 0.0, -100, "highest", "raise", "sample")
    operator = torch.ops.moso_fast.last_layer_stats.default
    torch.library.opcheck(operator, (*args, *options, backend, 5, None))


@pytest.mark.parametrize("bad", [{"labels": torch.tensor([0, 9])}, {"features": torch.tensor(
    [[float("nan")] * 3, [1.0] * 3])}])  # fmt: skip
def test_errors_come_through_compiled_code(bad):
    good = {"features": torch.ones(2, 3), "labels": torch.tensor([0, 1])}
    arguments = {**good, **bad}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(features, labels):
        return moso_scores(features, torch.ones(4, 3), labels)

    compiled(**good)
    with pytest.raises(ValueError, match=r"^(labels\[1\] is 9|features\[0, 0\] is nan)"):
        compiled(**arguments)


def roads(monkeypatch, call):
    """What a call gives that goes straight to the engine, and one through the operator."""
    found = []
    for watched in (False, True):
        monkeypatch.setattr(operator, "_watched", lambda problem, watched=watched: watched)
        found.append(call())
    return found


@pytest.mark.raw_memory
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("kind", ["ids_smoothed", "soft", "mse"])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_with_and_without_the_operator_the_bits_are_the_same(
    backend, dtype, kind, heads, sequences, monkeypatch
):
    options = {"sample_weight": torch.rand(40, generator=generator(5))}
    if sequences:
        options["cu_seqlens"] = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    case = random_case(kind, n=40, heads=heads, dtype=dtype, **options)
    direct, through = roads(monkeypatch, lambda: score_with(backend, case))
    for name in FIELDS:
        left, right = getattr(direct, name), getattr(through, name)
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert left.stride() == right.stride()
        assert not left.requires_grad
    assert direct.count == through.count and direct.backend == through.backend
    assert direct._mean_grad_sqnorm.equal(through._mean_grad_sqnorm)
    storages = {getattr(direct, name).untyped_storage().data_ptr() for name in FIELDS}
    assert len(storages) == len(FIELDS)  # kept or saved alone, one result is not all of them


@pytest.mark.parametrize("bad", [{"labels": torch.tensor([0, 9])}, {"features": torch.tensor(
    [[float("nan")] * 3, [1.0] * 3])}, {"labels": torch.tensor([0, -100])}, {"chunk_size": 0},
    {"labels": torch.tensor([0.0, 1.0])}, {"backend": "nonsense"}])  # fmt: skip
def test_with_and_without_the_operator_the_errors_are_the_same(bad, monkeypatch):
    good = {
        "features": torch.ones(2, 3),
        "weight": torch.ones(4, 3),
        "labels": torch.tensor([0, 1]),
    }

    def message():
        with pytest.raises((ValueError, TypeError)) as error:
            moso_scores(**{**good, **bad})
        return type(error.value), str(error.value)

    direct, through = roads(monkeypatch, message)
    assert direct == through


@each_backend
def test_a_call_checks_its_input_and_chooses_once(backend, monkeypatch):
    made = []
    for module, name in ((functional, "build_problem"), (operator, "choose")):
        function = getattr(module, name)
        counted = lambda *a, f=function, n=name, **k: (made.append(n), f(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, name, counted)
    case = random_case("ids")
    for call in (moso_scores, last_layer_stats):
        made.clear()
        call(*case.args, backend=backend)
        assert made == ["build_problem", "choose"]


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def seen_by_a_mode(call, args):
    with Seen() as seen:
        call(*args)
    return seen.names


def seen_by_make_fx(call, args, **options):
    return [str(node.target) for node in make_fx(call, **options)(*args).graph.nodes]


def seen_by_jit(call, args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(call, args, check_trace=False)
    return [node.kind() for node in traced.graph.nodes()]


def seen_by_export(call, args):
    module = torch.nn.Module()
    module.forward = call
    program = torch.export.export(module, args, strict=False)
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("look", [
    seen_by_a_mode, seen_by_make_fx, partial(seen_by_make_fx, pre_dispatch=True), seen_by_jit,
    seen_by_export,
])  # fmt: skip
def test_whoever_looks_on_sees_one_operator(look):
    case = random_case("ids")
    names = look(lambda *args: moso_scores(*args, backend="torch"), case.args)
    assert sum("last_layer_stats" in name for name in names) == 1
    assert not any("log1p" in name for name in names)  # as the loss takes it


def test_tensors_without_numbers_give_shapes():
    case = random_case("ids", heads=2)
    got = moso_scores(*(tensor.to("meta") for tensor in case.args), backend="torch")
    assert got.is_meta and got.shape == (2, 17)
    fake = FakeTensorMode()
    got = moso_scores(*map(fake.from_tensor, case.args), backend="torch")
    assert isinstance(got, FakeTensor) and got.shape == (2, 17)


def test_transforms_of_functions():
    case = random_case("ids")
    scores = partial(moso_scores, backend="torch")
    both = torch.stack([case.features, 2 * case.features])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes one after the other
        got = torch.func.vmap(lambda features: scores(features, *case.args[1:]))(both)
    for features, found in zip(both, got, strict=True):
        assert torch.equal(found, scores(features, *case.args[1:]))
    total = lambda features: scores(features, *case.args[1:]).sum() + features.sum()  # noqa: E731
    assert torch.func.grad(total)(case.features).eq(1).all()  # scores are constants


@each_backend
def test_negated_only_on_paper(backend):
    """``z.conj().imag`` shares the memory of ``z``, where every sign is the other one."""
    case = random_case("ids")
    views = [torch.complex(torch.zeros_like(t), -t).conj().imag if t.is_floating_point() else t
             for t in case.args]  # fmt: skip
    assert views[0].is_neg() and torch.equal(views[0], case.features)
    got, expected = (moso_scores(*args, backend=backend) for args in (views, case.args))
    assert_close(got, expected, 2e-6)
