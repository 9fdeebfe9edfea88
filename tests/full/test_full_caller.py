"""Whole-network scores whatever the caller has set: precision, autocast, compilation, batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from full_cases import CLASSES, build, data
from full_scorer_cases import score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.scorer import MoSoScorer

N = 13


@pytest.mark.parametrize("by_operation", [False, True])
def test_precision_of_the_caller_is_not_taken_over(by_operation: bool) -> None:
    """TF32 and bfloat16 products would miss the bounds for float32."""
    cudnn: Any = torch.backends.cudnn
    seen = set()

    def settings() -> tuple[str, ...]:
        matmul = torch.get_float32_matmul_precision()
        return matmul, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(settings())
            return super().forward(x.flatten(1))

    inputs, labels = data("cnn", N, torch.float32)
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    cudnn.allow_tf32 = True
    if by_operation:
        cudnn.rnn.fp32_precision = "ieee"
    try:
        own = settings()
        score(Looks(108, CLASSES), inputs, labels)
        assert settings() == own
        assert seen == {("highest", *["ieee" if by_operation else "none"] * 2)}
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
    assert cudnn.allow_tf32 == before[1]


def test_batches_of_every_size_one_after_the_other() -> None:
    inputs, labels = data("resnet", N)
    expected = score(build("resnet"), inputs, labels).scores
    sizes = [[0], [1, 2, 3, 4, 5, 6], [7], [8, 9, 10, 11, 12]]
    loader = DataLoader(TensorDataset(inputs, labels), batch_sampler=sizes)
    scorer = MoSoScorer(build("resnet"), gradient="full", progress=False)
    table = scorer.score(loader)
    torch.testing.assert_close(table.scores, expected, rtol=1e-10, atol=1e-12)


def test_compiled_model_and_other_dtype() -> None:
    inputs, labels = data("cnn", N)
    expected = score(build("cnn"), inputs, labels).scores
    compiled = torch.compile(build("cnn"), backend="eager")
    torch.testing.assert_close(score(compiled, inputs, labels).scores, expected)
    model = build("cnn")
    kept = copy.deepcopy(model.state_dict())
    table = score(model, inputs, labels, dtype=torch.float32)
    assert table.scores.dtype == torch.float32
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    torch.testing.assert_close(table.scores.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_under_inference_mode_and_autocast_of_the_caller() -> None:
    inputs, labels = data("cnn", N)
    model = build("cnn", torch.float32)
    inputs = inputs.float()
    expected = score(model, inputs, labels)
    with torch.inference_mode():
        table = score(model, inputs, labels)
    assert torch.equal(table.scores, expected.scores)
    assert not table.scores.is_inference()
    own = score(model, inputs, labels, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        callers = score(model, inputs, labels)
        after = model(inputs)
    assert torch.equal(callers.scores, own.scores)
    assert callers.provenance["autocast"] == own.provenance["autocast"] == "torch.bfloat16"
    assert own.provenance["alignment"] == "forward mode"
    assert after.dtype == torch.bfloat16


def test_numbers_are_repeatable() -> None:
    inputs, labels = data("resnet", N, torch.float32)
    one = score(build("resnet", torch.float32), inputs, labels)
    other = score(build("resnet", torch.float32), inputs, labels)
    assert torch.equal(one.scores, other.scores)
