"""The CUDA kernels in the emulator: losses, heads, labels, weights, sequences."""

from __future__ import annotations

import math

import cuda_emulator
import pytest
import torch
from core_support import (
    Case,
    assert_close,
    assert_stats_match,
    confident_case,
    generator,
    random_case,
    rank_correlation,
)
from cuda_cases import DTYPES, check, exact_scores, run, score

from moso_fast.core.reference import closed_form_stats, explicit_stats

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]


@pytest.mark.parametrize("kind", ["ids", "ids_smoothed"])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_heads(gpu, kind, heads, bias) -> None:
    case = random_case(kind, n=70, c=7, d=40, heads=heads, bias=bias)
    weight = torch.rand(70, generator=generator(3)) + 0.5
    for options in ({}, {"chunk_size": 32}, {"sample_weight": weight}):
        stats = run(case, **options)
        exact = closed_form_stats(
            *case.args,
            **{**case.options, **{k: v for k, v in options.items() if k != "chunk_size"}},
        )
        assert_stats_match(stats, exact, 1e-5, floor=1e-6)


def test_stacked_heads_equal_single_ones_bitwise(gpu) -> None:
    case = random_case("ids", n=70, c=6, d=40, heads=2)
    together = run(case)
    for head in range(2):
        alone = score(case.features, case.weight[head], case.labels, case.bias[head])
        for name in ("loss", "el2n", "margin", "entropy", "grad_sqnorm"):
            assert_close(getattr(together, name)[head], getattr(alone, name), 1e-6, what=name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_label_dtypes(gpu, dtype) -> None:
    case = random_case("ids", n=40)
    check(Case(case.features, case.weight, case.labels.to(dtype), case.bias, case.options), 1e-5)


def test_confident_model(gpu) -> None:
    case = confident_case(n=400)
    exact = closed_form_stats(*case.args)
    stats = score(*case.args)
    assert_stats_match(stats, exact, 1e-5)
    for value, truth in (
        (stats.loss, exact.loss[0]),
        (stats.grad_sqnorm, exact.grad_sqnorm[0]),
        (stats.scores(), exact_scores(exact)[0]),
    ):
        assert rank_correlation(value, truth) > 0.9999
    assert float(exact.loss.min()) < 1e-8


def test_own_gradient_is_taken_from_the_score_exactly(gpu) -> None:
    """Rows orthogonal to each other: N a - q is 0, and 2^-9 q if rounding residuals stays in a."""
    features = (torch.rand(16, generator=generator(4)) + 0.5).diag().bfloat16()
    weight = torch.randn(9, 16, generator=generator(5)).bfloat16().float()
    stats = score(features, weight, torch.arange(16) % 9)
    assert gpu.launches[0][1]["exact"] is False
    left = 16 * stats.alignment.double() - stats.grad_sqnorm.double()
    assert float((left / stats.grad_sqnorm).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(gpu, dtype) -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[1e4, 0.0], [0.0, 200.0], [0.0, 200.0]])
    labels = torch.tensor([0, 0, 1, 0, 2])
    check(Case(features.to(dtype), weight, labels, None), 1e-5, precision="highest")
    gap = score(features.to(dtype), weight, labels, precision="highest").loss
    assert float(gap[3]) == pytest.approx(1e4 + math.log(2.0), rel=1e-6)


def test_sequences(gpu) -> None:
    offsets = torch.tensor([0, 7, 7, 30, 90])
    case = random_case("ids", n=90, c=5, d=24, cu_seqlens=offsets)
    exact = explicit_stats(*case.args, **case.options)
    for options in ({}, {"chunk_size": 40}):
        assert_stats_match(run(case, **options), exact, 1e-5)
