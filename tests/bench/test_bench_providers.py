"""Every provider beside float64 at a tiny shape, what each refuses, and who takes part where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bench_cases import HEAD, HEADS, NARROW_HEAD, NETWORK, PERCEPTRON, SEQUENCES, made_anew

from moso_fast.bench.cases import CASES
from moso_fast.bench.inputs import exact, make_inputs
from moso_fast.bench.providers import PROVIDERS, Provider, autograd, ours, plain, providers_for
from moso_fast.bench.providers.base import TOLERANCES
from moso_fast.bench.providers.ours import NAMES
from moso_fast.core.reference import explicit_stats

ROWS = {"sequences": 24, "network": 6}
# All sequences of one length, and a last one that is shorter.
PROBLEMS = [
    (case, ROWS.get(case.kind, 23))
    for case in (
        replace(HEAD, heavy=True),
        HEADS,
        NARROW_HEAD,
        replace(SEQUENCES, heavy=True),
        NETWORK,
        PERCEPTRON,
    )
] + [(replace(SEQUENCES, name="unequal", heavy=True), 22)]


def runs(case, rows, provider):
    """Whether a job can be made; what compiles has a test of its own."""
    ragged = case.tokens and rows % case.tokens
    refused = ragged and provider.refuse(case, make_inputs(case, rows))
    return provider.takes(case) and not provider.compiles and not refused


needs_fused = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"),
    reason="this torch has no chunked F.linear_cross_entropy",
)
JOBS = [
    pytest.param(
        (case, rows, provider),
        id=f"{case.name}: {provider.name}",
        marks=[
            # Whole networks take seconds each.
            *([pytest.mark.exhaustive] if case.kind == "network" else []),
            *([needs_fused] if provider.name == "F.linear_cross_entropy" else []),
        ],
    )
    for case, rows in PROBLEMS
    for provider in PROVIDERS
    if runs(case, rows, provider)
]


def anew(provider: Provider) -> Provider:
    """Return the provider as its module makes it when it is imported."""
    made = made_anew(provider.prepare.__module__).PROVIDERS
    (found,) = (p for p in made if (p.name, p.kinds) == (provider.name, provider.kinds))
    assert replace(found, prepare=provider.prepare, refuse=provider.refuse) == provider
    return found


def network_truth(inputs):
    """Results from the gradient of every sample's entry in one vector of losses."""
    model = inputs.model.double()
    losses = F.cross_entropy(model(inputs.features.double()), inputs.labels, reduction="none")
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
            ]
        )
        for one in losses
    ]
    grads = torch.stack(rows)
    model.float()
    return {
        "loss": losses.detach(),
        "alignment": grads @ grads.mean(0),
        "grad_sqnorm": grads.square().sum(1),
    }


def truth_of(case, inputs):
    """Loss, alignment and squared norm by explicit gradients in float64."""
    if case.kind == "network":
        return network_truth(inputs)
    stats = explicit_stats(*inputs.head, cu_seqlens=inputs.cu_seqlens)
    shape = (case.heads, -1) if case.heads > 1 else (-1,)
    return {name: getattr(stats, name).reshape(shape) for name in NAMES}


def error(values, expected):
    return float((values.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("job", JOBS)
def test_a_job_gives_what_explicit_gradients_give(job) -> None:
    """Again when it runs again: it is timed many times over the same tensors."""
    case, rows, provider = job
    inputs = make_inputs(case, rows)
    truth = truth_of(case, inputs)
    run = anew(provider).prepare(case, inputs)
    run()
    result = run()
    assert set(result) == set(NAMES[:2] if provider.note == "no norms" else NAMES)
    narrow = provider.name == plain.NARROW
    limit = (
        5e-2
        if narrow
        else 1e-2
        if case.dtype == torch.bfloat16 and provider.family == "ours"
        else 1e-5
    )
    for name, values in result.items():
        assert values.shape == truth[name].shape, name
        assert values.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert not values.requires_grad
        assert error(values, truth[name]) < limit, name


@pytest.mark.parametrize("case", [NETWORK, PERCEPTRON])
def test_the_exact_answer_of_a_network(case) -> None:
    inputs = make_inputs(case, 6)
    found = exact(case, inputs)
    assert {values.dtype for values in found.values()} == {torch.float64}
    assert next(inputs.model.parameters()).dtype == torch.float32
    for name, expected in network_truth(inputs).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)


CHUNKED = {
    "plain": lambda: plain.chunked(5),
    "onednn": lambda: plain.chunked(5, plain.first_chunk_onednn, plain.second_chunk_onednn),
    "fused": lambda: partial(plain.fused_mean_gradient, rows=5),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_fused] if n == "fused" else []) for n in CHUNKED]
)
def test_several_chunks_and_a_shorter_last_one(name) -> None:
    inputs = make_inputs(HEAD, 23)
    for values, expected in zip(
        CHUNKED[name]()(*inputs.head), truth_of(HEAD, inputs).values(), strict=True
    ):
        assert error(values, expected) < 1e-5


def test_the_compiled_chunks_are_compiled_in_the_set_up(monkeypatch) -> None:
    asked, sizes, resets = [], [], []

    def compile_(function, **options):
        asked.append((function, options))

        def run(h, *rest):
            sizes.append(len(h))
            return function(h, *rest)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(asked)))
    monkeypatch.setattr(plain, "COMPILED_ROWS", 10)
    (provider,) = (p for p in PROVIDERS if p.compiles)
    inputs = make_inputs(HEAD, 23)
    run = provider.prepare(HEAD, inputs)
    once = [10, 10, 3] * 2  # both passes
    assert resets == [0] and sizes == once
    assert asked == [(f, {"dynamic": False}) for f in (plain.first_chunk, plain.second_chunk)]
    for name, values in run().items():
        assert error(values, truth_of(HEAD, inputs)[name]) < 1e-5
    assert sizes == 2 * once and resets == [0]


@needs_fused
def test_the_fused_loss_is_taken_in_chunks_where_its_documentation_says(monkeypatch) -> None:
    """Where N >= D and C > D."""
    taken = []
    honest = F.linear_cross_entropy

    def watched(*given, options, **named):
        taken.append(None if options is None else options.batch_chunk_size)
        return honest(*given, options=options, **named)

    monkeypatch.setattr(F, "linear_cross_entropy", watched)
    for rows, dim, classes in ((7, 7, 8), (9, 7, 8), (6, 7, 8), (9, 7, 7), (9, 8, 7)):
        inputs = make_inputs(replace(HEAD, dim=dim, classes=classes), rows)
        plain.fused_mean_gradient(*inputs.head)
    assert taken == [512, 512, None, None, None]


@pytest.mark.parametrize(
    ("fit", "calls"), [(23, [23]), (24, [23]), (9, [9, 9, 5] * 2), (0, [1] * 46)]
)
def test_gradients_of_all_samples_are_made_once_where_they_fit(monkeypatch, fit, calls) -> None:
    """A gigabyte of them at a time, at least one; else twice, in parts."""
    inputs = make_inputs(HEAD, 23)
    monkeypatch.setattr(autograd, "_GRADIENT_BYTES", fit * 4 * (5 * 7 + 5) + 3)
    sizes = []
    honest = torch.func.vmap

    def vmap(function, in_dims):
        each = honest(function, in_dims=in_dims)

        def run(point, x, y):
            sizes.append(len(x))
            return each(point, x, y)

        return run

    monkeypatch.setattr(torch.func, "vmap", vmap)
    (provider,) = (p for p in PROVIDERS if "vmap" in p.name and "head" in p.kinds)
    for name, values in provider.prepare(HEAD, inputs)().items():
        assert error(values, truth_of(HEAD, inputs)[name]) < 1e-5
    assert sizes == calls


def refusals(case, rows, device="cpu"):
    inputs = make_inputs(case, rows, device)
    return {
        p.name: why
        for p in map(anew, PROVIDERS)
        if case.kind in p.kinds and (why := p.refuse(case, inputs))
    }


def test_what_cannot_take_a_problem_says_why(monkeypatch) -> None:
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", object, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def one_chunk(rows, *sizes):
        return {f"chunks of {n}": f"{rows} rows are one chunk: the same as naive" for n in sizes}

    assert refusals(HEAD, 512) == one_chunk(512, 512, 2048, 8192, 32768)
    assert refusals(HEAD, 2049) == one_chunk(2049, 8192, 32768)
    unequal = "sequences differ in length"
    assert refusals(SEQUENCES, 24) == {}
    assert refusals(SEQUENCES, 22) == dict.fromkeys(
        ("torch.func.vmap(grad)", "batch of sequences", "naive over tokens", "torch.func.jvp"),
        unequal,
    )
    assert refusals(NETWORK, 2) == {}

    without = {"oneDNN, chunks of 2048": "oneDNN is PyTorch's library for CPUs"}
    assert refusals(HEAD, 40000, "meta") == without
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert refusals(HEAD, 40000) == without
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    why = f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    assert refusals(HEAD, 40000) == {**without, "F.linear_cross_entropy": why}


def test_absent_modules_are_named() -> None:
    def needing(*modules):
        return Provider("", "peer", frozenset(), lambda *_: dict, needs=modules).missing()

    assert needing() is None and needing("torch", "json") is None
    assert needing("no_such", "torch", "nor_this") == "not installed: no_such, nor_this"


def test_who_takes_part() -> None:
    def taken(**options):
        provider = Provider(
            "", "plain", frozenset({"head", "sequences"}), lambda *_: dict, **options
        )
        cases = (HEAD, HEADS, SEQUENCES, NARROW_HEAD, replace(HEAD, name="heavy", heavy=True))
        cases += (replace(HEAD, name="double", dtype=torch.float64),)
        return [case.name for case in cases if provider.takes(case)]

    assert taken() == ["head", "sequences", "narrow", "heavy", "double"]
    assert taken(heavy=True) == ["heavy"]
    assert taken(narrow=True) == ["narrow"]
    for case in CASES.values():
        found = {p.name: p for p in providers_for(case)}
        heavy = [name for name, p in found.items() if p.family == "autograd"]
        assert bool(heavy) == (case.heavy or case.kind == "network")
        assert (plain.NARROW in found) == (case.dtype == torch.bfloat16)
        own = ["moso_fast"] if case.kind == "network" else ["moso_fast", "moso_fast, torch backend"]
        assert [name for name, p in found.items() if p.family == "ours"] == own


def test_tolerances() -> None:
    """Ours are held a hundred times closer in float32, ten times with 16 bits."""
    for family, (wide, narrow) in {"ours": (1e-5, 1e-2), "peer": (1e-3, 1e-1)}.items():
        provider = Provider("", family, frozenset(), lambda *_: dict)
        assert provider.tolerance(HEAD) == wide and provider.tolerance(NARROW_HEAD) == narrow
    assert TOLERANCES["plain"] == TOLERANCES["autograd"] == TOLERANCES["peer"]


def test_our_providers_ask_for_their_backend(monkeypatch) -> None:
    asked = []

    def stats(*head, cu_seqlens, backend):
        asked.append((backend, cu_seqlens, len(head)))
        return explicit_stats(*head)

    monkeypatch.setattr("moso_fast.bench.providers.ours.last_layer_stats", stats)
    inputs = make_inputs(SEQUENCES, 24)
    assert [b - a for a, b in pairwise(inputs.cu_seqlens.tolist())] == [4] * 6
    for backend in ("auto", "torch"):
        ours._on(backend)(SEQUENCES, inputs)()
    assert asked == [("auto", inputs.cu_seqlens, 4), ("torch", inputs.cu_seqlens, 4)]
