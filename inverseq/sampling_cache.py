"""The memory of transformers' continuous batching: its paged cache of keys and values, and what it holds beside it."""

from __future__ import annotations

import math
from collections import Counter

import torch
from transformers import PreTrainedModel

__all__ = [
    "CUDA_PAGE_TOKENS",
    "CUDA_STEP_TOKENS",
    "cache_bytes_per_token",
    "engine_bytes",
    "free_cuda_bytes",
    "num_layer_groups",
]

CUDA_PAGE_TOKENS = 256  # what paged FlashAttention kernels read
CUDA_STEP_TOKENS = 4096  # prompt and decoded tokens of one forward pass


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize


def kinds_of_layers(model: PreTrainedModel) -> Counter[str]:
    """How many layers see everything and how many a window."""
    config = model.config.get_text_config()
    return Counter(getattr(config, "layer_types", None) or ["any"] * config.num_hidden_layers)


def num_layer_groups(model: PreTrainedModel) -> int:
    """Groups of equally many layers of one kind, each of which the engine before 5.23 gives blocks of its own."""
    counts = kinds_of_layers(model).values()
    return sum(counts) // math.gcd(*counts)


def engine_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """At least what the engine plans on CUDA for a cache of so many tokens; it refuses to start with less than that.

    Beside the cache, by the formulas of transformers 5.17 and 5.23: keys and values read out of it and repeated for all
    heads, a mask for each kind of layer unless the kernels are FlashAttention's, logits in fp32, and inputs. Where
    layers differ in kind, all of the cache may come to be one kind's, and holds more tokens of it.
    """
    config, b = model.config.get_text_config(), model.dtype.itemsize
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_size = getattr(config, "head_dim", None) or hidden // heads
    step, num_masks = CUDA_STEP_TOKENS, 0 if "flash" in model.config._attn_implementation else 2
    readable = -(-num_tokens * config.num_hidden_layers // min(kinds_of_layers(model).values()))
    per_token = 3 * heads * head_size * b + num_masks * step * b + 64
    per_row = 4 * config.vocab_size + b * (hidden + 6 * heads * head_size) + num_masks * step * b + 1024
    cache = (num_tokens + 3 * CUDA_PAGE_TOKENS) * cache_bytes_per_token(model)  # two pages for padding, one begun
    return cache + readable * per_token + step * per_row


def free_cuda_bytes() -> int:
    """Memory that the engine will find free: it empties torch's cache first, and what is left in pieces stays taken."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
