"""Packed, padding-free causal attention under one registered name, for every model and device.

A model whose attention implementation is ``ATTENTION_NAME`` is called with ``layout=attention_layout(pack)``; each
sequence of the pack attends to itself, and to its parent sequence when a shared prefix was emitted once. Nothing is
padded, and transformers builds no mask for a name that has no mask function, so a forward costs no synchronisation
here. Behind the name stand four backends, chosen by ``choose_backend``:

    flash_attn  the flash-attn package                CUDA, 16-bit, head sizes that are multiples of 8 up to 256
    varlen      the FlashAttention kernels in torch   the same, without a cap on attention logits
    flex        FlexAttention                         CUDA; on a CPU uncompiled and without gradients
    sdpa        one call per sequence                 every device and dtype; what a CPU uses

Left out, and refused: attention sinks, attention that is not causal, dropout.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .attention_flex import flex_attention
from .attention_layout import AttentionLayout, attention_layout
from .attention_sdpa import sdpa_attention
from .attention_varlen import flash_attn_function, torch_varlen_function, varlen_attention

__all__ = [
    "ATTENTION_NAME",
    "BACKENDS",
    "AttentionLayout",
    "AttentionNeeds",
    "attention_layout",
    "backend_of",
    "check_backend",
    "choose_backend",
]

logger = logging.getLogger(__name__)

ATTENTION_NAME = "inverseq_varlen"
BACKENDS = ("flash_attn", "varlen", "flex", "sdpa")  # on CUDA the first that serves is taken
LARGEST_FLASH_HEAD, SMALLEST_FLEX_HEAD = 256, 16


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What decides whether a backend serves a layer."""

    device_type: str
    dtype: torch.dtype
    head_size: int  # of queries and keys
    value_head_size: int
    softcap: bool = False  # True: attention logits are capped
    needs_grad: bool = False
    capability: tuple[int, int] | None = None  # of the CUDA device


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError when ``model.attention=backend`` cannot serve on the device, whatever the model is."""
    if backend != "auto":
        needs = AttentionNeeds(device.type, dtype, 64, 64, needs_grad=True, capability=_capability(device))
        choose_backend(backend, needs)


def backend_of(model: PreTrainedModel) -> str:
    """The backend that serves a model's layers where it stands; ValueError when the one asked for cannot."""
    config, weight = model.config.get_text_config(), next(model.parameters())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needs = AttentionNeeds(
        device_type=weight.device.type,
        dtype=weight.dtype,
        head_size=head_size,
        value_head_size=head_size,
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        needs_grad=True,
        capability=_capability(weight.device),
    )
    return choose_backend(getattr(model, "packed_attention_backend", "auto"), needs)


@functools.cache
def choose_backend(backend: str, needs: AttentionNeeds) -> str:
    """The backend that serves a layer: the one asked for, or for ``auto`` the fastest that can.

    On a CPU, and for fp32 on CUDA, ``auto`` is sdpa. Needing gradients or not never changes what serves a model that is
    trained: policy and frozen models run the same. Raises ValueError when the one asked for cannot serve.
    """
    if backend != "auto":
        reason = cannot_serve(backend, needs)
        if reason:
            raise ValueError(f"model.attention={backend!r}: {reason}; use model.attention=auto")
        chosen, reasons = backend, {}
    elif needs.device_type != "cuda" or needs.dtype not in (torch.float16, torch.bfloat16):
        chosen, reasons = "sdpa", {}
    else:
        reasons = {name: cannot_serve(name, needs) for name in BACKENDS}
        chosen = next(name for name in BACKENDS if not reasons[name])
    if chosen in ("flex", "sdpa") and reasons:
        skipped = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        _warn_once(f"packed attention takes the slower {chosen} ({skipped})")
    if chosen == "varlen" and reasons and "not installed" not in reasons["flash_attn"]:
        _warn_once(f"packed attention takes torch's kernels: {reasons['flash_attn']}")
    if needs.device_type == "cuda" and chosen != "sdpa":
        _warn_once(f"attention through {chosen} has never been verified on a CUDA device by this project")
    return chosen


def cannot_serve(backend: str, needs: AttentionNeeds) -> str:
    """Why the backend cannot serve; empty when it can."""
    if backend == "sdpa":
        return ""
    if backend == "flex":
        if needs.device_type != "cuda":
            return "FlexAttention has no gradients on a CPU" if needs.needs_grad else ""
        small = min(needs.head_size, needs.value_head_size) < SMALLEST_FLEX_HEAD
        return f"heads of {needs.head_size} are below FlexAttention's {SMALLEST_FLEX_HEAD}" if small else ""
    if needs.device_type != "cuda":
        return "it needs a CUDA device"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(needs.dtype).removeprefix('torch.')}"
    if needs.capability is not None and needs.capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {needs.capability[0]}.{needs.capability[1]}"
    if needs.value_head_size != needs.head_size:
        return f"heads of {needs.head_size} with values of {needs.value_head_size}"
    if needs.head_size % 8 or needs.head_size > LARGEST_FLASH_HEAD:
        return f"heads of {needs.head_size}; it takes multiples of 8 up to {LARGEST_FLASH_HEAD}"
    if backend == "varlen" and needs.softcap:
        return "torch's varlen_attn cannot cap attention logits"
    try:
        flash_attn_function() if backend == "flash_attn" else torch_varlen_function()
    except ValueError as error:
        return str(error)
    return ""


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
    numbers: no layout, a padded batch, attention dropout, attention sinks, attention that is not causal; and for a
    backend that was asked for and cannot serve.
    """
    name = type(module).__name__
    if layout is None or query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(f"{ATTENTION_NAME!r} takes one packed row, layout=attention_layout(pack) and no mask")
    if s_aux is not None:
        raise ValueError(f"{name} uses attention sinks, which packed attention does not support")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; packed attention supports 0 only (config.attention_dropout)")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{name} attends in both directions; packed attention is causal")
    needs = AttentionNeeds(
        device_type=query.device.type,
        dtype=query.dtype,
        head_size=query.shape[-1],
        value_head_size=value.shape[-1],
        softcap=bool(softcap),
        needs_grad=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        capability=_capability(query.device),
    )
    backend = choose_backend(layout.backend, needs)
    inputs = (query, key, value, layout, scaling, sliding_window or None, softcap)
    if backend == "flash_attn":
        return varlen_attention(flash_attn_function(), *inputs), None
    if backend == "varlen":
        return varlen_attention(torch_varlen_function(), *inputs), None
    return (flex_attention if backend == "flex" else sdpa_attention)(*inputs), None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
