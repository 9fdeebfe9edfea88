"""The authors' functions piece by piece: joined batches, criteria, refusals in full."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moso_fast.compat import api


def test_small_batches_of_one_shape_are_joined() -> None:
    """To at least 64 samples; the numbers of the samples go on across them."""

    def batch(count, width, first):
        return torch.full((count, width), float(first)), torch.arange(first, first + count)

    def sizes(loader):
        found = list(api._gathered(loader))
        assert torch.cat([b.index for b in found]).tolist() == list(
            range(sum(len(b.labels) for b in found))
        )
        assert all(torch.equal(b.labels, b.index) for b in found)
        return [len(b.labels) for b in found]

    ones = [batch(1, 2, k) for k in range(130)]
    assert sizes(ones) == [64, 64, 2]
    assert sizes([batch(40, 2, 0), batch(40, 2, 40), batch(63, 2, 80), batch(1, 2, 143)]) == [
        80,
        64,
    ]
    assert sizes([batch(3, 2, 0), batch(3, 5, 3), batch(2, 5, 6), batch(1, 2, 8)]) == [3, 5, 1]
    assert list(api._gathered([])) == []

    # What is no single tensor goes as it comes, after what waits.
    def named(count, first):
        x, labels = batch(count, 2, first)
        return {"x": x, "labels": labels}

    found = list(api._gathered([batch(2, 2, 0), named(3, 2), named(3, 5), batch(2, 2, 8)]))
    assert [len(b.labels) for b in found] == [2, 3, 3, 2]
    assert torch.cat([b.index for b in found]).tolist() == list(range(10))
    assert [list(b.kwargs) for b in found] == [[], ["x"], ["x"], []]
    assert [len(b.args) for b in found] == [1, 0, 0, 1]
    pair = list(api._gathered([((torch.ones(2, 1), torch.ones(2, 3)), torch.arange(2))]))
    assert len(pair) == 1 and pair[0].index.tolist() == [0, 1]


def test_a_criterion_is_taken_by_name_where_it_has_one() -> None:
    by_name = api._loss_of(nn.CrossEntropyLoss(label_smoothing=0.25, ignore_index=3))
    assert (by_name.loss, by_name.label_smoothing, by_name.ignore_index) == (
        "cross_entropy",
        0.25,
        3,
    )
    assert api._loss_of(nn.CrossEntropyLoss(reduction="sum")).loss == "cross_entropy"

    class Own(nn.CrossEntropyLoss):
        pass

    for criterion in (nn.CrossEntropyLoss(weight=torch.ones(3)), Own(), nn.MultiMarginLoss()):
        each = api._loss_of(criterion).loss
        outputs, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
        expected = [criterion(outputs[k : k + 1], labels[k : k + 1]) for k in range(4)]
        assert torch.equal(each(outputs, labels), torch.stack(expected))
    none = api._loss_of(nn.CrossEntropyLoss(reduction="none")).loss
    assert none(outputs, labels).shape == (4,)


def test_refusals_in_full() -> None:
    net, loss = nn.Linear(2, 3), nn.CrossEntropyLoss()
    pair = [(torch.ones(1, 2), torch.tensor([0]))]
    for given, error, message in (
        ((5, pair, loss), TypeError, "net must be an nn.Module, got int"),
        ((net, pair, 5), TypeError, "criterion must be callable, got int"),
        ((net, iter(pair), loss), TypeError,
         "dataloader must be one that can be gone through twice, got an iterator"),
        ((net, pair, loss), ValueError, "dataloader must hold at least 2 samples, got 1"),
    ):  # fmt: skip
        with pytest.raises(error) as refused:
            api.MoSo_scoring_exact(*given)
        assert str(refused.value) == message
