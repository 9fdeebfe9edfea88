"""Whole-network scores of every kind of loss: by name, by a callable, of sequences, near 0."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_cases import CLASSES, build, gradients, scores
from full_scorer_cases import CLOSE, full, samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def test_callable_loss_and_dict_batches() -> None:
    inputs, labels = samples().tensors

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, reduction="none") + outputs.square().sum(1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("cnn")

        def forward(self, pixels: Tensor) -> Tensor:
            return self.net(pixels)

    batches = [{"pixels": x, "labels": y} for x, y in samples()]
    table = full(Named(), loss=loss).score(batches)
    expected = scores(gradients(build("cnn"), inputs, labels, loss), "moso")
    torch.testing.assert_close(table.scores, expected, **CLOSE)
    assert table.metrics["el2n"].isnan().all()
    assert "loss" in table.provenance["loss"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse", "soft"])
def test_named_losses(loss: str) -> None:
    inputs, labels = samples().tensors
    targets = 0.8 * F.one_hot(labels, CLASSES).double() + 0.2 / CLASSES
    function: Any = {
        "binary_cross_entropy": F.binary_cross_entropy_with_logits,
        "mse": F.mse_loss,
        "soft": F.cross_entropy,
    }[loss]
    name = "cross_entropy" if loss == "soft" else loss
    table = full(build("cnn"), loss=name).score(TensorDataset(inputs, targets))
    kind = {} if loss == "soft" else {"reduction": "sum"}
    g = gradients(build("cnn"), inputs, targets, lambda z, t: function(z, t, **kind))
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)


class TinyForCausalLM(nn.Module):
    """Tied embedding and head, output with ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.mix(self.embed(input_ids)).cumsum(1)
        return {"logits": self.lm_head(torch.tanh(hidden))}


@pytest.mark.parametrize("per", ["token", "sample"])
def test_sequences_with_a_tied_head(per: str) -> None:
    torch.manual_seed(0)
    model = TinyForCausalLM().double()
    ids = torch.randint(7, (9, 6))
    counted = torch.tensor([6, 5, 3, 2, 6, 4, 0, 6, 5])
    labels = torch.where(torch.arange(6) < counted[:, None], ids, -100)
    items = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    table = full(model, per=per).score(items)
    rows, losses = [], []
    for x, y in zip(ids, labels, strict=True):
        logits = model(x[None])["logits"][0, :-1]
        loss = F.cross_entropy(logits, y[1:], reduction="sum")
        if per == "token":
            loss = loss / (y[1:] != -100).sum().clamp_min(1)
        losses.append(loss.detach())
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    used = counted > 1
    assert torch.equal(table.scores.isnan(), ~used)
    torch.testing.assert_close(table.scores[used], scores(torch.stack(rows)[used], "moso"), **CLOSE)
    torch.testing.assert_close(table.metrics["loss"][used], torch.stack(losses)[used], **CLOSE)
    assert table.provenance["norms_explicit"] == []
    assert table.provenance["shift_labels"] == "True, by the model's class"


def test_near_converged_losses_keep_their_ranking() -> None:
    """Losses of 1e-9 to 1e-6 in float32, where p - 1 would round to nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    labels = model(inputs).argmax(1)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, -16.0, -20.0]))
        model[1].weight[1] = 0.3
    labels = torch.zeros_like(labels)
    table = full(model).score(TensorDataset(inputs, labels))
    g = gradients(copy.deepcopy(model).double(), inputs.double(), labels)
    exact = scores(g, "moso")
    torch.testing.assert_close(table.scores.double(), exact, rtol=1e-4, atol=0)
    assert table.metrics["loss"].max() < 1e-6
