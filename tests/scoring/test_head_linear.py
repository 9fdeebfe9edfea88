"""Whether a head's output is F.linear of its input: the edges of what is taken for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.scoring.head.linear_check import read_again, read_head, rounding
from moso_fast.scoring.head.weights import HeadCall, HeadReading
from moso_fast.sources.find_head import FULL_GRADIENT

EPS = {
    kind: torch.finfo(kind).eps
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def call(value: Tensor, output: Tensor, autocast: torch.dtype | None = None) -> HeadCall:
    return HeadCall(value, output, output, (0, 0), autocast)


def ones_head(classes: int, bias: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Four features, of which every class gets the first one."""
    head = nn.Linear(4, classes, bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([1.0, 0, 0, 0]))
        if bias is not None:
            head.bias.fill_(bias)
    return head


def refusal(why: str, kind: str = "Linear") -> str:
    return f"head 'fc' ({kind}) cannot be scored by itself: {why}; {FULL_GRADIENT}"


def differs(out: str, expected: str, kind: str = "Linear") -> str:
    return refusal(
        f"it returned {out} where its weight and bias give {expected}, so it is no plain linear "
        "map (a cosine head, an adapter, a normalisation, weights changed in its forward)",
        kind,
    )


@pytest.fixture
def allow() -> Iterator[Callable[[str], None]]:
    """A setter of the precision of float32 products; what held before holds again after."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), *(one.fp32_precision for one in products)
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before[0])
    for one, value in zip(products, before[1:], strict=True):
        one.fp32_precision = value


def test_rounding_is_that_of_the_coarsest_format(allow: Callable[[str], None]) -> None:
    single, double, half = (
        torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16)
    )
    allow("highest")
    assert rounding(double) == EPS[torch.float64]
    assert rounding(double, single) == rounding(single, double) == EPS[torch.float32]
    assert rounding(single, half, double) == EPS[torch.float16]
    assert rounding(single, autocast=torch.bfloat16) == EPS[torch.bfloat16]
    assert rounding(double, autocast=torch.float16) == EPS[torch.float16]
    allow("high")
    assert rounding(single) == 2.0**-10
    assert rounding(double) == EPS[torch.float64]
    allow("medium")
    assert rounding(double, single) == EPS[torch.bfloat16]
    assert rounding(double) == EPS[torch.float64]


@pytest.mark.parametrize("tf32", [True, False])
def test_the_tf32_of_a_gpu_counts_there_alone(tf32: bool, allow: Callable[[str], None]) -> None:
    with FakeTensorMode():
        there = torch.zeros(1, device="cuda")
    allow("highest")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    assert rounding(there) == (2.0**-10 if tf32 else EPS[torch.float32])
    assert rounding(torch.zeros(1)) == EPS[torch.float32]


@pytest.mark.parametrize("name", ["matmul", "mkldnn"])
def test_the_new_names_of_a_setting_count_too(name: str, allow: Callable[[str], None]) -> None:
    """After these PyTorch does not answer to the old name any more."""
    with FakeTensorMode():
        there = torch.zeros(1, device="cuda")
    allow("highest")
    if name == "matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        expected = 2.0**-10, EPS[torch.float32]
    else:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        expected = EPS[torch.float32], EPS[torch.bfloat16]
    with pytest.raises(RuntimeError, match="without a specific backend name"):
        torch.get_float32_matmul_precision()
    assert (rounding(there), rounding(torch.zeros(1))) == expected


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bias", [None, 2.0])
@pytest.mark.parametrize("dtype", EPS)
def test_how_far_one_number_may_be_off(dtype: torch.dtype, bias: float | None, known: bool) -> None:
    """By 4 eps, and 1e-7 (1e-15 in float64) times the root of D = 4, of the terms' sizes."""
    head = ones_head(3, bias, dtype)
    x = torch.ones(8, 4, dtype=dtype)
    offset = bias or 0.0
    base = 1e-15 if dtype == torch.float64 else 1e-7
    allowed = (4 * EPS[dtype] + 2 * base) * (1 + (1 + offset) + offset)
    # The output is held in float64 or float32, where a fraction of eps can be written down.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    earlier = HeadReading(head.weight.detach(), None if bias is None else head.bias.detach())
    for sign in (1, -1):
        for share, fine in ((0.85, True), (1.15, False)):
            output = torch.full((8, 3), 1 + offset, dtype=wide)
            output[5, 1] += sign * share * allowed
            given = call(x, output)
            if fine:
                reading, _ = read_head("fc", head, given, True, earlier if known else None)
                assert (reading.input_scale, reading.output_scale) == (1.0, 1.0)
                continue
            with pytest.raises(ValueError) as caught:
                read_head("fc", head, given, True, earlier if known else None)
            seen = f"{float(output[5, 1]):.6g}"
            assert str(caught.value) == differs(seen, f"{1 + offset:.6g}")


# In units of the last place above 1: as many are no factor, and one more is one.
NEAR_ONE = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 3}


@pytest.mark.parametrize("dtype", NEAR_ONE)
def test_from_where_on_a_factor_is_seen_in_all_numbers(dtype: torch.dtype) -> None:
    """The mean over 64 numbers tells less than the rounding of each.

    Half an eps where products are cut off or summed in that format (float32, bfloat16), 1.5 in
    float16, and 1e-7 times the root of D, of twice the number.
    """
    head, x, most = ones_head(4, None, dtype), torch.ones(16, 4, dtype=dtype), NEAR_ONE[dtype]
    for ulps in (most, most + 1):
        factor = 1 + ulps * EPS[dtype]
        reading, _ = read_head("fc", head, call(x, torch.full((16, 4), factor, dtype=dtype)), True)
        seen = reading.output_scale
        assert seen == (1.0 if ulps == most else pytest.approx(factor, rel=EPS[dtype] / 8 + 1e-7))
        assert reading.input_scale == 1.0


@pytest.mark.parametrize("rows", [15, 16])
def test_a_factor_takes_64_numbers(rows: int) -> None:
    head = ones_head(4)
    given = call(torch.ones(rows, 4), torch.full((rows, 4), 2.0))
    if rows == 15:
        with pytest.raises(ValueError) as caught:
            read_head("fc", head, given, True)
        assert str(caught.value) == differs("2", "1")
    else:
        assert read_head("fc", head, given, True)[0].output_scale == 2.0


def random_head(bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, its input, what weights make of that, and the bias."""
    torch.manual_seed(0)
    head = nn.Linear(4, 5, bias=bias)
    x = torch.randn(40, 4)
    with torch.no_grad():
        return head, x, x @ head.weight.T, head.bias.clone() if bias else torch.zeros(5)


@pytest.mark.parametrize("factor", [0.5, -3.0, 1.02])
def test_a_factor_on_the_features_or_on_the_output(factor: float) -> None:
    head, x, linear, bias = random_head()
    for output, scales in (
        (factor * linear + bias, (factor, 1.0)),
        (factor * (linear + bias), (1.0, factor)),
    ):
        reading, _ = read_head("fc", head, call(x, output), True)
        assert (reading.input_scale, reading.output_scale) == scales
        assert torch.equal(reading.weight, head.weight) and torch.equal(reading.bias, bias)
        # A later batch is held against it, whatever its size.
        later = call(x[:3], output[:3])
        assert read_head("fc", head, later, False, reading)[0] is reading
        with pytest.raises(ValueError, match="so it is no plain linear map"):
            read_head("fc", head, call(x[:3], output[:3] * 1.01), False, reading)
    with pytest.raises(ValueError, match="so it is no plain linear map"):
        read_head("fc", head, call(x, factor * linear + 2 * bias), True)
    without, x, linear, _ = random_head(bias=False)
    reading, _ = read_head("fc", without, call(x, factor * linear), True)
    assert (reading.bias, reading.input_scale, reading.output_scale) == (None, 1.0, factor)


def test_heads_that_hide_what_they_do() -> None:
    head, x, linear, _ = random_head()
    nn.init.zeros_(head.bias)
    with pytest.raises(ValueError) as caught:
        read_head("fc", head, call(x, 2 * linear), True)
    assert str(caught.value) == refusal(
        "it multiplies by a factor, and a bias of zeros hides whether that too"
    )
    assert read_head("fc", head, call(x, linear), True)[0].output_scale == 1.0

    class Own(nn.Linear):
        pass

    zeros = Own(4, 5)
    nn.init.zeros_(zeros.weight)
    with pytest.raises(ValueError) as caught:
        read_head("fc", zeros, call(x, zeros(x).detach()), False)
    assert str(caught.value) == refusal("its weights are all zero, which hides what it does", "Own")
    plain = nn.Linear(4, 5)
    nn.init.zeros_(plain.weight)
    assert read_head("fc", plain, call(x, plain(x).detach()), True)[0].output_scale == 1.0


def test_numbers_that_overflow_are_left_to_the_scoring() -> None:
    head = ones_head(3, 0.0, torch.float16)
    x = torch.ones(8, 4, dtype=torch.float16)
    with torch.no_grad():
        head.weight[1, 0] = 200.0
    x[2, 0], x[3, 1], x[4, 0] = 400.0, torch.nan, torch.inf
    output = head(x).detach()
    assert bool(output.isinf().any()) and bool(output.isnan().any())
    assert read_head("fc", head, call(x, output), True)[0].output_scale == 1.0
    output[2, 0] = 1.0  # which does not overflow
    with pytest.raises(ValueError) as caught:
        read_head("fc", head, call(x, output), True)
    assert str(caught.value) == differs("1", "400")
    x[:], output[:] = 1.0, 1.0
    output[:, 1] = 200.0
    output[6, 2] = torch.nan
    with pytest.raises(ValueError) as caught:
        read_head("fc", head, call(x, output), True)
    assert str(caught.value) == differs("nan", "1")


@pytest.mark.parametrize(("classes", "step"), [(1024, 2), (2048, 4), (4096, 4)])
def test_a_plain_head_is_held_on_rows_evenly_spaced(classes: int, step: int) -> None:
    """On 65,536 numbers, of 2048 classes at most; another kind of head on all rows."""
    head, x = ones_head(classes), torch.ones(128, 4)
    for row in range(4, 4 + 2 * step):
        output = torch.ones(128, classes)
        output[row] = 3.0
        if row % step:
            read_head("fc", head, call(x, output), True)
        else:
            with pytest.raises(ValueError, match="it returned 3 where its weight and bias give 1"):
                read_head("fc", head, call(x, output), True)
        with pytest.raises(ValueError, match="it returned 3 where its weight and bias give 1"):
            read_head("fc", head, call(x, output), False)


@pytest.mark.parametrize(("row", "seen"), [(0, True), (3, True), (4, False)])
def test_four_rows_are_held_on_all_classes_of_a_vocabulary(row: int, seen: bool) -> None:
    """Of 4100 classes, every second one at least is looked at in all rows, and all in four."""
    head, x = ones_head(4100, 0.0), torch.ones(32, 4)
    output = torch.ones(32, 4100)
    allowed = 8 * (EPS[torch.float32] + 2e-7) * (1 + 1)
    output[row, 1] += 0.95 * allowed
    read_head("fc", head, call(x, output), True)
    output[row, 1] = 1 + 1.05 * allowed
    if not seen:
        read_head("fc", head, call(x, output), True)
        return
    for wrong, text in ((1 + 1.05 * allowed, "1.00001"), (-7.0, "-7"), (torch.nan, "nan")):
        output[row, 1] = wrong
        with pytest.raises(ValueError) as caught:
            read_head("fc", head, call(x, output), True)
        assert str(caught.value) == differs(text, "1")


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.randn(40, 4), (-1, 4)),
        (torch.randn(5, 8, 4), (1, -1, 4)),
        (torch.randn(2, 5, 4, 4), (1, 1, -1, 4)),
    ],
)
def test_rows_are_kept_to_read_the_head_again(value: Tensor, shape: tuple[int, ...]) -> None:
    head = nn.Linear(4, 3)
    given = call(value, head(value).detach())
    reading, sample = read_head("fc", head, given, True)
    assert torch.equal(reading.weight, head.weight) and torch.equal(reading.bias, head.bias)
    rows = value.reshape(-1, 4)
    chosen = [k * len(rows) // 32 for k in range(32)]
    assert torch.equal(sample.rows, rows[chosen])
    assert (sample.shape, sample.autocast) == (shape, None)
    value.zero_()
    assert not torch.equal(sample.rows, torch.zeros(32, 4))
    nn.init.ones_(head.weight)
    again = read_again("fc", head, sample, True)
    assert torch.equal(again.weight, torch.ones(3, 4))


def test_rows_of_a_convolution() -> None:
    head, value = nn.Conv2d(4, 3, 1), torch.randn(2, 4, 3, 5)
    reading, sample = read_head("fc", head, call(value, head(value).detach()), True)
    assert torch.equal(reading.weight, head.weight.flatten(1))
    assert torch.equal(sample.rows, value.movedim(1, -1).reshape(-1, 4))
    assert sample.shape == (-1, 4, 1, 1)
    again = read_again("fc", head, sample, False)
    assert torch.equal(again.weight, head.weight.flatten(1))


def test_a_head_is_read_again_under_the_autocast_of_its_call() -> None:
    seen: list[Any] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            seen.append((output.dtype, tuple(x.shape), output.requires_grad))
            return output

    torch.manual_seed(0)
    head, x = Noting(4, 3), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given = call(x, head(x), torch.bfloat16)
    _, sample = read_head("fc", head, given, False)
    assert sample.autocast == torch.bfloat16
    read_again("fc", head, sample, False)
    # Once with rows like those that were given, twice the 32 of a sample, and once with these.
    assert seen[1:] == [
        (torch.bfloat16, (64, 4), False),
        (torch.bfloat16, (5, 4), False),
        (torch.bfloat16, (64, 4), False),
    ]
