"""Settings of the process that a call needs otherwise: what holds meanwhile and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moso_fast.core import precision
from moso_fast.core.precision import exact_products, own_precision

get = torch.get_float32_matmul_precision


@pytest.fixture(autouse=True)
def settings_come_back() -> Iterator[None]:
    before, allow = get(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = allow


def job(wanted: str, device: str = "cpu") -> Any:
    """What a problem says of itself here."""
    return SimpleNamespace(device=torch.device(device), precision=wanted)


# Device of a job, its precision, and what holds meanwhile. bfloat16 products are never asked of
# PyTorch: where "medium" rounds operands, it does so itself.
HELD = (
    *(("cpu", wanted, "highest") for wanted in ("highest", "high", "medium")),
    *[("cuda", "highest", "highest"), ("cuda", "high", "high"), ("cuda", "medium", "high")],
)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_what_a_job_asks_for_holds_until_it_is_over(before) -> None:
    torch.set_float32_matmul_precision(before)
    for device, wanted, held in HELD:
        with own_precision(job(wanted, device)):
            assert get() == held, (device, wanted)
        assert get() == before
        with pytest.raises(KeyError), own_precision(job(wanted, device)):
            raise KeyError
        assert get() == before


def test_of_several_jobs_at_once_the_strictest_is_heard() -> None:
    """Each in a thread of its own, so that the first to come may be the first to go."""
    torch.set_float32_matmul_precision("medium")
    precision._enter("high")
    assert get() == "high"
    precision._enter("highest")
    assert get() == "highest"
    precision._enter("high")  # takes nothing from whoever relies on "highest"
    assert get() == "highest"
    for left, held in ((2, "highest"), (1, "highest"), (0, "medium")):
        precision._leave()
        assert (precision._users, get()) == (left, held)
    torch.set_float32_matmul_precision("high")
    with own_precision(job("highest")), own_precision(job("high", "cuda")):
        assert get() == "highest"
    assert get() == "high"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_graph_and_no_autocast_meanwhile(device) -> None:
    with own_precision(job("highest", device)):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with own_precision(job("highest")):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_products_and_convolutions_are_exact_until_the_last_leaves() -> None:
    cudnn = torch.backends.cudnn
    for allowed in (True, False):
        torch.set_float32_matmul_precision("medium")
        cudnn.allow_tf32 = allowed
        with ExitStack() as outer, ExitStack() as inner:
            outer.enter_context(exact_products())
            assert (get(), cudnn.allow_tf32) == ("highest", False)
            inner.enter_context(exact_products())
            outer.close()
            assert (get(), cudnn.allow_tf32) == ("highest", False)
            inner.close()
        assert (get(), cudnn.allow_tf32) == ("medium", allowed)
    cudnn.allow_tf32 = True
    with own_precision(job("highest")):  # has no convolutions
        assert cudnn.allow_tf32
        with exact_products():
            assert not cudnn.allow_tf32
        assert cudnn.allow_tf32 and get() == "highest"
    assert (precision._users, precision._convolving) == (0, 0)


class NewNames:
    """cuDNN's settings once somebody has used their new names: the old one cannot be read."""

    def __init__(self) -> None:
        self.conv = SimpleNamespace(fp32_precision="tf32")
        self.rnn = SimpleNamespace(fp32_precision="none")

    @property
    def allow_tf32(self) -> bool:
        raise RuntimeError("mixed use of the legacy and new APIs")


def test_the_names_that_the_caller_has_used_are_put_back(monkeypatch) -> None:
    new = NewNames()
    monkeypatch.setattr(torch.backends, "cudnn", new)
    with exact_products():
        assert (new.conv.fp32_precision, new.rnn.fp32_precision) == ("ieee", "ieee")
    assert (new.conv.fp32_precision, new.rnn.fp32_precision) == ("tf32", "none")
    old = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", old)
    with exact_products():
        assert old.allow_tf32 is False
    assert old.allow_tf32 is True
