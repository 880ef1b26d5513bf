"""Packed attention by ``scaled_dot_product_attention``, one call per sequence: what serves on a CPU, in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_layout import AttentionLayout

__all__ = ["causal_mask", "sdpa_attention", "softcapped_attention"]


def sdpa_attention(
    query: Tensor,  # [1, H, T, head size]
    key: Tensor,  # [1, H_kv, T, head size]
    value: Tensor,  # [1, H_kv, T, head size]
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each sequence to itself and its prefix, [1, T, H, head size]."""
    if layout.key_index is not None:
        key, value = key[:, :, layout.key_index], value[:, :, layout.key_index]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outs = []
    for q, k, v in zip(
        query.split(layout.seqlens_q, dim=2),
        key.split(layout.seqlens_k, dim=2),
        value.split(layout.seqlens_k, dim=2),
        strict=True,
    ):
        len_q, len_k = q.shape[2], k.shape[2]
        windowed = window is not None and len_k > window
        if softcap:
            outs.append(softcapped_attention(q, k, v, scaling, window, softcap))
        elif len_q == len_k and not windowed:
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        else:
            mask = causal_mask(len_q, len_k, window, q.device)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(outs, dim=2).transpose(1, 2)


def softcapped_attention(
    q: Tensor,  # [..., len_q, head size]
    k: Tensor,  # [..., len_k, head size]
    v: Tensor,  # [..., len_k, head size]
    scaling: float | None,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Causal attention in fp32 whose scores are capped, softcap·tanh(score/softcap), [..., len_q, head size]."""
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    mask = causal_mask(q.shape[-2], k.shape[-2], window, q.device)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)


def causal_mask(len_q: int, len_k: int, window: int | None, device: torch.device) -> Tensor:
    """[len_q, len_k] bool; the last query sees the last key, and ``window`` keys back from itself."""
    query_position = torch.arange(len_k - len_q, len_k, device=device)[:, None]
    key_position = torch.arange(len_k, device=device)[None, :]
    mask = key_position <= query_position
    if window is not None:
        mask &= key_position > query_position - window
    return mask
