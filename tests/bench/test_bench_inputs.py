"""The problems that are timed: names that say what they are, seeded inputs, exact answers."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bench_cases import HEAD, HEADS, NARROW_HEAD, NETWORK, PERCEPTRON, SEQUENCES, made_anew
from torch import nn

from moso_fast.bench import inputs as inputs_module
from moso_fast.bench.cases import CASES, select_cases
from moso_fast.bench.inputs import Inputs, errors_of, exact, make_inputs
from moso_fast.bench.networks import NETWORKS, make_network
from moso_fast.core.reference import explicit_stats


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_what_its_name_and_title_say(name) -> None:
    case = made_anew("moso_fast.bench.cases").CASES[name]
    assert case.name == name and 0 < case.small <= case.full
    named = re.search(r"c(\d+)-d(\d+)", name)
    if named:
        assert (case.classes, case.dim) == tuple(map(int, named.groups()))
    kind = name.split("-")[0].rstrip("0123456789")
    assert case.kind == {"network": "network", "sequences": "sequences", "heads": "heads"}.get(
        "sequences" if "sequences" in name else kind, "head"
    )
    assert case.heavy == name.startswith("grads-")
    assert (case.dtype == torch.bfloat16) == name.endswith("-bf16") == ("bfloat16" in case.title)
    assert case.dtype in (torch.bfloat16, torch.float32)
    assert case.heads == (12 if kind == "heads" else 1)
    assert bool(case.tokens) == (case.kind == "sequences")
    assert case.network == ("" if case.kind != "network" else name.removeprefix("network-"))
    if kind == "grads" and case.kind == "head":
        assert case.title == f"{case.classes} classes, few enough rows for per-sample gradients"
    elif case.dtype == torch.bfloat16:
        assert case.title == f"{case.classes} classes, bfloat16 features"
    else:
        assert len(case.title) > 8


def test_rows_and_work_of_a_case() -> None:
    case = replace(HEADS, small=3, full=8)
    assert (case.rows("small"), case.rows("full")) == (3, 8)
    with pytest.raises(ValueError, match=r"^profile must be one of small, full; got 'huge'$"):
        case.rows("huge")
    # Two products in the first pass, one in the second; two operations an entry.
    assert case.flops_a_row == 3 * 2 * 3 * 5 * 7
    assert HEAD.flops_a_row == 3 * 2 * 5 * 7
    assert HEAD.bytes_a_row == 7 * 4 and NARROW_HEAD.bytes_a_row == 7 * 2
    assert NETWORK.flops_a_row == NETWORK.bytes_a_row == 0


def test_cases_are_chosen_by_pattern() -> None:
    assert [c.name for c in select_cases()] == [c.name for c in select_cases([])] == list(CASES)
    chosen = [c.name for c in select_cases(["network-*", "few-rows", "c10-d512"])]
    assert chosen == ["c10-d512", "few-rows", "network-mlp", "network-cnn"]
    with pytest.raises(ValueError) as refused:
        select_cases(["c10-*", "C2-*"])  # upper case is not lower case
    assert str(refused.value) == f"no case matches 'C2-*'; known: {', '.join(CASES)}"


def test_inputs_are_decided_by_the_case() -> None:
    first, again = make_inputs(HEAD, 20), make_inputs(HEAD, 20)
    assert all(torch.equal(a, b) for a, b in zip(first.head, again.head, strict=True))
    # Classes and width each give other numbers, also where their sum is the same.
    drawn = {float(make_inputs(replace(HEAD, classes=c, dim=d), 4).bias[0])
             for c, d in ((5, 7), (6, 7), (5, 8), (6, 6), (7, 5))}  # fmt: skip
    assert len(drawn) == 5
    wide = make_inputs(HEAD, 20, "meta")
    assert {t.device.type for t in wide.head} == {"meta"}


@pytest.mark.parametrize("case", [HEAD, HEADS], ids=lambda case: case.name)
def test_a_head_has_learnt_something(case) -> None:
    """Features are noise of unit size and four times the direction of their class."""
    case = replace(case, classes=20, dim=400)
    inputs = make_inputs(case, 3000)
    shape = (20, 400) if case.heads == 1 else (3, 20, 400)
    assert inputs.weight.shape == shape and inputs.bias.shape == shape[:-1]
    assert float(inputs.weight.std()) == pytest.approx(1 / 20, rel=0.05)
    assert float(inputs.bias.std()) == pytest.approx(1, rel=0.5)
    assert inputs.features.shape == (3000, 400) and inputs.labels.shape == (3000,)
    assert inputs.labels.unique().tolist() == list(range(20))
    first = inputs.weight if case.heads == 1 else inputs.weight[0]
    directions = first / first.norm(dim=1).mean()
    along = (inputs.features * directions[inputs.labels]).sum(1)
    assert float(along.mean()) == pytest.approx(4, rel=0.05)
    noise = inputs.features - 4 * directions[inputs.labels]
    assert float(noise.std()) == pytest.approx(1, rel=0.02) and abs(float(noise.mean())) < 0.01


def test_dtypes_and_sequences_of_inputs() -> None:
    narrow = make_inputs(NARROW_HEAD, 8)
    assert narrow.features.dtype == torch.bfloat16 and narrow.weight.dtype == torch.float32
    assert make_inputs(HEAD, 8).cu_seqlens is None
    for rows, ends in ((8, [0, 4, 8]), (10, [0, 4, 8, 10])):
        inputs = make_inputs(SEQUENCES, rows)
        assert inputs.cu_seqlens.tolist() == ends and inputs.cu_seqlens.dtype == torch.int32
        assert inputs.samples() == [slice(a, b) for a, b in pairwise(ends)]
    assert make_inputs(HEAD, 3).samples() == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert make_inputs(SEQUENCES, 8, "meta").cu_seqlens.device.type == "meta"
    empty = Inputs(torch.zeros(1, 2), torch.zeros(1))
    assert empty.weight.numel() == empty.bias.numel() == 0 and empty.weight.dtype == torch.float32


@pytest.mark.parametrize("elements", [7 * 5, 7 * 5 + 6, 7, 1])
def test_an_exact_answer_in_blocks(elements, monkeypatch) -> None:
    monkeypatch.setattr(inputs_module, "_BLOCK", elements)
    sizes = []
    honest = inputs_module._residual
    monkeypatch.setattr(
        inputs_module,
        "_residual",
        lambda given, rows: sizes.append(rows.stop - rows.start) or honest(given, rows),
    )
    inputs = make_inputs(HEAD, 23)
    expected = explicit_stats(*inputs.head)
    for name, values in exact(HEAD, inputs).items():
        if name != "alignment_without_bias":
            torch.testing.assert_close(values, getattr(expected, name)[0], rtol=1e-11, atol=1e-13)
    assert set(sizes) == {max(1, elements // 7)}  # the wider of classes and features decides
    many = replace(HEAD, classes=14)
    sizes.clear()
    exact(many, make_inputs(many, 23))
    assert set(sizes) == {max(1, elements // 14)}


def test_the_exact_alignment_of_sequences_without_the_bias() -> None:
    inputs = make_inputs(SEQUENCES, 22)
    inputs.bias.zero_()
    without = explicit_stats(*inputs.head[:3], cu_seqlens=inputs.cu_seqlens)
    found = exact(SEQUENCES, inputs)["alignment_without_bias"]
    torch.testing.assert_close(found, without.alignment[0], rtol=1e-11, atol=1e-13)


def test_errors_are_relative_and_of_every_quantity() -> None:
    truth = {"loss": torch.tensor([3.0, 4.0]).double(), "alignment": torch.ones(2, 2).double()}
    found = {"loss": torch.tensor([3.0, 4.5], requires_grad=True), "alignment": torch.ones(4)}
    assert errors_of(found, truth) == {"loss": 0.1, "alignment": 0.0}
    assert errors_of({"alignment": torch.full((4,), 3.0)}, truth) == {"alignment": 2.0}
    assert math.isnan(errors_of({"loss": torch.tensor([math.nan, 4])}, truth)["loss"])


def test_the_networks_have_the_published_shapes() -> None:
    sides = []
    model = NETWORKS["cnn"](3)
    for layer in model:
        layer.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert sides == [
        *[(16, 28, 28)] * 3, (16, 14, 14), *[(32, 14, 14)] * 3, (32, 7, 7), (1568,), (3,),
    ]  # fmt: skip
    assert [m.kernel_size for m in model if isinstance(m, nn.Conv2d)] == [(3, 3)] * 2
    assert [m.padding for m in model if isinstance(m, nn.Conv2d)] == [(1, 1)] * 2
    shapes = [tuple(p.shape) for p in NETWORKS["mlp"](10).parameters()]
    assert shapes == [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)]
    for name in NETWORKS:  # smooth: no unit that switches sides
        assert sum(isinstance(m, nn.GELU) for m in NETWORKS[name](3)) == 2
        assert not any(isinstance(m, (nn.ReLU, nn.MaxPool2d)) for m in NETWORKS[name](3))


@pytest.mark.parametrize("case", [NETWORK, PERCEPTRON], ids=lambda case: case.name)
def test_a_network_is_seeded_and_leaves_the_global_generator_alone(case) -> None:
    def made(rows, seed):
        generator = torch.Generator().manual_seed(seed)
        return make_network(case.network, 3, rows, generator)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, images, labels = made(200, 1)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert images.shape == (200, 1, 28, 28) and float(images.std()) == pytest.approx(1, rel=0.05)
    assert labels.shape == (200,) and labels.unique().tolist() == [0, 1, 2]
    again, other = made(200, 1), made(200, 2)
    weights = [next(m.parameters()) for m in (model, again[0], other[0])]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(images, again[1]) and torch.equal(labels, again[2])
    inputs = make_inputs(case, 6)
    assert not inputs.model.training and inputs.weight.numel() == 0
    assert next(make_inputs(case, 2, "meta").model.parameters()).device.type == "meta"
    meta = make_inputs(case, 2, "meta")
    assert meta.features.device.type == meta.labels.device.type == "meta"
