"""The softmax kernel with a bias to add, and with residuals in a bfloat16 matrix of their own."""

from __future__ import annotations

import math

import pytest
import torch
from far_memory import STRIDE, Sparse, each_written_once, walled
from moso_fast.kernels.residual import (
    NARROW_CONFIGS,
    NarrowResiduals,
    RowOutputs,
    choose_config,
    residual_rows,
)
from residual_support import (
    FIELDS,
    Result,
    assert_close,
    launch,
    logits_and_ids,
    probabilities,
    reference,
)
from torch import Tensor

from moso_fast.core.status import STATUS_LABEL, STATUS_LOGITS

BF16 = torch.bfloat16
STATISTICS = FIELDS[1:]
# (n, K, C): several rows a tile, one row a tile, tile after tile; for narrow residuals K is 1.
BIASED = [(7, 1, 1), (67, 1, 10), (23, 3, 10), (9, 2, 33), (3, 1, 1000), (2, 2, 9000), (3, 1, 8193)]
# Every tile, with full lanes and with lanes left over; two tiles of rows.
NARROW = [(5, 5), (300, 8), (67, 10), (65, 16), (33, 17), (35, 128), (5, 129), (6, 256), (3, 257),
          (2, 512), (3, 1000), (2, 2048), (3, 2049), (2, 4096), (2, 8190), (3, 8193),
          (2, 12288)]  # fmt: skip


def padded(classes: int) -> int:
    return 8 * -(-classes // 8)


def check(result: Result, logits: Tensor, labels: Tensor, **options: object) -> None:
    """Compare with float64; residuals by what rounding to bfloat16 may take."""
    assert_close(result, logits, labels, fields=STATISTICS, **options)
    assert result.narrow is not None and result.lost is not None
    classes = logits.shape[2]
    assert not result.narrow[:, classes:].any()  # zeros behind the classes, and no NaN
    exact = reference(logits, labels, **options)["residual"][:, 0]
    narrow = result.narrow[:, :classes].double()
    # The interpreter cuts digits off: less than 2^-7 of a number.
    assert bool(((narrow - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all())
    sqnorm = exact.square().sum(1)
    error = (result.lost.double() - (sqnorm - narrow.square().sum(1))).abs()
    assert bool((error <= 1e-5 * sqnorm + 1e-12).all()), float(error.max())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", BIASED, ids=str)
def test_bias_is_added(shape, soft: bool, generator: torch.Generator) -> None:
    rows, heads, classes = shape
    logits, labels = logits_and_ids(shape, generator)
    bias = torch.randn(heads, classes, generator=generator)
    if soft:
        labels = probabilities(rows, classes, generator)
    options = {"label_smoothing": 0.1, "counted": torch.arange(rows) % 3 != 1}
    whole = logits + bias
    result = launch(logits, labels, bias=bias.flatten(), **options)
    assert_close(result, whole, labels, **options)
    expected = launch(whole, labels, **options)
    for name in FIELDS:  # bit by bit what it is where the logits have it
        got, other = getattr(result, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(7.0), other.nan_to_num(7.0)), name


def test_every_tile_of_narrow_residuals_is_tried() -> None:
    tried = {choose_config(classes, narrow=True) for _, classes in NARROW}
    assert tried == set(NARROW_CONFIGS)
    for config in NARROW_CONFIGS[:-1]:
        full = [classes for _, classes in NARROW if classes == config.max_classes]
        assert full or config.max_classes in (1024, 8192), config


@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_narrow_residuals(shape: tuple[int, int], generator: torch.Generator) -> None:
    rows, classes = shape
    logits, labels = logits_and_ids((rows, 1, classes), generator)
    bias = torch.randn(classes, generator=generator)
    result = launch(logits, labels, columns=padded(classes), bias=bias)
    check(result, logits + bias, labels)
    assert result.status == [rows] * 4
    check(launch(logits, labels, columns=classes), logits, labels)  # no column behind them
    # Logits in rows of a multiple of 8, as products behind padded weights leave them.
    behind = padded(classes) - classes
    again = launch(logits, labels, columns=padded(classes), bias=bias, padding=behind)
    for name in ("narrow", "lost", *STATISTICS):
        assert torch.equal(getattr(again, name), getattr(result, name)), name


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(30, 10), (6, 200), (5, 300), (5, 8195)], ids=str)
def test_narrow_weights_smoothing_ignored_and_strided_rows(
    shape: tuple[int, int], soft: bool, generator: torch.Generator
) -> None:
    rows, classes = shape
    logits, labels = logits_and_ids((rows, 1, classes), generator)
    if soft:
        labels = probabilities(rows, classes, generator)
    else:
        labels[1::4] = -100
    counted = torch.arange(rows) % 5 != 3
    options = {
        "label_smoothing": 0.1,
        "sample_weight": 2.0 * torch.rand(rows, generator=generator),
        "counted": counted,
    }
    logits[3] = torch.nan  # of a row that does not count
    result = launch(logits, labels, columns=padded(classes), padding=7, offset=3, **options)
    logits[3] = 0.0
    check(result, logits, labels, **options)
    assert result.status == [rows] * 4
    assert not result.narrow[~counted].any() and not result.lost[~counted].any()


@pytest.mark.parametrize("classes", [10, 9000])
def test_as_many_columns_as_the_kernel_walks(classes: int, generator: torch.Generator) -> None:
    block = choose_config(classes, narrow=True).block_classes
    logits, labels = logits_and_ids((3, 1, classes), generator)
    check(launch(logits, labels, columns=block * -(-classes // block)), logits, labels)


@pytest.mark.parametrize("classes", [10, 9000])
def test_bad_rows_leave_zeros(classes: int, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((9, 1, classes), generator)
    bias = torch.zeros(classes)
    labels[2], logits[4, 0, 1], logits[7, 0, -1] = classes, math.nan, math.inf
    result = launch(logits, labels, columns=padded(classes), bias=bias)
    assert result.status[STATUS_LABEL] == 2 and result.status[STATUS_LOGITS] == 4
    assert not result.narrow[[2, 4, 7]].any() and not result.lost[[2, 4, 7]].any()
    bias[classes - 1] = math.nan  # a bias is part of every logit
    result = launch(logits, labels, columns=padded(classes), bias=bias)
    assert result.status[STATUS_LOGITS] == 0 and not result.narrow.any()


@pytest.mark.parametrize("classes", [10, 70, 9000])
def test_every_number_is_written_once(classes: int, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((5, 1, classes), generator)
    with each_written_once():
        launch(logits, labels, columns=padded(classes), bias=torch.zeros(classes))


@pytest.mark.parametrize("shape", [(17, 1, 5), (3, 3, 33), (2, 1, 8193)], ids=str)
def test_reads_nothing_beyond_the_bias(shape, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids(shape, generator)
    bias = torch.randn(shape[1] * shape[2], generator=generator)
    columns = padded(shape[2]) if shape[1] == 1 else None
    result = launch(logits, labels, columns=columns, bias=walled(bias))
    whole = logits + bias.view(shape[1:])
    assert_close(result, whole, labels, fields=STATISTICS)


def test_offsets_of_logits_are_64_bit(generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((3, 1, 5), generator)
    expected = launch(logits, labels, columns=8)
    far, out = Sparse(5), RowOutputs(*torch.empty(4, 1, 3))
    far.fill(logits[:, 0])
    assert far.matrix().stride(0) == STRIDE
    narrow = NarrowResiduals(torch.empty(3, 8, dtype=BF16), torch.empty(3))
    status = torch.full((4,), 3)
    residual_rows(far.matrix(), labels, classes=5, out=out, status=status, narrow=narrow)
    assert torch.equal(narrow.residual, expected.narrow)
    assert torch.equal(narrow.lost, expected.lost)


def test_no_rows(generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((0, 1, 10), generator)
    assert launch(logits, labels, columns=16, bias=torch.zeros(10)).narrow.shape == (0, 16)


def narrow_of(*shape: int, dtype: torch.dtype = BF16, rows: int = 4) -> NarrowResiduals:
    return NarrowResiduals(torch.zeros(shape, dtype=dtype), torch.zeros(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"narrow": narrow_of(4, 9)}, r"narrow.residual must be contiguous \(4, 10 to 16\)"),
        ({"narrow": narrow_of(4, 17)}, "narrow.residual must be contiguous"),
        ({"narrow": narrow_of(5, 16)}, "narrow.residual must be contiguous"),
        ({"narrow": NarrowResiduals(torch.zeros(16, 4, dtype=BF16).T, torch.zeros(4))},
         "narrow.residual must be contiguous"),
        ({"narrow": narrow_of(4, 16, dtype=torch.float32)}, "narrow.residual must be bfloat16"),
        ({"narrow": narrow_of(4, 16, rows=3)}, "narrow.lost must be"),
        ({"bias": torch.zeros(9)}, "bias must be"),
        ({"bias": torch.zeros(10, dtype=torch.float64)}, "bias must be"),
        ({"bias": torch.zeros(10), "loss": "mse"}, "bias and narrow go with cross_entropy"),
        ({"narrow": narrow_of(4, 16), "loss": "binary_cross_entropy"}, "bias and narrow go with"),
        ({"narrow": narrow_of(4, 8), "classes": 5}, "of one head; got .* for 2"),
    ],
)  # fmt: skip
def test_refused_arguments(options: dict, message: str) -> None:
    given = {"classes": 10, "loss": "cross_entropy"} | options
    heads = 10 // given["classes"]
    ids = given["loss"] == "cross_entropy"
    labels = torch.zeros(4, dtype=torch.int64) if ids else torch.zeros(4, 10)
    out = RowOutputs(*(torch.full((heads, 4), 7.0) for _ in range(4)))
    with pytest.raises(ValueError, match=message) as caught:
        residual_rows(torch.zeros(4, 10), labels, out=out, status=torch.full((4,), 4), **given)
    assert "\n" not in str(caught.value)
    assert all(bool((value == 7.0).all()) for value in out)
