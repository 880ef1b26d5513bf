"""Where the sequences of a pack stand, as attention needs it: made on the host once per pack, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from .records import PackedViews
from .transfers import copied_to

__all__ = ["AttentionLayout", "SharedPrefixes", "attention_layout"]


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The sequences that others continue, and the rows of those others, prefix by prefix."""

    rows: Tensor  # [T_c] int64, tokens of all sequences that continue a prefix
    cu_seqlens_q: Tensor  # [P + 1] int32, those tokens by prefix
    prefix_rows: Tensor  # [T_p] int64, tokens of the prefixes
    cu_seqlens_k: Tensor  # [P + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Each sequence's queries and keys. A sequence that continues a prefix has the prefix's keys before its own."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]  # own length plus the parent's
    parents: tuple[int, ...]  # sequence that this one continues, -1 without one
    cu_seqlens_q: Tensor  # [S + 1] int32
    cu_seqlens_k: Tensor  # [S + 1] int32
    key_index: Tensor | None  # [T_k] int64, None when keys are the pack's own tokens in order
    prefixes: SharedPrefixes | None
    max_seqlen_q: int
    max_seqlen_k: int
    backend: str = "auto"
    block_masks: dict = field(default_factory=dict)  # FlexAttention's, by window; filled by the first layer

    @property
    def starts(self) -> list[int]:
        """First row of each sequence, and behind the last."""
        return [0, *accumulate(self.seqlens_q)]


def attention_layout(pack: PackedViews, backend: str = "auto") -> AttentionLayout:
    """The attention layout of a pack, on the pack's device; ``backend`` as ``model.attention``."""
    parents = tuple(pack.parent_seq.tolist())
    if all(parent < 0 for parent in parents):
        longest = max(pack.seqlens)
        return AttentionLayout(
            pack.seqlens, pack.seqlens, parents, pack.cu_seqlens, pack.cu_seqlens, None, None, longest, longest, backend
        )
    rows = [torch.arange(end - length, end) for length, end in zip(pack.seqlens, accumulate(pack.seqlens), strict=True)]
    pieces, seqlens_k = [], []
    for s, parent in enumerate(parents):
        assert parent < s and (parent < 0 or parents[parent] < 0), "a parent is an earlier sequence without a parent"
        pieces += [rows[parent], rows[s]] if parent >= 0 else [rows[s]]
        seqlens_k.append(pack.seqlens[s] + (pack.seqlens[parent] if parent >= 0 else 0))
    device = pack.input_ids.device
    return AttentionLayout(
        seqlens_q=pack.seqlens,
        seqlens_k=tuple(seqlens_k),
        parents=parents,
        cu_seqlens_q=pack.cu_seqlens,
        cu_seqlens_k=_cumulated(seqlens_k, device),
        key_index=copied_to(torch.cat(pieces), device),
        prefixes=_shared_prefixes(parents, rows, device),
        max_seqlen_q=max(pack.seqlens),
        max_seqlen_k=max(seqlens_k),
        backend=backend,
    )


def _shared_prefixes(parents: tuple[int, ...], rows: list[Tensor], device) -> SharedPrefixes:
    prefixes = sorted({parent for parent in parents if parent >= 0})
    children = [torch.cat([rows[s] for s, parent in enumerate(parents) if parent == prefix]) for prefix in prefixes]
    lengths_q, lengths_k = [len(child) for child in children], [len(rows[prefix]) for prefix in prefixes]
    return SharedPrefixes(
        rows=copied_to(torch.cat(children), device),
        cu_seqlens_q=_cumulated(lengths_q, device),
        prefix_rows=copied_to(torch.cat([rows[prefix] for prefix in prefixes]), device),
        cu_seqlens_k=_cumulated(lengths_k, device),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
    )


def _cumulated(lengths: list[int], device) -> Tensor:
    return copied_to(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
