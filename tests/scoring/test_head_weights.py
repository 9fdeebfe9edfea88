"""The weights of a head that are in force, its calls, and who reads them elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from moso_fast.scoring.head.reads import watched
from moso_fast.scoring.head.weights import (
    HeadCall,
    HeadReading,
    autocast_dtype,
    check_trained,
    effective,
    is_plain,
    last_dim,
    version,
)
from moso_fast.sources.find_head import FULL_GRADIENT


def refusal(kind: str, why: str) -> str:
    return f"head 'fc' ({kind}) cannot be scored by itself: {why}; {FULL_GRADIENT}"


def test_writes_after_a_call_are_seen() -> None:
    value, live = torch.ones(3), torch.ones(2)
    live.add_(1)
    call = HeadCall(value, live.clone(), live, (version(value), version(live)), None)
    assert call.overwritten() == (False, False)
    value.mul_(1)
    assert call.overwritten() == (True, False)
    live.mul_(1)
    assert call.overwritten() == (True, True)


def test_writes_to_tensors_of_inference_mode_are_seen_by_their_numbers() -> None:
    with torch.inference_mode():
        live = torch.ones(2)
    assert version(live) == -1 and version(torch.ones(2)) == 0
    value = torch.ones(3)
    call = HeadCall(value, torch.ones(2), live, (0, -1), None)
    assert call.overwritten() == (False, False)
    with torch.inference_mode():
        live[1] = 2
    assert call.overwritten() == (False, True)


def test_a_copy_of_a_reading_is_nobody_elses() -> None:
    reading = HeadReading(torch.ones(2, 3), torch.ones(2), 0.5, 2.0)
    copied = reading.copied(torch.device("cpu"))
    reading.weight.zero_()
    reading.bias.zero_()
    assert torch.equal(copied.weight, torch.ones(2, 3)) and torch.equal(copied.bias, torch.ones(2))
    assert (copied.input_scale, copied.output_scale) == (0.5, 2.0)
    elsewhere = reading.copied(torch.device("meta"))
    assert elsewhere.weight.device.type == elsewhere.bias.device.type == "meta"
    assert HeadReading(torch.ones(2, 3), None).copied(torch.device("cpu")).bias is None


def test_the_classes_of_a_convolution_come_second() -> None:
    pixels = torch.randn(2, 3, 4, 5)
    assert torch.equal(last_dim(pixels, nn.Conv2d(3, 3, 1)), pixels.permute(0, 2, 3, 1))
    assert last_dim(pixels, nn.Linear(3, 3)) is pixels


class Renamed(nn.Linear):
    """Another start, the same forward."""


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def changed(change: Callable[[nn.Module], Any], head: nn.Module | None = None) -> nn.Module:
    head = nn.Linear(3, 2) if head is None else head
    change(head)
    return head


@pytest.mark.parametrize(
    ("head", "plain"),
    [
        (nn.Linear(3, 2), True),
        (nn.Conv1d(3, 2, 1), True),
        (nn.Conv2d(3, 2, 1), True),
        (nn.Conv3d(3, 2, 1), True),
        (Renamed(3, 2), True),
        (Other(3, 2), False),
        (nn.Bilinear(3, 3, 2), False),
        (nn.Identity(), False),
        (changed(lambda head: setattr(head, "forward", head.forward)), False),
        (changed(lambda head: head.register_forward_hook(lambda *_: None)), False),
        (changed(lambda head: head.register_forward_pre_hook(lambda *_: None)), False),
        (
            changed(lambda head: head.register_forward_hook(lambda *_: None, with_kwargs=True)),
            False,
        ),
        (changed(lambda head: prune.identity(head, "weight")), False),
        (changed(lambda head: setattr(head, "weight", None)), False),
        (changed(lambda head: setattr(head, "bias", None)), True),
    ],
)
def test_which_heads_run_nothing_but_their_own_forward(head: nn.Module, plain: bool) -> None:
    assert is_plain(head) is plain


def test_the_autocast_in_force() -> None:
    assert autocast_dtype("cpu") is None
    with torch.autocast("cpu", torch.float16):
        assert autocast_dtype("cpu") == torch.float16
        assert autocast_dtype("cuda") is None


class Sharded(Tensor):
    """A tensor class that says what it stands for, as DTensor does."""

    def full_tensor(self) -> Tensor:
        return torch.full((2, 3), 7.0)


class Packed(Tensor):
    """A quantised tensor class."""

    def dequantize(self) -> Tensor:
        return torch.full((2, 3), 5.0)


def holding(weight: Any, bias: Any = None) -> nn.Module:
    head = nn.Module()
    head.weight, head.bias = weight, bias
    return head


def test_weights_in_force() -> None:
    head = nn.Linear(3, 2)
    weight, bias = effective("fc", head, (2, 3))
    assert torch.equal(weight, head.weight) and torch.equal(bias, head.bias)
    assert not weight.requires_grad and not bias.requires_grad
    conv = nn.Conv2d(3, 2, 1, bias=False)
    weight, bias = effective("fc", conv, (2, 3))
    assert torch.equal(weight, conv.weight[:, :, 0, 0]) and bias is None
    for kind, number in ((Sharded, 7.0), (Packed, 5.0)):
        weight, _ = effective("fc", holding(torch.zeros(2, 3).as_subclass(kind)), (2, 3))
        assert torch.equal(weight, torch.full((2, 3), number))
    for kind in (nn.Parameter, nn.Buffer):
        weight, _ = effective("fc", holding(kind(torch.ones(2, 3))), (2, 3))
        assert torch.equal(weight, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (nn.Linear(4, 2), "it maps 3 features to 2, and its weight is (2, 4)"),
        (nn.Linear(3, 5), "it maps 3 features to 2, and its weight is (5, 3)"),
        (nn.Identity(), "it maps 3 features to 2, and its weight is missing"),
        (
            holding(torch.ones(2, 3), torch.ones(3)),
            "it maps 3 features to 2, and its weight is (2, 3)",
        ),
        (
            holding(torch.ones(2, 3, dtype=torch.int8)),
            "its weight is torch.int8, no floating point (quantised)",
        ),
        (
            holding(torch.ones(2, 3), torch.ones(2, dtype=torch.int32)),
            "its bias is torch.int32, no floating point (quantised)",
        ),
        (holding([[1.0]]), "its weight is list, no floating point (quantised)"),
    ],
)
def test_weights_that_are_none(head: nn.Module, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        effective("fc", head, (2, 3))
    assert str(caught.value) == refusal(type(head).__name__, why)


def test_what_is_trained_in_place_of_a_frozen_weight() -> None:
    head = nn.Linear(3, 2)
    for name in ("a", "b", "c", "d", "e"):
        head.register_parameter(name, nn.Parameter(torch.ones(1)))
    check_trained("fc", head)
    head.weight.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        check_trained("fc", head)
    why = "its weight is frozen and a, b, c, d are trained in its place"
    assert str(caught.value) == refusal("Linear", why)
    for name in ("a", "b", "c", "d", "e"):
        head.get_parameter(name).requires_grad_(False)
    check_trained("fc", head)  # its bias alone is trained: nothing instead of the weight
    computed = prune.identity(nn.Linear(3, 2), "weight")
    check_trained("fc", computed)


def test_what_counts_as_reading_a_head_elsewhere() -> None:
    head = nn.BatchNorm1d(3)
    other = nn.Linear(3, 3)
    x = torch.randn(4, 3)

    def found(work: Callable[[], Any]) -> bool:
        with watched(head) as reads:
            work()
        assert not head._forward_hooks and not head._forward_pre_hooks
        return reads.found

    assert not found(lambda: (head(x), other(x), head.weight.shape, len(head.bias)))
    assert found(lambda: other(x) * head.weight)
    assert found(lambda: torch.stack([x[0], head.running_mean]))  # of its buffers, in a list
    assert found(lambda: torch.add(x, other=head.bias))  # by its name
    assert found(lambda: (head.weight.sum(), other(x)))  # and then nothing more
    for fact in (
        lambda w: w.size(), lambda w: w.dim(), lambda w: w.ndimension(), lambda w: w.numel(),
        lambda w: w.nelement(), lambda w: w.stride(), lambda w: w.element_size(), lambda w: len(w),
        lambda w: w.is_floating_point(), lambda w: w.is_complex(), lambda w: w.is_contiguous(),
        lambda w: w.data_ptr(), lambda w: w.storage_offset(), lambda w: (w.dtype, w.device),
    ):  # fmt: skip
        assert not found(lambda fact=fact: fact(head.weight))

    def fails() -> None:
        with pytest.raises(ValueError):
            head(x[:, :, None, None])
        _ = head.weight + 1

    assert found(fails)  # a call that fails has ended, too
