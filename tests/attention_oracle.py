"""Attention by its definition, tiny models of every family, and packs: what the backends are compared with.

``flash_attn_double`` and ``varlen_doubles`` stand in for kernels that run on CUDA only. They have the public signatures
of those packages, insist on what the kernels require, and compute by definition: they check our arguments, not theirs.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from inverseq.attention import ATTENTION_NAME, attention_layout
from inverseq.records import PackedViews

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral-window": MistralConfig(**SMALL, sliding_window=5),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2-softcap": Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=1.5),
    "gemma3": Gemma3TextConfig(
        **SMALL, sliding_window=6, query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"]
    ),
}


def make_pack(sequences: list[list[int]], parents: list[int] | None = None) -> PackedViews:
    """A pack of whole sequences in which every token but the last of a sequence predicts the next one."""
    parents = parents or [-1] * len(sequences)
    lengths = [len(s) for s in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    offsets = [lengths[p] if p >= 0 else 0 for p in parents]
    action_index = torch.cat([torch.arange(a, b - 1) for a, b in zip(starts[:-1], starts[1:], strict=True)])
    input_ids = torch.tensor([t for s in sequences for t in s])
    return PackedViews(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]),
        cu_seqlens=starts.int(),
        max_seqlen=max(lengths),
        parent_seq=torch.tensor(parents, dtype=torch.int32),
        action_index=action_index[None],
        token_ids=input_ids[action_index + 1],
        sample_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths) - 1),
        seqlens=tuple(lengths),
    )


def tiny(name: str, dtype=torch.float32):
    """A random model whose weights are large enough for attention to depend on its inputs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return model


def random_sequences(lengths, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


def packed_hidden(model, pack: PackedViews, backend: str = "auto") -> Tensor:
    """[T, D]"""
    model.set_attn_implementation(ATTENTION_NAME)
    return model.get_decoder()(
        input_ids=pack.input_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        layout=attention_layout(pack, backend),
    ).last_hidden_state[0]


def separate_hidden(model, sequences) -> Tensor:
    """[T, D], each sequence through the model's own eager attention."""
    model.set_attn_implementation("eager")
    return torch.cat([model.get_decoder()(torch.tensor([s]), use_cache=False).last_hidden_state[0] for s in sequences])


def with_gradients(model, hidden: Tensor, seed: int = 1) -> list[Tensor]:
    """Gradients of the decoder's parameters for a random upstream gradient of ``hidden``."""
    upstream = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((hidden * upstream).sum(), [*model.get_decoder().parameters()]))


def attention_by_definition(q, k, v, cu_q, cu_k, *, scale, causal, left, softcap=0.0) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, head size] and log-sum-exp [H, T]; a sequence's last query stands at its last key.

    ``left`` is the number of keys before a query's own that it sees, −1 for all.
    """
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[s], bounds_q[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        key, value = (x[keys].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], key) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        len_q, len_k = scores.shape[1:]
        distance = torch.arange(len_k - len_q, len_k)[:, None] - torch.arange(len_k)[None]
        hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (distance > left)
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1).detach().float()


def check_kernel_inputs(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    """What the CUDA kernels require of a call."""
    assert q.dim() == k.dim() == v.dim() == 3 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[2] == k.shape[2]
    for cu, maximum, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == tokens
        assert type(maximum) is int and maximum == cu.diff().max()
    assert len(cu_q) == len(cu_k)


def flash_attn_double(calls: list | None = None) -> types.ModuleType:
    """A module that looks like flash-attn 2.8 where we call it; ``calls`` collects what each call was."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_kernel_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert dropout_p == 0.0 and window_size[1] in (-1, 0) and alibi_slopes is None and block_table is None
        if calls is not None:
            calls.append({"causal": causal, "window_size": window_size, "keys": len(k)})
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse = attention_by_definition(
            q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal, left=window_size[0], softcap=softcap
        )
        return (out, lse, None) if return_attn_probs else out

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.__version__ = flash_attn_varlen_func, "2.8.3"
    return module


def varlen_doubles() -> dict:
    """``varlen_attn`` as torch 2.10, 2.11 and 2.13 declare it; the last alone compares the numbers of heads."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, causal, left, return_aux):
        check_kernel_inputs(q, k, v, cu_q, cu_k, max_q, max_k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = attention_by_definition(q, k, v, cu_q, cu_k, scale=scale, causal=causal, left=left)
        return (out, lse) if return_aux is not None and return_aux.lse else out

    def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
        return attend(query, key, value, *lengths, scale=None, causal=is_causal, left=-1, return_aux=return_aux)

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert window_size[1] in (-1, 0)
        lengths, (left, right) = (cu_seq_q, cu_seq_k, max_q, max_k), window_size
        return attend(query, key, value, *lengths, scale=scale, causal=right == 0, left=left, return_aux=return_aux)

    def torch_2_13(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        lengths, (left, right) = (cu_seq_q, cu_seq_k, max_q, max_k), window_size
        return attend(query, key, value, *lengths, scale=scale, causal=right == 0, left=left, return_aux=return_aux)

    return {"2.10": torch_2_10, "2.11": torch_2_11, "2.13": torch_2_13}
