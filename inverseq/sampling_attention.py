"""Attention over the paged cache of transformers' continuous batching, one sequence at a time.

transformers' own ``sdpa`` form lays the keys of all sequences end to end and masks what is another's: every query
multiplies every key of the batch, so a step costs (number of sequences)² instead of their number. Here each sequence's
queries meet its own keys only. On CUDA torch's var-len FlashAttention kernels do that in one launch; elsewhere
``scaled_dot_product_attention`` runs once per sequence. Attention in 16 bits on CUDA, any dtype elsewhere.

Left out: softcapped attention logits, attention sinks and dropout (all refused).
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention_varlen import Lengths, torch_varlen_function

__all__ = ["PAGED_ATTENTION_NAME", "paged_attention_is_supported"]

logger = logging.getLogger(__name__)

PAGED_ATTENTION_NAME = "inverseq_paged"


def paged_attention_is_supported() -> bool:
    """True where this transformers hands the paged cache to the attention function (5.23 does)."""
    return "cache" in inspect.signature(sdpa_attention_forward).parameters


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, head size], the new tokens of all sequences end to end
    key: Tensor,  # [1, H_kv, T, head size]
    value: Tensor,  # [1, H_kv, T, head size]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer in one step of continuous batching; transformers' attention-function signature.

    Writes the new keys and values to ``cache``, reads each sequence's own back, and returns [1, T, H, head size] and no
    attention weights. ``cu_seq_lens_q`` and ``cu_seq_lens_k`` bound the sequences. Raises ValueError for what would
    silently change the numbers.
    """
    cache = kwargs.pop("cache", None)
    if cache is None or attention_mask is not None:
        raise ValueError(f"{PAGED_ATTENTION_NAME!r} is for continuous batching: it takes a paged cache and no mask")
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: dropout, softcapping or sinks, which paged attention leaves out")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    cu_seqlens_q, cu_seqlens_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]  # [S + 1] int32
    window = kwargs.get("sliding_window")
    if query.is_cuda:
        lengths = (kwargs["max_length_q"], kwargs["max_length_k"])
        return _varlen(query, key, value, (cu_seqlens_q, cu_seqlens_k), lengths, scaling, window), None
    return _per_sequence(query, key, value, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scaling, window), None


def _per_sequence(query, key, value, cu_seqlens_q: list[int], cu_seqlens_k: list[int], scaling, window) -> Tensor:
    num_kv_heads, head_size = key.shape[1], query.shape[3]
    grouped = query.unflatten(1, (num_kv_heads, -1))  # [1, H_kv, groups, T, head size]
    out = torch.empty_like(grouped)
    for s in range(len(cu_seqlens_q) - 1):
        start, end = cu_seqlens_q[s], cu_seqlens_q[s + 1]
        keys = key[:, :, cu_seqlens_k[s] : cu_seqlens_k[s + 1]]
        values = value[:, :, cu_seqlens_k[s] : cu_seqlens_k[s + 1]]
        len_q, len_k = end - start, keys.shape[2]
        if len_q == 1 and not (window and len_k > window):
            # All heads of a group read the same keys: they are the rows of one small product, no key is copied.
            q = grouped[:, :, :, start]
            out[:, :, :, start] = F.scaled_dot_product_attention(q, keys, values, scale=scaling)
            continue
        q = grouped[:, :, :, start:end].reshape(1, -1, len_q, head_size)
        causal = {"is_causal": True}
        if len_q != len_k or (window and len_k > window):
            causal = {"attn_mask": _causal_mask(len_q, len_k, window, query.device)}
        one = F.scaled_dot_product_attention(q, keys, values, scale=scaling, enable_gqa=True, **causal)
        out[:, :, :, start:end] = one.unflatten(1, (num_kv_heads, -1))
    return out.flatten(1, 2).transpose(1, 2)


def _causal_mask(len_q: int, len_k: int, window: int | None, device) -> Tensor:
    """[len_q, len_k] bool; the last query sees the last key, and ``window`` keys back from itself."""
    query_position = torch.arange(len_k - len_q, len_k, device=device)[:, None]
    key_position = torch.arange(len_k, device=device)[None, :]
    mask = key_position <= query_position
    if window:
        mask &= key_position > query_position - window
    return mask


def _varlen(query, key, value, cu_seqlens: tuple[Tensor, Tensor], lengths: tuple[int, int], scaling, window) -> Tensor:
    _warn_never_verified()
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, head size]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = window if window and lengths[1] > window else None
    options = {"causal": True, "window": window, "scaling": scaling, "softcap": 0.0}
    return torch_varlen_function()(*rows, Lengths(*cu_seqlens, *lengths), **options)[0][None]


@functools.cache
def _warn_never_verified() -> None:
    logger.warning("paged attention through torch's varlen_attn has never been verified on a CUDA device")


AttentionInterface.register(PAGED_ATTENTION_NAME, paged_attention)
