"""Self-checks of whole-network scores that rounding fails are repeated in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from full_cases import build, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moso_fast.full import methods
from moso_fast.full.loss import OutputLoss
from moso_fast.full.passes import Network, alignment_forward
from moso_fast.full.repeat import in_float64
from moso_fast.scorer import MoSoScorer

# Runs of float32 whose checks rounding fails on a CPU; others may fail where products are summed
# in another order.
SEEDS = (3, 5, 20, 23, 25, 61, 63, 66, 80, 81, 83, 89)


def narrow(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Two features are normed to +1 and -1: hardly any gradient comes through."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 2), nn.LayerNorm(2), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)]
    return nn.Sequential(*layers), torch.randn(12, 6), torch.randint(3, (12,))


@pytest.mark.exhaustive
def test_gradients_that_are_nearly_all_rounding() -> None:
    repeated = 0
    for seed in SEEDS:
        model, inputs, labels = narrow(seed)
        before = [p.data_ptr() for p in model.parameters()]
        scorer = MoSoScorer(model, gradient="full", scope="0.weight", batch_size=5, progress=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = scorer.score(TensorDataset(inputs, labels))
        assert [p.data_ptr() for p in model.parameters()] == before
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert table.scores.dtype == torch.float32
        if "repeated_in_float64" not in table.provenance:
            continue
        repeated += 1
        (said,) = [str(w.message) for w in caught if "self-check" in str(w.message)]
        assert "dtype=torch.float64 does that from the start" in said and "\n" not in said
        for name, p in model.double().named_parameters():
            p.requires_grad_(name == "0.weight")
        expected = scores(gradients(model, inputs.double(), labels), "moso")
        assert (table.scores - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert repeated, "no seed had a check failed by rounding"


def test_model_has_its_own_numbers_back() -> None:
    model = build("cnn", torch.float32)
    parameters = dict(model.named_parameters())
    network = Network(model, OutputLoss("cross_entropy"), parameters, torch.device("cpu"))
    before = {n: (t.data_ptr(), t.dtype) for n, t in model.state_dict().items()}
    with in_float64(network) as other:
        assert other.model is model and other.dtype == torch.float64
        assert model.bn.running_mean.dtype == model.fc.weight.dtype == torch.float64
    assert {n: (t.data_ptr(), t.dtype) for n, t in model.state_dict().items()} == before
    assert network.dtype is None


@pytest.mark.exhaustive
def test_gradients_that_the_caller_has_left() -> None:
    """They have the parameters' dtype: none can stay while that is float64."""
    repeated = 0
    for seed in SEEDS:
        model, inputs, labels = narrow(seed)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.grad for p in model.parameters()]
        scorer = MoSoScorer(model, gradient="full", scope="0.weight", batch_size=5, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = scorer.score(TensorDataset(inputs, labels))
        repeated += "repeated_in_float64" in table.provenance
        for p, gradient in zip(model.parameters(), before, strict=True):
            assert p.grad is gradient and bool((gradient == 1).all())
    assert repeated, "no seed had a check failed by rounding"


@pytest.mark.parametrize("error", [TypeError, RuntimeError, MemoryError])
def test_device_that_has_no_float64(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or no memory for it: what failed before is still said."""

    widen = Tensor.double

    def refuse(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == model.fc.weight.data_ptr():
            raise error("no float64 here")
        return widen(tensor)

    inputs, labels = data("cnn", 13, torch.float32)
    model = build("cnn", torch.float32)
    scorer = MoSoScorer(model, gradient="full", progress=False, batch_size=5)
    monkeypatch.setattr(methods, "alignment_forward", wrong_by(1.1))
    monkeypatch.setattr(Tensor, "double", refuse)
    with pytest.raises(RuntimeError, match=r"self-check failed: .* in it \(\w+: no float64 here"):
        scorer.score(TensorDataset(inputs, labels))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def wrong_by(factor: float) -> Any:
    def run(*args: Any) -> Any:
        losses = alignment_forward(*args)
        # Past the first samples, on which methods are chosen.
        if len(losses.loss) > 3:
            losses.tangent = factor * losses.tangent
        return losses

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_wrong_fails_in_float64_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = data("cnn", 13, dtype)
    scorer = MoSoScorer(build("cnn", dtype), gradient="full", batch_size=5, progress=False)
    monkeypatch.setattr(methods, "alignment_forward", wrong_by(1.1))
    with pytest.raises(RuntimeError, match=r"self-check failed: .*with dtype=torch.float64, so"):
        scorer.score(TensorDataset(inputs, labels))


def test_model_that_does_not_run_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1).float())

    inputs, labels = data("cnn", 13, torch.float32)
    scorer = MoSoScorer(Single(108, 5), gradient="full", batch_size=5, progress=False)
    monkeypatch.setattr(methods, "alignment_forward", wrong_by(1.1))
    with pytest.raises(RuntimeError, match=r"dtype=torch.float64 would tell .* does not run in it"):
        scorer.score(TensorDataset(inputs, labels))
    assert scorer.model.weight.dtype == torch.float32
