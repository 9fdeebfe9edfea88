"""Launch of the residual kernels: which tile for how many classes, checks, pointers, strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moso_fast.core.status import STATUS_SLOTS

from .elementwise_residual import elementwise_residual_kernel
from .softmax_residual import softmax_residual_kernel


class RowOutputs(NamedTuple):
    """Statistics of n rows under K heads: (K, n) float32, unit stride along the rows."""

    loss: Tensor
    residual_sqnorm: Tensor
    margin: Tensor
    entropy: Tensor


class SoftmaxState(NamedTuple):
    """What residuals can be computed from again: (K, n) float32, unit stride along the rows.

    For c other than the label, r_c = w (e^(z_c - top - log_sum) - eps / C). ``top`` is the largest
    logit and ``log_sum`` the logarithm of sum e^(z - top); their sum, the log-sum-exp, would round
    away what logits of 1e4 tell. Both are NaN where a row does not count, and ``label_residual``
    (r_y as stored, from the other classes, never p - 1) is 0 there.
    """

    top: Tensor
    log_sum: Tensor
    label_residual: Tensor


class NarrowResiduals(NamedTuple):
    """Residuals of one head as matrix products want them, instead of those in place.

    ``residual`` (n, M) bfloat16, contiguous, M at least C: zeros behind the classes; rows of a
    multiple of 16 bytes are read fastest. ``lost`` (n,) float32, contiguous: |r|^2 less that of
    the rounded residual.
    """

    residual: Tensor
    lost: Tensor


@dataclass(frozen=True)
class RowConfig:
    """One tile, and the resources that every variant compiled for it keeps to.

    ``registers`` (a thread) and ``shared_bytes`` (a block) bound all variants on sm_80, sm_90 and
    sm_100 in Triton 3.6 and newer, and none spills: test_triton_aot.py compiles and looks.
    """

    max_classes: int | None  # serves up to this many classes; None: any number
    block_rows: int
    block_classes: int
    num_warps: int
    registers: int
    shared_bytes: int


# Chosen by the compiler's figures and the traffic model, not yet by a clock. Rows of up to 8192
# classes stay in registers (16384 would spill). Longer rows: few blocks a multiprocessor, so that
# the rows in flight still lie in L2 when they are walked again (132 rows of 50,257 logits: 27 MB).
# A tile holds no fewer elements than the block has threads: no logit is held by two threads.
_ONE_TILE = (
    RowConfig(4, 256, 4, 4, 168, 2048),
    RowConfig(16, 64, 16, 4, 168, 1024),
    RowConfig(32, 16, 32, 4, 96, 1024),
    RowConfig(128, 8, 128, 4, 192, 1024),
    RowConfig(512, 2, 512, 4, 64, 1024),
    RowConfig(1024, 1, 1024, 4, 64, 1024),
    RowConfig(2048, 1, 2048, 8, 80, 1024),
)
_LONGEST = RowConfig(8192, 1, 8192, 32, 64, 1024)
IDS_CONFIGS = (
    *_ONE_TILE,
    RowConfig(4096, 1, 4096, 16, 72, 1024),
    _LONGEST,
    RowConfig(None, 1, 4096, 16, 128, 1024),
)
# The shapes that neither Triton 3.6 nor 3.9 spills a register for; each alone allows more.
SOFT_CONFIGS = (
    *_ONE_TILE,
    RowConfig(4096, 1, 4096, 32, 64, 1024),
    _LONGEST,
    RowConfig(None, 1, 2048, 16, 112, 1024),
)
# Narrow residuals: 16 bytes of them are twice the lanes of 16 bytes of logits, and a tile that
# leaves a thread fewer pays for moving logits between threads. On an H200, 100 classes: 8 x 128
# with 4 warps took three times as long as 16 x 128 with 8 (32 x 128 with 16 is the same work a
# warp, and spills nowhere). 1000: 1 x 1024 with 4 a quarter longer than with 2. 128,256: 1 x 4096
# with 16 a third longer than 1 x 2048 with 8.
NARROW_CONFIGS = (
    _ONE_TILE[1],
    RowConfig(128, 32, 128, 16, 64, 1024),
    RowConfig(256, 4, 256, 4, 128, 4096),
    RowConfig(512, 1, 512, 1, 128, 1024),
    RowConfig(1024, 1, 1024, 2, 128, 1024),
    RowConfig(2048, 1, 2048, 4, 128, 1024),
    RowConfig(4096, 1, 4096, 8, 128, 1024),
    RowConfig(8192, 1, 8192, 16, 128, 1024),
    RowConfig(None, 1, 2048, 8, 128, 1024),
)
ELEMENTWISE_CONFIGS = (
    RowConfig(4, 256, 4, 4, 128, 1024),
    RowConfig(32, 32, 32, 4, 128, 1024),
    RowConfig(None, 4, 256, 4, 128, 1024),
)


def choose_config(
    classes: int, *, loss: str = "cross_entropy", soft: bool = False, narrow: bool = False
) -> RowConfig:
    """Return the tile for C = ``classes``: the smallest that holds a row, else one that loops."""
    if narrow:
        configs = NARROW_CONFIGS
    elif loss != "cross_entropy":
        configs = ELEMENTWISE_CONFIGS
    else:
        configs = SOFT_CONFIGS if soft else IDS_CONFIGS
    return next(c for c in configs if c.max_classes is None or classes <= c.max_classes)


def residual_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    classes: int,
    out: RowOutputs,
    status: Tensor,
    first_row: int = 0,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    counted: Tensor | None = None,
    softmax: SoftmaxState | None = None,
    bias: Tensor | None = None,
    narrow: NarrowResiduals | None = None,
    config: RowConfig | None = None,
) -> None:
    """Overwrite logits by residuals dloss/dlogits and write the statistics of every row.

    Equals, with ``moso_fast.core.losses.row_statistics``::

        stats = row_statistics(logits.view(n, -1, classes), labels, loss=loss, ...)
        logits.copy_(stats.residual.view(n, -1))
        for given, value in zip(out, stats[1:]):
            given.copy_(value.T)

    A row that does not count (its label is ``ignore_index``, or ``counted`` says so) gets
    residual 0 and NaN statistics, and so does a row with a label out of range or, for
    cross-entropy, a non-finite logit.

    Parameters
    ----------
    logits
        (n, K * C) float32, unit stride along the columns, any row stride; overwritten.
    labels
        (n,) integer class ids, contiguous, shared by the heads; or (n, C) targets of any real
        dtype with unit column stride: probabilities for ``"cross_entropy"``, and the only form
        for ``"binary_cross_entropy"`` and ``"mse"``.
    classes
        C.
    out
        Where the statistics go.
    status
        (STATUS_SLOTS,) int64, lowered to ``first_row`` + the smallest row with a label out of
        range, a bad target, or a non-finite logit or result (slots as in ``moso_fast.problem``).
    first_row
        What row 0 is called in ``status``.
    loss, label_smoothing, ignore_index
        As in ``moso_fast.last_layer_stats``.
    sample_weight
        (n,) float32, contiguous: factors on loss and residual.
    counted
        (n,) bool, contiguous: rows that count; None: all.
    softmax
        Where to leave what ``stacked_alignment`` computes residuals from; cross-entropy with
        class ids only. Strides as in ``out``.
    bias
        (K * C,) float32, contiguous, added to the logits; None: they have it. Cross-entropy only.
    narrow
        Where the residuals of one head go; the logits stay then. Cross-entropy only.
    config
        A tile, or None for ``choose_config``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above, or an unknown loss.
    """
    soft = labels.dim() == 2
    rows, heads = _check(logits, labels, classes, out, status, loss)
    if softmax is not None:
        if soft or loss != "cross_entropy":
            raise ValueError("softmax goes with cross_entropy and labels that are class ids")
        _check_outputs("softmax", softmax, rows, heads, out.loss.stride(0), logits.device)
    _check_vector("sample_weight", sample_weight, rows, torch.float32, logits.device)
    _check_vector("counted", counted, rows, torch.bool, logits.device)
    if loss != "cross_entropy" and (bias is not None or narrow is not None):
        raise ValueError(f"bias and narrow go with cross_entropy; got {loss}")
    _check_vector("bias", bias, logits.shape[1], torch.float32, logits.device)
    if config is None:
        config = choose_config(classes, loss=loss, soft=soft, narrow=narrow is not None)
    if narrow is not None:
        _check_narrow(narrow, rows, heads, classes, config, logits.device)
    if rows == 0:
        return
    items = rows * heads
    grid = (triton.cdiv(items, config.block_rows),)
    arguments = dict(
        items=items,
        first_row=first_row,
        row_stride=logits.stride(0),
        target_stride=labels.stride(0),
        head_stride=out.loss.stride(0),
        HEADS=heads,
        CLASSES=classes,
        BLOCK_ROWS=config.block_rows,
        BLOCK_CLASSES=config.block_classes,
        CONTIGUOUS=logits.stride(0) == heads * classes,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
    )
    tensors = (logits, labels, sample_weight, counted, *out, status)
    with torch.cuda.device_of(logits):
        if loss == "cross_entropy":
            softmax_residual_kernel[grid](
                *tensors,
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                SOFT=soft,
                SMOOTH=label_smoothing != 0.0,
                softmax_top=softmax.top if softmax else None,
                softmax_log_sum=softmax.log_sum if softmax else None,
                label_residual=softmax.label_residual if softmax else None,
                bias=bias,
                narrow=narrow.residual if narrow else None,
                lost=narrow.lost if narrow else None,
                COLUMNS=narrow.residual.shape[1] if narrow else 0,
                **arguments,
            )
        else:
            elementwise_residual_kernel[grid](
                *tensors, BINARY=loss == "binary_cross_entropy", **arguments
            )


def _check(
    logits: Tensor, labels: Tensor, classes: int, out: RowOutputs, status: Tensor, loss: str
) -> tuple[int, int]:
    """Return (n, K), or raise ValueError naming what the kernels cannot address."""
    if loss not in ("cross_entropy", "binary_cross_entropy", "mse"):
        raise ValueError(f"loss must be cross_entropy, binary_cross_entropy or mse; got {loss!r}")
    if logits.dim() != 2 or logits.dtype != torch.float32 or classes < 1:
        raise ValueError(
            f"logits must be (n, K * C) float32 with C = classes >= 1; got {_describe(logits)} "
            f"and classes = {classes}"
        )
    rows, columns = logits.shape
    if columns == 0 or columns % classes:
        raise ValueError(f"logits have {columns} columns, not a multiple of {classes} classes")
    heads = columns // classes
    if (columns > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < columns):
        raise ValueError(
            f"logits must have unit column stride and rows apart; got strides {logits.stride()}"
        )
    ids = loss == "cross_entropy" and labels.dim() == 1
    shape = (rows,) if ids else (rows, classes)
    if tuple(labels.shape) != shape or labels.is_complex():
        raise ValueError(f"labels must have shape {shape} for {loss}; got {_describe(labels)}")
    if ids and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels of shape (n,) must be integers; got {_describe(labels)}")
    if labels.shape[-1] > 1 and labels.stride(-1) != 1:
        raise ValueError(
            f"labels must have unit stride along their last axis; got {labels.stride()}"
        )
    _check_outputs("out", out, rows, heads, out.loss.stride(0), logits.device)
    if status.dtype != torch.int64 or status.shape != (STATUS_SLOTS,) or not status.is_contiguous():
        raise ValueError(f"status must be ({STATUS_SLOTS},) int64; got {_describe(status)}")
    for name, value in (("labels", labels), ("status", status)):
        if value.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device} with logits, got {value.device}")
    return rows, heads


def _check_narrow(
    narrow: NarrowResiduals,
    rows: int,
    heads: int,
    classes: int,
    config: RowConfig,
    device: torch.device,
) -> None:
    """Raise ValueError unless the residuals of one head fit there."""
    residual, lost = narrow
    walked = config.block_classes * triton.cdiv(classes, config.block_classes)
    fits = residual.dim() == 2 and residual.shape[0] == rows and heads == 1
    if not fits or not classes <= residual.shape[1] <= walked or not residual.is_contiguous():
        raise ValueError(
            f"narrow.residual must be contiguous ({rows}, {classes} to {walked}) and of one head; "
            f"got {_describe(residual)} for {heads}"
        )
    if residual.dtype != torch.bfloat16 or residual.device != device:
        raise ValueError(f"narrow.residual must be bfloat16 on {device}; got {_describe(residual)}")
    _check_vector("narrow.lost", lost, rows, torch.float32, device)


def _check_outputs(
    group: str,
    outputs: RowOutputs | SoftmaxState,
    rows: int,
    heads: int,
    head_stride: int,
    device: torch.device,
) -> None:
    for name, value in outputs._asdict().items():
        if value.shape != (heads, rows) or value.dtype != torch.float32:
            raise ValueError(
                f"{group}.{name} must be {(heads, rows)} float32; got {_describe(value)}"
            )
        if (rows > 1 and value.stride(1) != 1) or value.stride(0) != head_stride:
            raise ValueError(
                f"{group}.{name} must have unit row stride and the head stride of out.loss; "
                f"got strides {value.stride()}"
            )
        if value.device != device:
            raise ValueError(f"{group}.{name} must be on {device} with logits, got {value.device}")


def _check_vector(
    name: str, value: Tensor | None, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    if value is None:
        return
    if value.shape != (rows,) or value.dtype != dtype or not value.is_contiguous():
        raise ValueError(f"{name} must be a contiguous ({rows},) {dtype}; got {_describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with logits, got {value.device}")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
