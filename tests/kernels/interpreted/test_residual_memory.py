"""Addresses beyond 32 bits, empty chunks, and the arguments that a launch refuses."""

from __future__ import annotations

import pytest
import torch
from far_memory import STRIDE, Sparse, walled
from moso_fast.kernels.elementwise_residual import elementwise_residual_kernel
from moso_fast.kernels.residual import RowOutputs, residual_rows
from moso_fast.kernels.softmax_residual import softmax_residual_kernel
from residual_support import FIELDS, launch


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
def test_offsets_are_64_bit(loss: str, soft: bool, generator: torch.Generator) -> None:
    # Rows of logits and targets, and heads of the outputs, 2^31 - 64 elements apart.
    if loss == "binary_cross_entropy" and not soft:
        loss = "mse"
    heads, classes = 3, 5
    logits = torch.randn(3, heads, classes, generator=generator)
    ids = torch.randint(0, classes, (3,), generator=generator)
    targets = torch.softmax(torch.randn(3, classes, generator=generator), 1)
    hard = loss == "cross_entropy" and not soft
    expected = launch(logits, ids if hard else targets, loss=loss)

    data, far_targets = Sparse(heads * classes), Sparse(classes)
    outputs = [Sparse(3) for _ in RowOutputs._fields]
    data.fill(logits.reshape(3, -1))
    far_targets.fill(targets)
    status = torch.full((4,), 3)
    common = dict(
        items=9,
        first_row=0,
        row_stride=STRIDE,
        target_stride=STRIDE,
        head_stride=STRIDE,
        HEADS=heads,
        CLASSES=classes,
        BLOCK_ROWS=4,
        BLOCK_CLASSES=4 if hard or soft else 8,
        CONTIGUOUS=False,
    )
    tensors = (
        data.rows[0],
        ids if hard else far_targets.rows[0],
        None,
        None,
        *(output.rows[0] for output in outputs),
        status,
    )
    if loss == "cross_entropy":
        softmax_residual_kernel[(3,)](
            *tensors, ignore_index=-100, smoothing=0.0, SOFT=soft, SMOOTH=False, **common
        )
    else:
        elementwise_residual_kernel[(3,)](*tensors, BINARY=loss == "binary_cross_entropy", **common)
    assert status.tolist() == [3] * 4
    torch.testing.assert_close(data.stacked().view(3, heads, classes), expected.residual)
    for name, output in zip(RowOutputs._fields, outputs, strict=True):
        torch.testing.assert_close(
            output.stacked(), getattr(expected, name), equal_nan=True, msg=name
        )


@pytest.mark.parametrize(
    ("loss", "soft"),
    [("cross_entropy", False), ("cross_entropy", True), ("binary_cross_entropy", True)],
)
@pytest.mark.parametrize("shape", [(5, 2, 3), (3, 1, 33), (2, 1, 8193)], ids=str)
def test_reads_nothing_beyond_its_operands(
    shape: tuple[int, int, int], loss: str, soft: bool, generator: torch.Generator
) -> None:
    rows, heads, classes = shape
    logits = torch.randn(shape, generator=generator)
    labels = torch.full((rows,), classes - 1)
    labels[0] = -100
    if soft:
        labels = torch.softmax(torch.randn(rows, classes, generator=generator), 1)
    vectors = {
        "sample_weight": torch.rand(rows, generator=generator),
        "counted": torch.arange(rows) != rows - 2,
    }
    expected = launch(logits, labels, loss=loss, **vectors)
    data = walled(logits.reshape(rows, -1))
    outputs = [walled(torch.full((heads, rows), torch.nan)) for _ in RowOutputs._fields]
    residual_rows(
        data,
        walled(labels),
        classes=classes,
        out=RowOutputs(*outputs),
        status=walled(torch.full((4,), rows)),
        loss=loss,
        **{name: walled(value) for name, value in vectors.items()},
    )
    assert torch.equal(data.view(shape), expected.residual)
    for name, output in zip(RowOutputs._fields, outputs, strict=True):
        assert torch.equal(output.nan_to_num(7.0), getattr(expected, name).nan_to_num(7.0)), name


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_rows(loss: str) -> None:
    labels = torch.zeros(0, dtype=torch.int64) if loss == "cross_entropy" else torch.zeros(0, 5)
    result = launch(torch.zeros(0, 2, 5), labels, loss=loss)
    assert result.residual.shape == (0, 2, 5) and result.loss.shape == (2, 0)


def test_expanded_and_single_rows(generator: torch.Generator) -> None:
    # With one row torch leaves strides free: they must not be looked at.
    logits = torch.randn(1, 1, 7, generator=generator)
    expected = launch(logits, torch.tensor([3]))
    strange = logits[0].clone().as_strided((1, 7), (1, 1))
    out = RowOutputs(*(torch.empty(1, 1) for _ in RowOutputs._fields))
    status = torch.full((4,), 1)
    residual_rows(strange, torch.tensor([3]), classes=7, out=out, status=status)
    assert torch.equal(strange, expected.residual[0])
    for name in FIELDS[1:]:
        assert torch.equal(getattr(out, name), getattr(expected, name))


def arguments() -> dict:
    return {
        "logits": torch.zeros(4, 6),
        "labels": torch.zeros(4, dtype=torch.int64),
        "classes": 3,
        "out": RowOutputs(*(torch.zeros(2, 4) for _ in RowOutputs._fields)),
        "status": torch.full((4,), 4),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.zeros(4, 6, dtype=torch.float64), "float32"),
        ("logits", torch.zeros(4, 12)[:, ::2], "unit column stride"),
        ("logits", torch.zeros(1, 6).expand(4, 6), "rows apart"),
        ("classes", 4, "not a multiple of 4"),
        ("classes", 0, "classes = 0"),
        ("labels", torch.zeros(5, dtype=torch.int64), "labels must have shape"),
        ("labels", torch.zeros(4), "must be integers"),
        ("labels", torch.zeros(8, dtype=torch.int64)[::2], "unit stride"),
        ("labels", torch.zeros(4, 4), "labels must have shape"),
        ("labels", torch.zeros(4, dtype=torch.int64, device="meta"), "must be on cpu"),
        ("out", RowOutputs(*(torch.zeros(4, 2) for _ in range(4))), "out.loss must be"),
        ("out", RowOutputs(*(torch.zeros(4, 2).T for _ in range(4))), "unit row stride"),
        ("status", torch.zeros(4), "status must be"),
        ("sample_weight", torch.zeros(3), "sample_weight must be"),
        ("counted", torch.ones(4), "counted must be"),
        ("loss", "hinge", "got 'hinge'"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given = arguments()
    before = given["logits"].clone()
    given[name] = value
    with pytest.raises(ValueError, match=message) as caught:
        residual_rows(given.pop("logits"), given.pop("labels"), **given)
    assert "\n" not in str(caught.value)
    assert torch.equal(arguments()["logits"], before)
