r"""Second pass that computes residuals again: no tensor of rows x classes exists anywhere.

    z = h_i W_c^T + b_c        r = w (e^(z - top_i - log_sum_i) - eps / C), or r_y where c = y
    s = h_i G_c^T + gb_c       a_i = sum_c r s

for each of K heads: softmax cross-entropy with class ids, label smoothing eps and sample weight
w. The first pass left three numbers a row and head (``residual.SoftmaxState``): the largest
logit, the logarithm of the sum, and the label's residual, which is taken as it is: 1 - p_y would
lose every digit of a confident row.

W and G share the tile of features: one read of it feeds two products::

      row tile   h  | W_0^T | W_1^T | ..     z \
                    | G_0^T | G_1^T | ..     s  > r s, summed over the classes
                 classes ->                  r /

Work 4 n M D flops, M = K C (the second half of it replaces R, 8 bytes a class written and read);
traffic H once, W and G from L2. The classes are split among SPLITS programs as in
stored_alignment, whose self-term for operands rounded to bfloat16 holds here too.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .operands import (
    aligned,
    capability_major,
    check_matrix,
    check_vector,
    describe,
    input_precision,
    interpreted,
)
from .residual import SoftmaxState
from .stacked_alignment_kernel import stacked_alignment_kernel
from .stored_alignment import (
    Choice,
    SelfTerm,
    add_parts,
    check_operands,
    class_splits,
    fitting_tile,
)
from .tiles import Tile

# By the compiler's figures and the traffic model, not yet by a clock: the largest that compile
# without spills on sm_80, sm_90 and sm_100.
TILES = (
    Choice(True, True, Tile(128, 64, 64, 8, 3, 216, 100352, "HGMMA")),
    Choice(True, True, Tile(128, 128, 32, 8, 2, 255, 50176, "HGMMA"), (9,)),
    Choice(True, True, Tile(128, 128, 64, 8, 2, 255, 99328, "HGMMA"), (10,)),
    Choice(True, False, Tile(64, 32, 32, 8, 3, 192, 18432, "HGMMA")),
    Choice(False, True, Tile(64, 32, 32, 8, 3, 192, 43008, "HGMMA")),
    Choice(False, True, Tile(64, 64, 32, 8, 3, 255, 67584, "HGMMA"), (9, 10)),
    Choice(False, False, Tile(64, 32, 16, 8, 3, 192, 24576, "HGMMA")),
)


def stacked_alignment(
    features: Tensor,
    weight: Tensor,
    mean_grad: Tensor,
    labels: Tensor,
    softmax: SoftmaxState,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    mean_bias_grad: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    self_term: SelfTerm | None = None,
    precision: str = "highest",
    tile: Tile | None = None,
) -> None:
    """Write <g_i, G> of every row and head to ``out``, from the softmax that the first pass left.

    Equals, but for rounding, with K = out.shape[0] and C = M / K::

        z = (features @ weight.T + bias).view(n, K, C)
        p = torch.exp(z - softmax.top.T[..., None] - softmax.log_sum.T[..., None])
        residual = sample_weight[:, None, None] * (p - label_smoothing / C)
        residual[torch.arange(n), :, labels] = softmax.label_residual.T
        projected = (features @ mean_grad.T + mean_bias_grad).view(n, K, C)
        out.copy_((residual * projected).sum(-1).T)  # 0 where softmax.top is NaN

    Allocates (K, S, n) float32 where S > 1 programs share the classes (``class_splits``).
    Never synchronises.

    Parameters
    ----------
    features
        (n, D) float32, bfloat16 or float16, unit column stride, any row stride. Anything at all
        may stand in rows whose ``softmax.top`` is NaN.
    weight
        (M, D), M = K C, in the dtype of ``mean_grad``, unit column stride.
    mean_grad
        (M, D), unit column stride: bfloat16, for bfloat16 features, has both products take
        bfloat16 operands; float32, float32 operands in ``precision``.
    labels
        (n,) integer class ids, contiguous; within [0, C) where ``softmax.top`` is not NaN.
    softmax
        What ``residual_rows`` left: (K, n) float32 each, unit stride along the rows, one head
        stride. A log-sum-exp from elsewhere can stand in ``top``, with ``log_sum`` 0.
    out
        (K, n) float32, unit stride along the rows, any head stride; overwritten.
    bias, mean_bias_grad
        (M,) float32, contiguous; None: no bias.
    label_smoothing
        eps in [0, 1), that of the first pass.
    sample_weight
        (n,) float32, contiguous: that of the first pass.
    self_term
        With bfloat16 operands: add what the rounding of the residuals took from each row's
        product with itself. Not for rows that are parts of a longer sample.
    precision
        Of float32 operands: ``"highest"`` and ``"high"`` float32-accurate, ``"medium"`` tf32.
    tile
        One of ``TILES``, or None for ``choose_tile``'s.

    Raises
    ------
    ValueError
        A shape, stride, dtype or device other than the above; labels that are not class ids.
    """
    rounded = check_operands(features, mean_grad, out, precision, self_term)
    rows, dim, heads = *features.shape, out.shape[0]
    device, columns = features.device, mean_grad.shape[0]
    check_matrix("weight", weight, (columns, dim), (mean_grad.dtype,), device)
    check_vector("bias", bias, columns, torch.float32, device)
    check_vector("mean_bias_grad", mean_bias_grad, columns, torch.float32, device)
    check_vector("sample_weight", sample_weight, rows, torch.float32, device)
    _check_labels(labels, rows, device)
    _check_state(softmax, heads, rows, device)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
    if rows == 0:
        return
    classes = columns // heads
    if tile is None:
        is_aligned = all(aligned(matrix) for matrix in (features, weight, mean_grad))
        tile = choose_tile(classes, rounded, is_aligned, capability_major(device))
    splits = class_splits(rows, heads, classes, dim * features.element_size(), tile)
    parts = out if splits == 1 else torch.empty(heads * splits, rows, device=device)
    with torch.cuda.device_of(features):
        stacked_alignment_kernel[(triton.cdiv(rows, tile.rows) * heads * splits,)](
            features,
            weight,
            mean_grad,
            bias,
            mean_bias_grad,
            labels,
            *softmax,
            sample_weight,
            *(self_term[:2] if self_term else (None, None)),
            parts,
            rows=rows,
            part_stride=parts.stride(0),
            state_stride=softmax.top.stride(0),
            smoothing_share=label_smoothing / classes,
            HEADS=heads,
            CLASSES=classes,
            DIM=dim,
            FEATURE_STRIDE=features.stride(0),
            WEIGHT_STRIDE=weight.stride(0),
            GRAD_STRIDE=mean_grad.stride(0),
            SPLITS=splits,
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DIM=tile.dim,
            ROUND=rounded,
            PRECISION=input_precision(precision),
            UPCAST=interpreted(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # named, since Triton 3.10 changes the default
        )
    add_parts(parts, out, splits)


def choose_tile(classes: int, rounded: bool, aligned: bool = True, major: int = 8) -> Tile:
    """Return the tile for C = ``classes``: the smallest that holds all, else the largest.

    ``rounded``: bfloat16 operands, else float32; ``aligned``: rows of all operands begin at
    multiples of 16 bytes; ``major``: compute capability.
    """
    return fitting_tile(TILES, classes, rounded, aligned, major)


def _check_labels(labels: Tensor, rows: int, device: torch.device) -> None:
    ids = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (rows,) or not ids or not labels.is_contiguous():
        raise ValueError(
            f"labels must be contiguous ({rows},) integer class ids; got {describe(labels)}"
        )
    if labels.device != device:
        raise ValueError(f"labels must be on {device} with features, got {labels.device}")


def _check_state(softmax: SoftmaxState, heads: int, rows: int, device: torch.device) -> None:
    for name, value in softmax._asdict().items():
        if value.shape != (heads, rows) or value.dtype != torch.float32:
            raise ValueError(
                f"softmax.{name} must be {(heads, rows)} float32; got {describe(value)}"
            )
        if (rows > 1 and value.stride(1) != 1) or value.stride(0) != softmax.top.stride(0):
            raise ValueError(
                f"softmax.{name} must have unit row stride and the head stride of softmax.top; "
                f"got strides {value.stride()}"
            )
        if value.device != device:
            raise ValueError(
                f"softmax.{name} must be on {device} with features, got {value.device}"
            )
