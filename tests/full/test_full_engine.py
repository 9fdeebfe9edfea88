"""The engine of whole-network scores on batches of its own: results, calls, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_rules import batch_of, network_of
from torch import Tensor, nn

from moso_fast.core.errors import DataError
from moso_fast.full import methods
from moso_fast.full.batches import Batch
from moso_fast.full.engine import FIELDS, FullGradient
from moso_fast.full.loss import OutputLoss
from moso_fast.full.passes import alignment_forward

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (rows,), generator=generator)


def in_batches(inputs: Tensor, labels: Tensor, size: int, views: int = 1) -> list[Batch]:
    """Batches of ``size`` samples, numbered from 20 on."""
    whole = batch_of(inputs, labels, views)
    return [whole.take(slice(k, k + size)) for k in range(0, whole.samples, size)]


def engine_of(model: nn.Module, loss: Any = None, **options: Any) -> FullGradient:
    return FullGradient(network_of(model, loss or OutputLoss("cross_entropy")), **options)


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor, views: int = 1) -> Tensor:
    rows = []
    for k in range(0, len(inputs), views):
        loss = F.cross_entropy(model(inputs[k : k + views]), labels[k : k + views])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_statistics_of_a_part(views: int, chunk_size: int | None) -> None:
    model, (inputs, labels) = net(), data(8 * views)
    engine, calls = engine_of(model, chunk_size=chunk_size), []
    given = in_batches(inputs, labels, 3, views)
    result = engine.part(
        lambda: given, lambda: calls.append("batch"), lambda count: calls.append(count)
    )
    assert calls == ["batch"] * 3 + [8] + ["batch"] * 3
    assert torch.equal(result.index, torch.arange(20, 28)) and result.count == 8
    g = gradients(model, inputs, labels, views)
    mean = g.mean(0)
    logits = model(inputs).detach()
    p = logits.softmax(1)
    one_hot = F.one_hot(labels, 3).double()
    best = logits.masked_fill(one_hot.bool(), -torch.inf).amax(1)
    expected = {
        "alignment": g @ mean,
        "grad_sqnorm": g.square().sum(1),
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "el2n": (p - one_hot).norm(dim=1),
        "margin": (logits * one_hot).sum(1) - best,
        "entropy": -(p * p.log()).sum(1),
    }
    assert tuple(result.fields) == FIELDS == tuple(expected)
    for name, values in expected.items():
        values = values if len(values) == 8 else values.view(8, views).mean(1)
        assert result.fields[name].dtype == torch.float64
        torch.testing.assert_close(result.fields[name], values, msg=name, **CLOSE)
    assert result.mean_grad_sqnorm == pytest.approx(float(mean @ mean), rel=1e-12)
    assert engine.describe() == {
        "alignment": "forward mode",
        "norms": "4 of 4 parameters traced",
        "norms_explicit": [],
        "norms_explicit_by": "",
    }
    assert engine.part(lambda: given).count == 8  # nobody has to listen


def test_results_in_the_precision_of_the_model() -> None:
    for dtype, kind in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        inputs, labels = data(8, dtype)
        result = engine_of(net(dtype)).part(lambda: in_batches(inputs, labels, 4))  # noqa: B023
        assert {values.dtype for values in result.fields.values()} == {kind}


def test_batches_are_brought_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """To its device, and to the dtype that it runs in, in both passes."""
    seen, own = [], Batch.on

    def watched(batch: Batch, device: Any, dtype: Any) -> Batch:
        seen.append((device, dtype))
        return own(batch, device, dtype)

    monkeypatch.setattr(Batch, "on", watched)
    inputs, labels = data(4, torch.float32)
    network = network_of(net(), OutputLoss("cross_entropy"), dtype=torch.float64)
    FullGradient(network).part(lambda: in_batches(inputs, labels, 2))
    assert seen == [(torch.device("cpu"), torch.float64)] * 4


def test_no_samples() -> None:
    with pytest.raises(ValueError) as caught:
        engine_of(net()).part(lambda: [])
    assert str(caught.value) == "data holds no samples"


def test_samples_without_a_label_that_counts() -> None:
    """A whole batch of them, some of the first, all of them."""
    model, (inputs, labels) = net(), data(9)
    labels[[1, 3, 4, 5, 8]] = -100
    used = labels >= 0
    result = engine_of(model).part(lambda: in_batches(inputs, labels, 3))
    g = gradients(model, inputs[used], labels[used])
    assert result.count == 4
    for name in FIELDS:
        assert torch.equal(result.fields[name].isnan(), ~used)
    torch.testing.assert_close(result.fields["alignment"][used], g @ g.mean(0), **CLOSE)
    labels[:] = -100
    result = engine_of(model).part(lambda: in_batches(inputs, labels, 3))
    assert result.count == 0 and result.mean_grad_sqnorm == 0.0
    assert all(values.isnan().all() for values in result.fields.values())


@pytest.mark.parametrize("broken", [[0], [1, 2], [0, 1, 2], [7], [4, 8], [3, 4, 5]])
def test_samples_that_are_not_finite(broken: list[int]) -> None:
    """In the first batch, before anything is known of the model, or later."""
    model, (inputs, labels) = net(), data(9)
    inputs[broken] = torch.nan
    given = in_batches(inputs, labels, 3)
    with pytest.raises(DataError) as caught:
        engine_of(model).part(lambda: given)
    assert str(caught.value) == (
        f"the loss or gradient of sample {20 + broken[0]} is not finite; it is the first such "
        "sample (nonfinite='exclude' scores the others)"
    )
    assert caught.value.row == 20 + broken[0]
    result = engine_of(model, nonfinite="exclude").part(lambda: given)
    rest = torch.ones(9, dtype=torch.bool)
    rest[broken] = False
    g = gradients(model, inputs[rest], labels[rest])
    assert result.count == len(g)
    assert torch.equal(result.fields["loss"].isnan(), ~rest)
    torch.testing.assert_close(result.fields["alignment"][rest], g @ g.mean(0), **CLOSE)
    torch.testing.assert_close(result.fields["grad_sqnorm"][rest], g.square().sum(1), **CLOSE)


class Passes:
    """Batches that differ from the first pass to the second."""

    def __init__(self, first: list[Batch], second: list[Batch]) -> None:
        self.passes = [first, second]

    def __call__(self) -> list[Batch]:
        return self.passes.pop(0)


def test_a_second_pass_over_other_data() -> None:
    inputs, labels = data(8)
    given = in_batches(inputs, labels, 4)
    other = in_batches(inputs + torch.tensor([0.0, 0.0, 0.0, 0.05]), labels, 4)
    for second, what in (
        (given[:1], "fewer samples"),
        ([*given, given[0]], "more samples"),
        (other, "other losses"),
    ):
        with pytest.raises(ValueError) as caught:
            engine_of(net()).part(Passes(given, second))
        assert str(caught.value) == (
            f"data: the second pass over the data gives {what} than the first; the transform must "
            "be deterministic (views= scores the mean over augmented views)"
        )
    nearly = in_batches(inputs + 1e-6, labels, 4)
    assert engine_of(net()).part(Passes(given, nearly)).count == 8


def test_losses_may_differ_by_a_thousandth_of_the_largest() -> None:
    engine = engine_of(net())
    before = torch.tensor([4.0, 0.5])
    engine._check_same(before, before + torch.tensor([0.0, 0.0039]))
    with pytest.raises(ValueError, match="gives other losses than"):
        engine._check_same(before, before + torch.tensor([0.0, -0.0041]))
    small = torch.zeros(2)
    engine._check_same(small, small + 0.9e-6)
    with pytest.raises(ValueError, match="gives other losses than"):
        engine._check_same(small, small + 1.1e-6)
    rough = engine_of(net(torch.bfloat16))
    rough._check_same(before, before + 0.39)
    with pytest.raises(ValueError, match="gives other losses than"):
        rough._check_same(before, before + 0.41)


def wrong_by(factor: float, least: int = 4) -> Any:
    """Forward mode whose values are wrong, for chunks of ``least`` samples and more."""

    def run(*args: Any) -> Any:
        losses = alignment_forward(*args)
        if len(losses.loss) >= least and losses.loss.dtype == torch.float32:
            losses.tangent = factor * losses.tangent
        return losses

    return run


def test_a_part_that_is_repeated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here since forward mode is made wrong in float32; the user is told once."""
    model, (inputs, labels) = net(torch.float32), data(8, torch.float32)
    engine = engine_of(model)
    monkeypatch.setattr(methods, "alignment_forward", wrong_by(1.1))
    engine.methods.aligned = methods.alignment_forward
    g = gradients(net(), inputs.double(), labels)
    counts: list[int] = []
    for number in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = engine.part(lambda: in_batches(inputs, labels, 4), on_count=counts.append)
        said = [str(w.message) for w in caught if "self-check" in str(w.message)]
        assert len(said) == (1 if number == 1 else 0)
        if said:
            before, _, error = said[0].partition(
                " (self-check failed: the alignment of sample 20 is"
            )
            assert before == (
                "a self-check failed by rounding, so that part of the scores was computed again "
                "in float64 and passed there; dtype=torch.float64 does that from the start"
            )
            assert error.endswith(")")
        assert result.fields["alignment"].dtype == torch.float32
        torch.testing.assert_close(result.fields["alignment"], (g @ g.mean(0)).float())
        assert torch.equal(result.index, torch.arange(20, 28)) and result.count == 8
        assert result.mean_grad_sqnorm == pytest.approx(float(g.mean(0).square().sum()), rel=1e-6)
        assert engine.describe()["repeated_in_float64"] == f"{number} parts"
    assert counts == [8] * 4


def test_backward_passes_have_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are exact, too, whatever the caller has asked for."""
    seen = []
    first = FullGradient._first

    def watched(self: FullGradient, chunk: Batch) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return first(self, chunk)

    monkeypatch.setattr(FullGradient, "_first", watched)
    inputs, labels = data(8, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            engine = engine_of(net(torch.float32))
            assert engine.network.autocast == torch.bfloat16
            engine.part(lambda: in_batches(inputs, labels, 4))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {(False, "highest")}


def test_derivatives_that_forward_mode_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of single samples come from backward passes."""
    model, (inputs, labels) = net(), data(8)
    g = gradients(model, inputs, labels)

    def run(network: Any, batch: Batch, tangents: Any) -> Any:
        losses = alignment_forward(network, batch, tangents)
        losses.tangent[(batch.index == 23) | (batch.index == 24)] = torch.nan
        return losses

    engine = engine_of(model)
    engine.methods.prepare(in_batches(inputs, labels, 3)[0])
    engine.methods.aligned = run
    result = engine.part(lambda: in_batches(inputs, labels, 8))
    torch.testing.assert_close(result.fields["alignment"], g @ g.mean(0), **CLOSE)
