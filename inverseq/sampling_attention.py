"""Attention over the paged cache of transformers' continuous batching, one sequence at a time.

transformers' own ``sdpa`` form lays the keys of all sequences end to end and masks what is another's: every query
multiplies every key of the batch, so a step costs (number of sequences)² instead of their number. Here each sequence's
queries meet its own keys only. On CUDA torch's var-len FlashAttention kernels do that in one launch (flash-attn's where
attention logits are capped, which torch's cannot); elsewhere each sequence is one product of its own.

transformers' forms do not cap attention logits: its ``paged|eager`` drops the cap without a word.

Left out: attention sinks and dropout (both refused).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention import AttentionNeeds, cannot_serve
from .attention_sdpa import causal_mask, softcapped_attention
from .attention_varlen import Lengths, flash_attn_function, torch_varlen_function

__all__ = ["PAGED_ATTENTION_NAME", "needs_paged_attention", "paged_attention_is_supported"]

logger = logging.getLogger(__name__)

PAGED_ATTENTION_NAME = "inverseq_paged"


def paged_attention_is_supported() -> bool:
    """True where this transformers hands the paged cache to the attention function (5.23 does)."""
    return "cache" in inspect.signature(sdpa_attention_forward).parameters


def needs_paged_attention(model: PreTrainedModel) -> bool:
    """True where transformers has no right form for continuous batching: it caps no attention logits (Gemma 2)."""
    return bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None)) or not model._supports_sdpa


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
    if dropout or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: dropout or attention sinks, which paged attention leaves out")
    key, value, cu_seqlens_k = _with_cached(module, cache, key, value, kwargs)
    cu_seqlens_q = kwargs["cu_seq_lens_q"]  # [S + 1] int32, as cu_seqlens_k
    window, softcap = kwargs.get("sliding_window") or None, kwargs.get("softcap") or None
    kernel = _varlen_kernel(query, value, softcap)
    if kernel is not None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, kwargs["max_length_q"], kwargs["max_length_k"])
        return _varlen(kernel, (query, key, value), lengths, scaling, window, softcap), None
    bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return _per_sequence(query, key, value, bounds, scaling, window, softcap), None


def _with_cached(module: nn.Module, cache, key: Tensor, value: Tensor, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of every sequence, new and cached, end to end, [1, H_kv, T_k, head size], and its bounds."""
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        return key, value, kwargs["cu_seq_lens_k"]
    # Releases before 5.23 take the indices apart, lay the heads behind the tokens and name the bounds by kind of layer.
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    for length in ("max_seqlen_q", "max_seqlen_k"):
        kwargs[length.replace("seqlen", "length")] = _of_kind(kwargs[length], kind)
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], _of_kind(kwargs["cu_seq_lens_k"], kind)


def _of_kind(values, kind: str):
    return values[kind] if isinstance(values, dict) else values


def _per_sequence(query, key, value, bounds: tuple[list[int], list[int]], scaling, window, softcap) -> Tensor:
    (cu_seqlens_q, cu_seqlens_k), num_kv_heads, head_size = bounds, key.shape[1], query.shape[3]
    grouped = query.unflatten(1, (num_kv_heads, -1))  # [1, H_kv, groups, T, head size]
    out = torch.empty_like(grouped)
    for s in range(len(cu_seqlens_q) - 1):
        start, end = cu_seqlens_q[s], cu_seqlens_q[s + 1]
        keys = key[:, :, cu_seqlens_k[s] : cu_seqlens_k[s + 1]]
        values = value[:, :, cu_seqlens_k[s] : cu_seqlens_k[s + 1]]
        len_q, len_k = end - start, keys.shape[2]
        if softcap:
            q = grouped[:, :, :, start:end]
            one = softcapped_attention(q, keys[:, :, None], values[:, :, None], scaling, window, softcap)
            out[:, :, :, start:end] = one
            continue
        if len_q == 1 and not (window and len_k > window):
            # All heads of a group read the same keys: they are the rows of one small product, no key is copied.
            q = grouped[:, :, :, start]
            out[:, :, :, start] = F.scaled_dot_product_attention(q, keys, values, scale=scaling)
            continue
        q = grouped[:, :, :, start:end].reshape(1, -1, len_q, head_size)
        causal = {"is_causal": True}
        if len_q != len_k or (window and len_k > window):
            causal = {"attn_mask": causal_mask(len_q, len_k, window, query.device)}
        one = F.scaled_dot_product_attention(q, keys, values, scale=scaling, enable_gqa=True, **causal)
        out[:, :, :, start:end] = one.unflatten(1, (num_kv_heads, -1))
    return out.flatten(1, 2).transpose(1, 2)


def _varlen_kernel(query: Tensor, value: Tensor, softcap: float | None) -> Callable | None:
    """The kernel that takes all sequences in one launch; None on a CPU, and on CUDA where none serves."""
    if not query.is_cuda:
        return None
    needs = AttentionNeeds("cuda", query.dtype, query.shape[-1], value.shape[-1], softcap=bool(softcap))
    reasons = {name: cannot_serve(name, needs) for name in ("varlen", "flash_attn")}
    if not reasons["varlen"]:
        return torch_varlen_function()
    if not reasons["flash_attn"]:
        return flash_attn_function()
    _warn_once(f"sampling attends to one sequence at a time, which is slow: {'; '.join(reasons.values())}")
    return None


def _varlen(kernel: Callable, tensors: tuple[Tensor, ...], lengths: Lengths, scaling, window, softcap) -> Tensor:
    _warn_once("paged attention through var-len kernels has never been verified on a CUDA device")
    rows = [tensor[0].transpose(0, 1) for tensor in tensors]  # [T, H, head size]
    scaling = rows[0].shape[-1] ** -0.5 if scaling is None else scaling
    window = window if window and lengths.max_seqlen_k > window else None
    options = {"causal": True, "window": window, "scaling": scaling, "softcap": softcap or 0.0}
    return kernel(*rows, lengths, **options)[0][None]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


AttentionInterface.register(PAGED_ATTENTION_NAME, paged_attention)
