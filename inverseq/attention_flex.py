"""Packed attention by FlexAttention: where the var-len kernels do not serve (a logit cap in torch's, odd head sizes).

One call covers the pack; a block mask says who sees whom, so a shared prefix needs no copy and no second part, with
gradients too. Compiled on CUDA. On a CPU it runs uncompiled, holds all [T, T] scores and has no backward pass: that
is for tests.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .attention_layout import AttentionLayout
from .transfers import copied_to

__all__ = ["flex_attention"]


def flex_attention(
    query: Tensor,  # [1, H, T, head size]
    key: Tensor,  # [1, H_kv, T, head size]
    value: Tensor,  # [1, H_kv, T, head size]
    layout: AttentionLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each sequence to itself and its prefix, [1, T, H, head size]."""
    attend, make_block_mask = _functions(compiled=query.is_cuda)
    if window not in layout.block_masks:  # once per pack and window: layers share it
        num_tokens = query.shape[2]
        mask = _who_sees_whom(layout, window, query.device)
        layout.block_masks[window] = make_block_mask(mask, None, None, num_tokens, num_tokens, device=query.device)
    out = attend(
        query,
        key,
        value,
        score_mod=_capped(softcap) if softcap else None,
        block_mask=layout.block_masks[window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _who_sees_whom(layout: AttentionLayout, window: int | None, device):
    lengths = torch.tensor(layout.seqlens_q)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    parent = torch.tensor(layout.parents).repeat_interleave(lengths)
    first_key = torch.tensor(layout.seqlens_k) - lengths - torch.tensor(layout.starts[:-1])
    position = torch.arange(len(sequence)) + first_key.repeat_interleave(lengths)
    sequence, parent, position = (copied_to(tensor, device) for tensor in (sequence, parent, position))

    def sees(batch, head, q, k):
        own = (sequence[q] == sequence[k]) & (q >= k)
        seen = own | (parent[q] == sequence[k])
        return seen if window is None else seen & (position[q] - position[k] < window)

    return sees


def _capped(softcap: float):
    def cap(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _functions(*, compiled: bool):
    from torch.nn.attention import flex_attention as flex

    if not compiled:
        return flex.flex_attention, flex.create_block_mask
    return torch.compile(flex.flex_attention), torch.compile(flex.create_block_mask)
