"""Packed, padding-free causal attention under one registered name, for every model and device.

A model whose attention implementation is ``ATTENTION_NAME`` is called with ``layout=attention_layout(pack)``; each
sequence of the pack attends to itself, and to its parent sequence when a shared prefix was emitted once. Nothing is
padded and no [T, T] mask is built. On CUDA the var-len FlashAttention kernels inside torch serve; elsewhere
``scaled_dot_product_attention`` runs once per sequence. transformers builds no mask for a name that has no mask
function, so a forward costs no synchronisation here.

Left out: attention sinks and, on CUDA, logit softcapping (both are refused).
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from .records import PackedViews

__all__ = ["ATTENTION_NAME", "AttentionLayout", "attention_layout"]

logger = logging.getLogger(__name__)

ATTENTION_NAME = "inverseq_varlen"


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where each sequence's queries and keys stand; made on the host once per pack, used by every layer."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]  # own length plus the parent's
    cu_seqlens_q: Tensor  # [S + 1] int32
    cu_seqlens_k: Tensor  # [S + 1] int32
    key_index: Tensor | None  # [T_k] int64, None when keys are the pack's own tokens in order


def attention_layout(pack: PackedViews) -> AttentionLayout:
    """The attention layout of a pack on the pack's device."""
    parents = pack.parent_seq.tolist()
    device = pack.input_ids.device
    if all(parent < 0 for parent in parents):
        return AttentionLayout(pack.seqlens, pack.seqlens, pack.cu_seqlens, pack.cu_seqlens, None)
    starts = [0]
    for length in pack.seqlens:
        starts.append(starts[-1] + length)
    pieces, seqlens_k = [], []
    for s, parent in enumerate(parents):
        if parent >= 0:
            assert parent < s and parents[parent] < 0, "a parent is an earlier sequence without a parent"
            pieces.append(torch.arange(starts[parent], starts[parent + 1]))
        pieces.append(torch.arange(starts[s], starts[s + 1]))
        seqlens_k.append(pack.seqlens[s] + (pack.seqlens[parent] if parent >= 0 else 0))
    cu_seqlens_k = torch.tensor([0, *seqlens_k], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return AttentionLayout(
        seqlens_q=pack.seqlens,
        seqlens_k=tuple(seqlens_k),
        cu_seqlens_q=pack.cu_seqlens,
        cu_seqlens_k=cu_seqlens_k.to(device, non_blocking=True),
        key_index=torch.cat(pieces).to(device, non_blocking=True),
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, head size]
    key: Tensor,  # [1, H_kv, T, head size]
    value: Tensor,  # [1, H_kv, T, head size]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer over a pack; transformers' attention-function signature.

    Returns [1, T, H, head size] and no attention weights. Raises ValueError for what would silently change the
    numbers: no layout, a padded batch, attention dropout, attention sinks, softcapping on CUDA.
    """
    if layout is None or query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(f"{ATTENTION_NAME!r} takes one packed row, layout=attention_layout(pack) and no mask")
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks, which packed attention does not support")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; packed attention supports 0 only (config.attention_dropout)")
    if layout.key_index is not None:
        key, value = key[:, :, layout.key_index], value[:, :, layout.key_index]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if softcap:
            raise ValueError(f"{type(module).__name__} caps its attention logits, which torch's varlen_attn cannot do")
        return _varlen_attention(query, key, value, layout, scaling, sliding_window), None
    return _per_sequence_attention(query, key, value, layout, scaling, sliding_window, softcap), None


def _varlen_attention(query, key, value, layout: AttentionLayout, scaling, sliding_window) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    _warn_never_verified()
    # torch 2.10 takes is_causal, later releases express it as a window; (W − 1, 0) sees W keys.
    if "window_size" in inspect.signature(varlen_attn).parameters:
        causal = {"window_size": (sliding_window - 1 if sliding_window else -1, 0)}
    elif sliding_window and max(layout.seqlens_k) > sliding_window:
        raise ValueError(f"sequences longer than the sliding window {sliding_window} need a newer torch")
    else:
        causal = {"is_causal": True}
    if query.shape[1] != key.shape[1]:
        causal["enable_gqa"] = True
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        max(layout.seqlens_q),
        max(layout.seqlens_k),
        scale=scaling,
        **causal,
    )
    return out[None]


@functools.cache
def _warn_never_verified() -> None:
    logger.warning("attention through torch's varlen_attn has never been verified on a CUDA device by this project")


def _per_sequence_attention(query, key, value, layout: AttentionLayout, scaling, sliding_window, softcap) -> Tensor:
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
        windowed = bool(sliding_window) and len_k > sliding_window
        if softcap:
            outs.append(_softcapped_attention(q, k, v, scaling, sliding_window, softcap))
        elif len_q == len_k and not windowed:
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        else:
            mask = _causal_mask(len_q, len_k, sliding_window, q.device)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(outs, dim=2).transpose(1, 2)


def _softcapped_attention(q, k, v, scaling, sliding_window, softcap: float) -> Tensor:
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)


def _causal_mask(len_q: int, len_k: int, sliding_window: int | None, device) -> Tensor:
    """[len_q, len_k] bool; the last query sees the last key."""
    query_position = torch.arange(len_k - len_q, len_k, device=device)[:, None]
    key_position = torch.arange(len_k, device=device)[None, :]
    mask = key_position <= query_position
    if sliding_window:
        mask &= key_position > query_position - sliding_window
    return mask


AttentionInterface.register(ATTENTION_NAME, packed_attention)
