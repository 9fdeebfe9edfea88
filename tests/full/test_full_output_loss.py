"""Losses of outputs, row by row: values, gradients and metrics against PyTorch, and labels."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from moso_fast.core.errors import DataError
from moso_fast.full.loss import OutputLoss, check_loss, find_logits
from moso_fast.util.forward_mode import load_forward_mode

ROWS, LENGTH, CLASSES = 4, 3, 5
IGNORED = -7


def soft(*shape: int) -> Tensor:
    return torch.rand(*shape, CLASSES, dtype=torch.float64).softmax(-1)


def ids(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape)


def flat_losses(loss: str, smoothing: float, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each row of (..., C) logits, by PyTorch; 0 where it is ignored."""
    classes = logits.shape[-1]
    logits, shape = logits.reshape(-1, classes), logits.shape[:-1]
    if loss == "cross_entropy":
        whole = labels.reshape(-1) if labels.dim() == len(shape) else labels.reshape(-1, classes)
        values = F.cross_entropy(
            logits, whole, label_smoothing=smoothing, ignore_index=IGNORED, reduction="none"
        )
    else:
        by = {"mse": F.mse_loss, "binary_cross_entropy": F.binary_cross_entropy_with_logits}[loss]
        values = by(logits, labels.reshape(-1, classes), reduction="none").sum(1)
    return values.view(shape)


CASES: dict[str, tuple[str, float, Any]] = {
    "ids": ("cross_entropy", 0.0, ids),
    "smoothed": ("cross_entropy", 0.2, ids),
    "soft": ("cross_entropy", 0.0, soft),
    "binary": ("binary_cross_entropy", 0.0, soft),
    "mse": ("mse", 0.0, soft),
}


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_metrics(name: str) -> None:
    load_forward_mode()
    for per, tokens, shift in itertools.product(("token", "sample"), (False, True), (False, True)):
        check(name, per, tokens, shift)


def check(name: str, per: str, tokens: bool, shift: bool) -> None:
    """Compare one kind of labels, for rows or for tokens."""
    loss, smoothing, make = CASES[name]
    output_loss = OutputLoss(loss, smoothing, IGNORED, per)
    output_loss.shift = shift
    shape = (ROWS, LENGTH) if tokens else (ROWS,)
    logits = torch.randn(*shape, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = make(*shape)
    by_ids = make is ids
    if by_ids and tokens:
        labels[0, 1], labels[1, 2], labels[3] = IGNORED, IGNORED, IGNORED
    elif by_ids:
        labels[2] = IGNORED
    found = output_loss(logits, labels)
    used = labels != IGNORED if by_ids else torch.ones(shape, dtype=torch.bool)
    given, wanted = logits, labels
    if tokens and shift:
        given, wanted, used = logits[:, :-1], labels[:, 1:], used[:, 1:]
    each = flat_losses(loss, smoothing, given, wanted)
    counts = used.sum(1) if tokens else used.long()
    share = counts.clamp_min(1) if tokens and per == "token" else torch.ones(ROWS)
    expected = (each.sum(1) if tokens else each) / share
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.loss, expected.detach(), **close)
    assert torch.equal(found.counted, counts > 0)
    along = torch.randn(ROWS, dtype=torch.float64)
    (residual,) = torch.autograd.grad(expected @ along, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(found.differentiable @ along, logits)
    torch.testing.assert_close(gradient, residual, **close)
    (residual,) = torch.autograd.grad(expected.sum(), logits)
    squares = residual.flatten(1).square().sum(1)
    torch.testing.assert_close(found.residual_sqnorm, squares, **close)
    if by_ids and not smoothing:
        z, safe = given.detach(), wanted.clamp_min(0)[..., None]
        best = z.masked_fill(F.one_hot(safe[..., 0], CLASSES).bool(), -torch.inf).amax(-1)
        p = z.softmax(-1)
        for metric, value in (
            (found.margin, z.gather(-1, safe)[..., 0] - best),
            (found.entropy, -(p * p.log()).sum(-1)),
        ):
            value = torch.where(used, value, 0.0)
            mean = (value.sum(1) if tokens else value) / counts
            torch.testing.assert_close(metric, mean, equal_nan=True, **close)
    assert torch.equal(output_loss.counted(labels), counts > 0)
    assert found.tangent is None
    direction = torch.randn_like(logits)
    with torch.no_grad(), forward_ad.dual_level():
        dual = output_loss(forward_ad.make_dual(logits.detach(), direction), labels)
    tangent = (residual * direction).flatten(1).sum(1)
    torch.testing.assert_close(dual.tangent, tangent, **close)
    first = dual.first(3)
    assert torch.equal(first.loss, dual.loss[:3]) and torch.equal(first.tangent, dual.tangent[:3])
    assert len(first.margin) == len(first.counted) == 3 and found.first(2).tangent is None


def test_defaults() -> None:
    loss = OutputLoss("cross_entropy")
    assert (loss.per, loss.label_smoothing, loss.ignore_index, loss.shift) == (
        "token",
        0.0,
        -100,
        False,
    )


def test_labels_that_can_be_read_in_one_way() -> None:
    """Ids (N, 1), bool of two classes, one-hot rows, one output with targets (N,)."""
    one_hot = F.one_hot(torch.tensor([1, 0, 2]), 3)
    for loss, classes, given, read in (
        ("cross_entropy", 3, one_hot.argmax(1)[:, None], one_hot.argmax(1)),
        ("cross_entropy", 2, torch.tensor([True, False, True]), torch.tensor([1, 0, 1])),
        ("cross_entropy", 3, one_hot, one_hot.double()),
        ("binary_cross_entropy", 1, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0], [0], [1]])),
        ("mse", 1, torch.tensor([3.0, 0.5, 1.0]), torch.tensor([[3.0], [0.5], [1]])),
    ):
        logits = torch.randn(3, classes, dtype=torch.float64)
        output_loss = OutputLoss(loss)
        output_loss.check(logits, given, torch.arange(3), 1)
        found, expected = output_loss(logits, given), output_loss(logits, read)
        assert torch.equal(found.loss, expected.loss)
        torch.testing.assert_close(
            found.loss,
            flat_losses(loss, 0.0, logits, read.double())
            if read.is_floating_point()
            else flat_losses(loss, 0.0, logits, read),
        )
    with pytest.raises(DataError, match=r"labels\[1\] is 3, outside \[0, 3\)"):
        OutputLoss("cross_entropy").check(
            torch.zeros(2, 3), torch.tensor([[0], [3]]), torch.arange(2), 1
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_widened(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(ROWS, CLASSES).to(dtype), ids(ROWS)
    found = OutputLoss("cross_entropy")(logits, labels)
    assert found.loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(found.loss, expected)


def test_callable_losses() -> None:
    outputs = {"x": torch.randn(ROWS, 2, requires_grad=True)}
    loss = OutputLoss(lambda z, y: (z["x"].sum(1) - y).square())
    labels = torch.tensor([1, -100, 3, 0])
    found = loss(outputs, labels)
    expected = (outputs["x"].sum(1) - labels).square()
    assert torch.equal(found.differentiable, expected) and found.differentiable.requires_grad
    assert torch.equal(found.loss, expected.detach()) and not found.loss.requires_grad
    for metric in (found.residual_sqnorm, found.margin, found.entropy):
        assert metric.shape == (ROWS,) and metric.isnan().all()
    assert found.counted.all() and found.counted.dtype == torch.bool and found.tangent is None
    assert loss.counted(labels).tolist() == [True] * 4
    loss.check(outputs, labels, torch.arange(4), 1)  # any label is the callable's own matter
    for wrong, got in (
        (torch.zeros(()), "()"),
        (torch.zeros(3), "(3,)"),
        (torch.zeros(4, 1), "(4, 1)"),
        (0.5, "float"),
    ):
        with pytest.raises(ValueError) as caught:
            OutputLoss(lambda z, y, wrong=wrong: wrong)(outputs, labels)
        assert str(caught.value) == (
            "loss must return one value a sample, a tensor of shape (4,) (reduction='none'), "
            f"got {got}"
        )


def test_logits_in_what_a_model_returns() -> None:
    logits = torch.zeros(2, 3)
    for outputs in (logits, {"logits": logits, "loss": 1.0}, SimpleNamespace(logits=logits)):
        assert find_logits(outputs) is logits
    for outputs in ({"scores": logits}, (logits,), SimpleNamespace(logits=[1.0]), None):
        with pytest.raises(TypeError) as caught:
            find_logits(outputs)
        assert str(caught.value) == (
            f"model: its output ({type(outputs).__name__}) is no tensor and has no logits; give "
            "loss as a callable (outputs, labels) -> (N,)"
        )
    for shape in ((2,), (2, 3, 4, 5)):
        with pytest.raises(ValueError) as caught:
            find_logits(torch.zeros(shape))
        assert str(caught.value) == (
            f"model: logits must have shape (N, C) or (N, T, C), got {shape}"
        )
    assert find_logits(torch.zeros(1, 2, 3)).shape == (1, 2, 3)


def test_ids_are_ignored_by_cross_entropy_alone() -> None:
    """-100 is a target like another to squared error, also where targets are whole numbers."""
    targets = torch.tensor([[0], [-100], [3]])
    for loss, counted in (("cross_entropy", [True, False, True]), ("mse", [True] * 3)):
        assert OutputLoss(loss).counted(targets).tolist() == counted
        assert OutputLoss(loss).counted(targets.double()).tolist() == [True] * 3


def test_names_of_losses() -> None:
    for loss in ("cross_entropy", "binary_cross_entropy", "mse", print):
        check_loss(loss)
    with pytest.raises(ValueError) as caught:
        check_loss("hinge")
    assert str(caught.value) == (
        "loss must be a callable or one of cross_entropy, binary_cross_entropy, mse; got 'hinge'"
    )


def test_labels_of_another_shape() -> None:
    for loss, labels, classes, said in (
        ("cross_entropy", ids(3), 5, "labels of shape (3,) do not go with 4 rows of logits"),
        ("cross_entropy", soft(4)[:, :3], 5, "(4, 5) for loss='cross_entropy', got (4, 3)"),
        ("mse", torch.zeros(4), 5, "(4, 5) for loss='mse', got (4,)"),
        ("binary_cross_entropy", torch.zeros(3, 5), 5, "='binary_cross_entropy', got (3, 5)"),
    ):
        with pytest.raises(ValueError) as caught:
            OutputLoss(loss)(torch.zeros(4, classes), labels)
        begin = "" if said.startswith("labels") else "labels must have shape "
        assert str(caught.value).startswith(begin) and str(caught.value).endswith(said)


def error_of(loss: OutputLoss, logits: Tensor, labels: Any, views: int = 1) -> DataError | None:
    """What is said of the labels of samples 20, 21, ..."""
    labels = torch.as_tensor(labels)
    try:
        loss.check(logits, labels, torch.arange(20, 20 + len(labels) // views), views)
    except DataError as error:
        return error
    return None


def test_ids_outside_the_classes() -> None:
    loss, logits = OutputLoss("cross_entropy", ignore_index=IGNORED), torch.zeros(4, CLASSES)
    assert error_of(loss, logits, [0, 4, IGNORED, 2]) is None
    for labels, row, value in (([0, 5, 9, 0], 21, 5), ([0, 1, 2, -1], 23, -1)):
        found = error_of(loss, logits, labels)
        assert str(found) == f"labels[{row}] is {value}, outside [0, 5) and not ignore_index (-7)"
        assert found is not None and (found.row, found.value) == (row, value)
    assert error_of(loss, logits, [0, 0, 0, 5], views=2).row == 21
    tokens = torch.zeros(2, 3, CLASSES)
    assert error_of(loss, tokens, [[0, 1, 2], [IGNORED, 4, 0]]) is None
    found = error_of(loss, tokens, [[0, 1, 2], [0, 8, 9]])
    assert str(found).startswith("labels[21] is 8, outside [0, 5)")
    loss.shift = True  # the first label of a row is not looked at
    assert error_of(loss, tokens, [[9, 1, 2], [9, 4, 0]]) is None
    assert error_of(loss, tokens, [[9, 1, 2], [9, 8, 0]]).value == 8
    assert error_of(loss, logits, [0, 5, 0, 0]).row == 21


def test_targets_that_are_none() -> None:
    logits, nan = torch.zeros(2, 2), float("nan")
    fine = [0.25, 0.75]
    entropy, binary, mse = map(OutputLoss, ("cross_entropy", "binary_cross_entropy", "mse"))
    sums = "labels[21] must hold probabilities that sum to 1"
    for loss, wrong, said in (
        (entropy, [0.5, 0.45], sums),
        (entropy, [0.5, 0.55], sums),
        (entropy, [-0.5, 1.5], sums),
        (entropy, [nan, 1.0], sums),
        (binary, [0.5, 1.5], "labels[21] must hold probabilities"),
        (binary, [-0.1, 0.5], "labels[21] must hold probabilities"),
    ):
        assert str(error_of(loss, logits, [fine, wrong])) == said
        assert str(error_of(loss, logits, [fine, fine, fine, wrong], 2)) == said
        tokens = torch.zeros(2, 2, 2)
        assert str(error_of(loss, tokens, [[fine, fine], [fine, wrong]])) == said
    for loss, right in (
        (entropy, [0.5, 0.509]),
        (entropy, [0.0, 1.0]),
        (binary, [1.0, 1.0]),
        (binary, [0.0, 0.0]),
        (mse, [-4.0, 9.0]),
    ):
        assert error_of(loss, logits, [fine, right]) is None
        assert error_of(loss, torch.zeros(2, 2, 2), [[fine, right], [right, fine]]) is None
