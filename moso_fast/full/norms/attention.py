"""nn.MultiheadAttention written out in linear layers, for self-attention and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def attention(
    linear: Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Compute what ``F.multi_head_attention_forward`` gives for (T, B, D) inputs.

    Returns NotImplemented for what is rare: projections of different widths, added keys and
    values, and a packed projection of inputs that are not the same tensor.
    """
    rare = (bias_k, bias_v, static_k, static_v)
    same = query is key and key is value
    if any(t is not None for t in rare) or add_zero_attn or use_separate_proj_weight or not same:
        return NotImplemented
    if query.dim() != 3 or in_proj_weight is None or (dropout_p and training):
        return NotImplemented
    length, batch, width = query.shape
    packed = linear(query, in_proj_weight, in_proj_bias)
    heads = packed.view(length, batch, 3, num_heads, width // num_heads).permute(2, 1, 3, 0, 4)
    q, k, v = heads.unbind(0)  # (B, heads, T, D / heads)
    mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, check_other=False)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, num_heads, *mask.shape[1:])
    padding = F._canonical_mask(
        key_padding_mask, "key_padding_mask", None, "", query.dtype, check_other=False
    )
    if padding is not None:
        padding = padding[:, None, None, :]
        mask = padding if mask is None else mask + padding
    scores = (q * (width // num_heads) ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    mixed = (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, width)
    result = linear(mixed, out_proj_weight, out_proj_bias)
    if not need_weights:
        return result, None
    return result, weights.mean(1) if average_attn_weights else weights
