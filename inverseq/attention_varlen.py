"""Packed attention by var-len FlashAttention kernels: flash-attn's, or those inside torch.

Both take queries and keys laid end to end with cumulated lengths, and both can return the log-sum-exp of each query's
scores. With it a shared prefix needs no copy of its keys for every sequence: each sequence attends to itself, all of
them together attend to the prefix, and the two parts are merged exactly,

    out = σ(lse_own − lse_prefix) out_own + σ(lse_prefix − lse_own) out_prefix.

The kernels give no gradient for the log-sum-exp, so that is for forward passes alone; under grad, and where a sliding
window cuts into the prefix, the prefix's keys are repeated for every sequence instead.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_layout import AttentionLayout

__all__ = ["Lengths", "flash_attn_function", "torch_varlen_function", "varlen_attention"]

FLASH_ATTN_ARGUMENTS = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "return_attn_probs",
)  # fmt: skip


class Lengths(NamedTuple):
    """The sequences of one kernel call; the last query of a sequence stands at its last key."""

    cu_seqlens_q: Tensor  # [S + 1] int32
    cu_seqlens_k: Tensor  # [S + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_attention(
    kernel: Callable,
    query: Tensor,  # [1, H, T, head size]
    key: Tensor,  # [1, H_kv, T, head size]
    value: Tensor,  # [1, H_kv, T, head size]
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each sequence to itself and its prefix, [1, T, H, head size].

    ``kernel`` is ``flash_attn_function()`` or ``torch_varlen_function()``.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    attend = functools.partial(kernel, scaling=scaling, softcap=softcap or 0.0)
    if window is not None and window >= layout.max_seqlen_k:
        window = None
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if layout.prefixes is not None and window is None and not needs_grad:
        return _in_two_parts(attend, q, k, v, layout)[None]
    if layout.key_index is not None:
        k, v = k[layout.key_index], v[layout.key_index]
    lengths = Lengths(layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k)
    return attend(q, k, v, lengths, causal=True, window=window)[0][None]


def _in_two_parts(attend: Callable, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """[T, H, head size]; the prefixes' own rows come from the first part alone."""
    shared = layout.prefixes
    own = Lengths(layout.cu_seqlens_q, layout.cu_seqlens_q, layout.max_seqlen_q, layout.max_seqlen_q)
    to_prefix = Lengths(shared.cu_seqlens_q, shared.cu_seqlens_k, shared.max_seqlen_q, shared.max_seqlen_k)
    out_THD, lse = attend(q, k, v, own, causal=True, window=None)
    prefix_out, prefix_lse = attend(
        q[shared.rows], k[shared.prefix_rows], v[shared.prefix_rows], to_prefix, causal=False, window=None
    )
    own_lse_HT, prefix_lse_HT = checked_lse(lse, q)[:, shared.rows], checked_lse(prefix_lse, prefix_out)
    own_share = torch.sigmoid(own_lse_HT - prefix_lse_HT).T[..., None]
    merged = torch.lerp(prefix_out.float(), out_THD[shared.rows].float(), own_share)
    out_THD[shared.rows] = merged.to(out_THD.dtype)
    return out_THD


@functools.cache
def flash_attn_function() -> Callable:
    """flash-attn's var-len attention under this module's arguments.

    Raises ValueError when the package is absent, cannot be imported, or takes other arguments than version 2.6 to 2.8.
    """
    try:
        package = importlib.import_module("flash_attn")
        function = package.flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            raise ValueError(f"flash-attn cannot be imported: {error}") from error
        raise ValueError("flash-attn is not installed (pip install 'inverseq[flash-attn]')") from error
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"flash-attn cannot be imported: {error}") from error
    parameters = inspect.signature(function).parameters
    absent = [name for name in FLASH_ATTN_ARGUMENTS if name not in parameters]
    if absent:
        version = getattr(package, "__version__", "of unknown version")
        raise ValueError(f"flash-attn {version}: flash_attn_varlen_func does not take {', '.join(absent)}")

    def attend(q, k, v, lengths: Lengths, *, causal, window, scaling, softcap) -> tuple[Tensor, Tensor]:
        out, lse, _ = function(
            q,
            k,
            v,
            **lengths._asdict(),
            dropout_p=0.0,
            softmax_scale=scaling,
            causal=causal,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap,
            return_attn_probs=True,  # for the log-sum-exp; without dropout no probabilities are made
        )
        return out, lse

    return attend


@functools.cache
def torch_varlen_function() -> Callable:
    """``torch.nn.attention.varlen.varlen_attn`` under this module's arguments, for every signature it has had.

    torch 2.10 takes ``is_causal`` and scales by the head size alone; later releases say causality and window as
    ``window_size``, in which (W − 1, 0) sees W keys, and take ``scale``; the newest want ``enable_gqa`` for fewer heads
    of keys, which the kernels beneath have always taken (those of torch 2.11 expect (total_k, num_heads_k, head_size)).
    Raises ValueError when this torch has none, or one with arguments that no release had.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise ValueError(f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 and later)") from error
    parameters = inspect.signature(varlen.varlen_attn).parameters
    if "window_size" not in parameters and "is_causal" not in parameters:
        raise ValueError(f"torch {torch.__version__}: varlen_attn takes {', '.join(parameters)}; causality is unknown")

    def attend(q, k, v, lengths: Lengths, *, causal, window, scaling, softcap) -> tuple[Tensor, Tensor]:
        assert not softcap, "varlen_attn cannot cap attention logits"
        options = {"return_aux": varlen.AuxRequest(lse=True)}
        if "window_size" in parameters:
            options["window_size"] = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
        elif window is not None:
            raise ValueError(f"sequences are longer than the sliding window {window}: that needs torch ≥ 2.11")
        else:
            options["is_causal"] = causal
        if "scale" in parameters:
            options["scale"] = scaling
        else:
            q = q * (scaling * q.shape[-1] ** 0.5)
        if "enable_gqa" in parameters:  # the kernels take fewer heads of keys in every release
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return varlen.varlen_attn(q, k, v, *lengths, **options)

    return attend


def checked_lse(lse: Tensor, q: Tensor) -> Tensor:
    """The log-sum-exp as [H, T]; a padded one of older or other kernels is refused."""
    num_tokens, num_heads, _ = q.shape
    if lse.shape == (num_heads, num_tokens):
        return lse
    if lse.shape == (num_tokens, num_heads):
        return lse.T
    raise ValueError(
        f"the attention kernel returned a log-sum-exp of shape {tuple(lse.shape)}, expected {(num_heads, num_tokens)}: "
        "set packing.share_prefix=false"
    )
