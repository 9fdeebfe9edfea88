"""Settings of the process that a call needs otherwise: what holds meanwhile and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import CPU_BACKENDS

from moso_fast import MoSoScorer, moso_scores
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


# Every name that PyTorch has for what may be rounded, those that others follow first. They are set
# here by what lies under `torch.backends`, because `mkldnn.fp32_precision` sets that of all (2.14).
NAMES = (
    *("generic.all", "cuda.all", "mkldnn.all", "cuda.matmul", "mkldnn.matmul"),
    *("cuda.conv", "cuda.rnn", "mkldnn.conv", "mkldnn.rnn"),
)
PRODUCTS, CONVOLUTIONS = NAMES[3:5], NAMES[5:]
# What a caller has set, and whether PyTorch still answers to the old name of it.
CALLERS = (
    ({"cuda.matmul": "tf32"}, False),
    ({"mkldnn.matmul": "bf16"}, False),
    ({"generic.all": "tf32"}, False),
    ({"generic.all": "ieee"}, True),
    ({"cuda.all": "tf32"}, False),
    ({"mkldnn.all": "bf16"}, False),
    ({"mkldnn.all": "bf16", "mkldnn.matmul": "ieee"}, True),
    ({"generic.all": "tf32", "cuda.matmul": "ieee", "mkldnn.matmul": "ieee"}, True),
    ({"mkldnn.conv": "bf16", "mkldnn.rnn": "tf32"}, True),
    ({"cuda.conv": "tf32", "cuda.rnn": "ieee"}, True),
    (
        {"generic.all": "tf32", "cuda.all": "ieee", "mkldnn.all": "bf16", "cuda.matmul": "tf32"},
        False,
    ),
)


def write(name: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(*name.split("."), value)


def read(*names: str) -> tuple[str, ...]:
    return tuple(torch._C._get_fp32_precision_getter(*name.split(".")) for name in names)


@pytest.fixture
def new_names() -> Iterator[None]:
    """Nothing but the old names was used before, and nothing of the new ones is left after."""

    def clear() -> None:
        for name in NAMES:
            write(name, "none")

    clear()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    clear()
    yield
    clear()


def after_all_follow(settings: dict[str, str]) -> tuple[str, ...]:
    """What holds with these settings once all backends round."""
    for name, value in settings.items():
        write(name, value)
    for name in NAMES[:3]:
        write(name, "tf32")
    return read(*NAMES)


@pytest.mark.parametrize(("settings", "readable"), CALLERS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_new_names_are_heard_and_put_back(settings, readable, device, new_names) -> None:
    followers = after_all_follow(settings)
    for name in NAMES:
        write(name, settings.get(name, "none"))
    before = read(*NAMES)
    if readable:
        assert get() == "highest"
    else:
        with pytest.raises(RuntimeError, match="without a specific backend name"):
            get()
    with own_precision(job("highest", device)):
        assert set(read(*PRODUCTS)) <= {"ieee", "none"}
        assert get() == "highest"
        with exact_products():
            assert set(read(*PRODUCTS, *CONVOLUTIONS)) <= {"ieee", "none"}
        with own_precision(job("high", "cuda")):
            assert set(read(*PRODUCTS)) <= {"ieee", "none"}
    assert read(*NAMES) == before
    with exact_products():
        assert set(read(*PRODUCTS, *CONVOLUTIONS)) <= {"ieee", "none"}
    assert read(*NAMES) == before
    assert after_all_follow({}) == followers, "what followed its backend does no more"


def test_a_job_of_a_gpu_that_may_round_does(new_names) -> None:
    write("mkldnn.matmul", "bf16")
    before = read(*NAMES)
    with own_precision(job("high", "cuda")):
        assert read("cuda.matmul") == ("tf32",)
        with own_precision(job("high", "cpu")):  # of another thread, which relies on "highest"
            assert set(read(*PRODUCTS)) == {"ieee"}
    assert read(*NAMES) == before


@pytest.mark.parametrize("gradient", ["last_layer", "full"])
@pytest.mark.parametrize(("settings", "readable"), CALLERS)
def test_scores_come_out_under_new_names(settings, readable, gradient, new_names) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(24, 6), torch.arange(24) % 3
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    features, head = model[:2](inputs).detach(), model[2]
    data = torch.utils.data.TensorDataset(inputs, labels)

    def call(backend: str) -> torch.Tensor:
        return moso_scores(features, head.weight, labels, head.bias, backend=backend)

    def score() -> torch.Tensor:
        return torch.as_tensor(MoSoScorer(model, gradient=gradient).score(data).scores)

    expected = [*map(call, CPU_BACKENDS), score()]
    for name in NAMES:
        write(name, settings.get(name, "none"))
    before = read(*NAMES)
    found = [*map(call, CPU_BACKENDS), score()]
    assert read(*NAMES) == before
    torch.testing.assert_close(found[:-1], expected[:-1])
    # The caller's own forward pass keeps the caller's rounding.
    torch.testing.assert_close(found[-1], expected[-1], rtol=0.05, atol=1e-3)


def test_of_old_and_new_names_both_are_put_back(new_names) -> None:
    torch.set_float32_matmul_precision("high")
    write("mkldnn.matmul", "none")
    before = read(*NAMES)
    assert read(*PRODUCTS) == ("tf32", "none")
    with own_precision(job("highest")):
        assert set(read(*PRODUCTS)) == {"ieee"}
    assert (read(*NAMES), get()) == (before, "high")


def test_a_refused_change_leaves_nothing_behind(monkeypatch) -> None:
    torch.set_float32_matmul_precision("medium")

    def refuse() -> None:
        raise RuntimeError("not allowed to set flags")

    monkeypatch.setattr(precision, "_forbid_convolutions", refuse)
    with pytest.raises(RuntimeError, match="not allowed"), exact_products():
        raise AssertionError("entered")
    assert get() == "medium"
    assert (precision._users, precision._convolving) == (0, 0)


def test_float16_products_of_a_gpu_are_not_summed_in_float16() -> None:
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_fp16_accumulation
    with own_precision(job("high", "cuda")):
        assert not matmul.allow_fp16_accumulation
    try:
        matmul.allow_fp16_accumulation = True
        with own_precision(job("high", "cpu")):  # has nothing to do with it
            assert matmul.allow_fp16_accumulation
            with own_precision(job("medium", "cuda")):
                assert not matmul.allow_fp16_accumulation
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False


def test_what_a_device_rounds_to(new_names) -> None:
    kinds = ("cpu", "cuda", "mps")
    for products, found in (
        (("none", "none"), ("ieee", "ieee", "ieee")),
        (("ieee", "ieee"), ("ieee", "ieee", "ieee")),
        (("tf32", "none"), ("ieee", "tf32", "tf32")),
        (("tf32", "bf16"), ("bf16", "tf32", "bf16")),
        (("none", "tf32"), ("tf32", "ieee", "tf32")),
    ):
        for name, value in zip(PRODUCTS, products, strict=True):
            write(name, value)
        assert tuple(map(precision.rounds_to, kinds)) == found, products
