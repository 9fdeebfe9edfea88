"""moso_scores and last_layer_stats: every input they accept, every way they are called."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from core_support import (
    BACKENDS_AND_DTYPES,
    CPU_BACKENDS,
    FIELDS,
    KINDS,
    Case,
    assert_close,
    assert_stats_match,
    generator,
    random_case,
    score_with,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import moso_fast
from moso_fast import functional
from moso_fast.backends import Availability, choose, get
from moso_fast.core import operator
from moso_fast.core.formulas import FORMULAS
from moso_fast.core.problem import build_problem
from moso_fast.core.reference import closed_form_stats, explicit_stats
from moso_fast.functional import LastLayerStats, explain, last_layer_stats, moso_scores

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_equals_explicit_per_sample_gradients(backend, dtype, kind, heads, bias):
    case = random_case(kind, n=30, heads=heads, bias=bias, dtype=dtype)
    stats = score_with(backend, case)
    reference = explicit_stats(*case.args, **case.options)
    assert_stats_match(stats, reference, TOLERANCE[dtype])
    for formula in FORMULAS:
        n, g2 = 30, reference.mean_grad_sqnorm[:, None]
        a, q = reference.alignment, reference.grad_sqnorm
        expected = {
            "moso": (n * a - q) / (n - 1),
            "one_step": ((n + 1) * a - n * g2 - q) / (n - 1) ** 2,
            "official": a - q / n,
            "official_exact": ((2 * n - 3) * g2 - q + (2 * n - 4) * (a - q / n)) / (n - 1) ** 2,
            "alignment": a,
            "cosine": a / (q * g2).sqrt(),
        }[formula]
        scores = moso_scores(*case.args, formula=formula, backend=backend, **case.options)
        assert scores.dtype == dtype and scores.shape == stats.alignment.shape
        assert_close(scores.reshape(expected.shape), expected, TOLERANCE[dtype], what=formula)


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 100, 129])
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 64, 100, 513])
@each_backend
def test_shapes_off_every_tile(backend, classes, dim):
    case = random_case("ids", n=37, c=classes, d=dim)
    stats = score_with(backend, case)
    reference = closed_form_stats(*case.args)
    assert_stats_match(stats, reference, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("heads", [None, 2])
@each_backend
def test_row_counts_off_every_tile(backend, heads, rows):
    case = random_case("ids", n=rows, c=10, d=20, heads=heads)
    stats = score_with(backend, case)
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)
    if rows == 1:
        assert_close(stats.alignment, stats.grad_sqnorm, 1e-6)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formula", FORMULAS)
@each_backend
def test_empty_input_gives_empty_output(backend, formula, kind, heads):
    case = random_case(kind, n=0, heads=heads)
    scores = moso_scores(*case.args, formula=formula, backend=backend, **case.options)
    assert scores.shape == ((0,) if heads is None else (2, 0)) and scores.dtype == torch.float32
    stats = last_layer_stats(*case.args, backend=backend, **case.options)
    assert stats.count == 0
    norm = stats.mean_grad_sqnorm
    assert norm == 0.0 if heads is None else norm.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sequences", [False, True])
@each_backend
def test_heads_together_equal_heads_one_by_one(backend, sequences):
    options = {"cu_seqlens": torch.tensor([0, 9, 10, 40])} if sequences else {}
    case = random_case("ids", n=40, heads=4, **options)
    together = score_with(backend, case)
    assert together.mean_grad_sqnorm.shape == (4,)
    for head in range(4):
        single = Case(case.features, case.weight[head], case.labels, case.bias[head], case.options)
        alone = score_with(backend, single)
        assert isinstance(alone.mean_grad_sqnorm, float)
        for name in FIELDS:
            assert_close(getattr(together, name)[head], getattr(alone, name), 2e-6, 1e-8, name)
        assert float(together.mean_grad_sqnorm[head]) == pytest.approx(
            alone.mean_grad_sqnorm, rel=1e-5
        )


def test_one_head_with_a_leading_axis_keeps_it():
    case = random_case("ids", heads=1)
    stats = last_layer_stats(*case.args)
    assert stats.alignment.shape == (1, 17) and stats.scores().shape == (1, 17)


def views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the same numbers with every kind of strides."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
    wide[..., 3::2] = tensor
    offset = torch.empty(tensor.numel() + 5)[5:].view(tensor.shape).copy_(tensor)
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    padded[..., 1 : 1 + tensor.shape[-1]] = tensor
    last = tensor.dim() - 1
    return {
        "strided": wide[..., 3::2],
        "offset": offset,
        "padded": padded[..., 1 : 1 + tensor.shape[-1]],
        "transposed": tensor.transpose(0, last).contiguous().transpose(0, last),
        "reversed twice": tensor.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("name", ["strided", "offset", "padded", "transposed", "reversed twice"])
@each_backend
def test_views_give_what_contiguous_tensors_give(backend, name, heads):
    case = random_case("soft", n=40, c=12, d=20, heads=heads)
    weight = torch.rand(40, generator=generator(4))
    plain = last_layer_stats(*case.args, sample_weight=weight, backend=backend)
    viewed = (views(t)[name] for t in case.args)
    stats = last_layer_stats(*viewed, sample_weight=views(weight)[name], backend=backend)
    for field in FIELDS:
        assert_close(getattr(stats, field), getattr(plain, field), 2e-6, 1e-9, field)


@each_backend
def test_strided_and_broadcast_integer_labels(backend):
    case = random_case("ids", n=40)
    expected = moso_scores(*case.args, backend=backend)
    wide = torch.full((40, 3), 999)
    wide[:, 1] = case.labels
    got = moso_scores(case.features, case.weight, wide[:, 1], case.bias, backend=backend)
    assert_close(got, expected, 2e-6)
    same = torch.tensor(2).expand(40)
    got = moso_scores(case.features, case.weight, same, case.bias, backend=backend)
    expected = moso_scores(case.features, case.weight, same.clone(), case.bias, backend=backend)
    assert torch.equal(got, expected)


@each_backend
def test_expanded_features_are_rows_all_alike(backend):
    """Stride 0: a million rows without a million rows of memory."""
    row = torch.randn(1, 6, generator=generator(1))
    weight = torch.randn(3, 6, generator=generator(2))
    labels = torch.zeros(100_000, dtype=torch.long)
    stats = last_layer_stats(row.expand(100_000, 6), weight, labels, backend=backend)
    one = explicit_stats(row, weight, labels[:1])
    assert stats.count == 100_000
    for value in (stats.alignment, stats.grad_sqnorm):
        assert_close(value, one.grad_sqnorm[0].expand(100_000), 1e-5)


@pytest.mark.parametrize("precision", [None, "highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@each_backend
def test_features_of_16_bits(backend, dtype, precision):
    """The reference takes the rounded features: only the arithmetic may differ."""
    case = random_case("ids", n=200, c=10, d=32, dtype=dtype)
    stats = score_with(backend, case, precision=precision)
    assert stats.alignment.dtype == torch.float32
    effective = precision or ("highest" if dtype == torch.float32 else "medium")
    tolerance = {"highest": 1e-5, "high": 5e-3, "medium": 1e-2}[effective]
    reference = closed_form_stats(*case.args)
    assert_stats_match(stats, reference, tolerance)
    expected = (200 * reference.alignment[0] - reference.grad_sqnorm[0]) / 199
    assert_close(stats.scores(), expected, tolerance)


@pytest.mark.parametrize(
    "features, weight", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64),
                         (torch.float64, torch.float32), (torch.float16, torch.float32)]
)  # fmt: skip
@each_backend
def test_heads_of_another_dtype_are_converted(backend, features, weight):
    case = random_case("ids", n=40)
    case = Case(case.features.to(features), case.weight.to(weight), case.labels,
                case.bias.to(weight), case.options)  # fmt: skip
    stats = score_with(backend, case, precision="highest")
    expected = torch.float64 if features == torch.float64 else torch.float32
    assert stats.alignment.dtype == expected
    assert_stats_match(stats, closed_form_stats(*case.args), TOLERANCE[expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
@each_backend
def test_sample_weights_of_any_dtype(backend, dtype):
    weight = torch.arange(17).remainder(4).to(dtype)
    case = random_case("ids", sample_weight=weight)
    stats = score_with(backend, case)
    assert stats.count == 17  # a weight of 0 still counts
    assert_stats_match(stats, explicit_stats(*case.args, **case.options), 1e-5)
    assert (stats.grad_sqnorm[weight == 0] == 0).all()


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


def test_environment_variable_chooses_the_backend(monkeypatch):
    case = random_case("ids")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "torch")
    assert last_layer_stats(*case.args).backend == "torch"
    assert "torch: asked for by MOSO_FAST_BACKEND=torch" in explain(*case.args)
    monkeypatch.setenv("MOSO_FAST_BACKEND", "")
    default = last_layer_stats(*case.args).backend
    monkeypatch.setenv("MOSO_FAST_BACKEND", "nonsense")
    message = r"^backend must be one of auto, .*torch.*; got 'nonsense'$"
    with pytest.raises(ValueError, match=message):
        moso_scores(*case.args)
    assert last_layer_stats(*case.args, backend="torch").backend == "torch"  # argument first
    monkeypatch.delenv("MOSO_FAST_BACKEND")
    assert (
        last_layer_stats(*case.args).backend == default == choose(build_problem(*case.args))[0].name
    )


@pytest.mark.parametrize("bad", ["nonsense", "Torch", "", None])
@pytest.mark.parametrize("call", [moso_scores, last_layer_stats, explain])
def test_unknown_backend(call, bad):
    case = random_case("ids")
    with pytest.raises(ValueError, match=r"^backend must be one of auto, .*torch.*; got "):
        call(*case.args, backend=bad)


def test_a_backend_asked_for_by_name_is_never_replaced(monkeypatch):
    case = random_case("ids")
    backend = get("torch")
    monkeypatch.setattr(type(backend), "supports", lambda self, problem: "it is Sunday")
    with pytest.raises(ValueError, match=r"^backend='torch' cannot run this problem: it is Sunday"):
        moso_scores(*case.args, backend="torch")
    monkeypatch.setenv("MOSO_FAST_BACKEND", "torch")
    with pytest.raises(ValueError, match=r"^MOSO_FAST_BACKEND=torch cannot run this problem"):
        moso_scores(*case.args)
    monkeypatch.setattr(
        type(backend), "availability", lambda self: Availability(False, "it is gone", "look")
    )
    with pytest.raises(ValueError, match="it is gone"):
        moso_scores(*case.args, backend="torch")


def test_backends_say_why():
    table = moso_fast.backends()
    assert table["torch"].available and "PyTorch" in table["torch"].reason
    for availability in table.values():
        assert availability.reason
        assert bool(availability.how) != availability.available


def test_explain_tells_the_plan_without_running(monkeypatch):
    case = random_case("ids", n=1000, heads=2)
    monkeypatch.setattr("moso_fast.core.engine.run", None)  # calling it would fail
    text = explain(*case.args, formula="one_step", scale=0.1, backend="torch", chunk_size=300)
    assert "N=1000" in text and "D=7" in text and "C=5" in text and "K=2" in text
    assert "backend   torch" in text and "asked for by backend='torch'" in text
    assert "4 chunk(s) of up to 300 rows" in text and "computed again" in text
    assert "kept between the passes" in explain(*case.args)
    with pytest.raises(ValueError, match="formula must be one of"):
        explain(*case.args, formula="x")


def test_stats_are_one_frozen_object():
    case = random_case("ids")
    stats = last_layer_stats(*case.args)
    assert isinstance(stats, LastLayerStats) and isinstance(stats.count, int)
    with pytest.raises(AttributeError):
        stats.loss = None
    with pytest.raises(ValueError, match="formula must be one of"):
        stats.scores("x")
    with pytest.raises(ValueError, match="scale must be finite"):
        stats.scores(scale=math.inf)
    for formula in FORMULAS:
        expected = moso_scores(*case.args, formula=formula, scale=0.3)
        assert torch.equal(stats.scores(formula, 0.3), expected)


def test_equals_the_formula_in_the_docstring():
    case = random_case("ids", bias=False, dtype=torch.float64)
    h, w, y, n = case.features, case.weight, case.labels, 17
    r = (h @ w.T).softmax(1) - F.one_hot(y, 5)
    mean = r.T @ h / n
    a = ((r @ mean) * h).sum(1)
    q = (r**2).sum(1) * (h**2).sum(1)
    expected = 0.1 * (n * a - q) / (n - 1)
    torch.testing.assert_close(moso_scores(h, w, y, scale=0.1), expected, rtol=1e-12, atol=1e-15)


def test_public_names():
    for name in ("moso_scores", "last_layer_stats", "LastLayerStats", "explain", "backends"):
        assert getattr(moso_fast, name) is not None and name in moso_fast.__all__
