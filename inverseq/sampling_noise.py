"""Noise that belongs to a prompt: responses that do not depend on what else is decoded at the same time.

The token at position t of a response is argmax_v (log-probability_v + G_v) with independent standard Gumbel noise G,
which is a draw from the softmax (the Gumbel-max trick). G is a function of (seed, prompt, t) alone, from a generator
that counts, so the order of prompts, the batch size, the number of processes and the device do not matter. Logits do
depend on them in their last bits, so two runs agree except where two words are closer than that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .records import RenderedPrompt

__all__ = ["gumbel_noise", "prompt_keys"]


def prompt_keys(prompts: Sequence[RenderedPrompt], seed: int) -> list[np.ndarray]:
    """A key of [2] uint64 for each prompt, from the seed, the prompt's id and its token ids.

    A prompt that stands in the list again has another key: its number among its equals counts too.
    """
    seen: Counter[tuple[str, bytes]] = Counter()
    keys = []
    for prompt in prompts:
        identity = (prompt.prompt.id, prompt.policy_ids.tobytes())
        digest = hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "little", signed=True))
        for part in (identity[0].encode(), identity[1], seen[identity].to_bytes(8, "little")):
            digest.update(len(part).to_bytes(8, "little") + part)
        seen[identity] += 1
        keys.append(np.frombuffer(digest.digest(), dtype=np.uint64))
    return keys


def gumbel_noise(rows: Sequence[tuple[np.ndarray, int]], size: int) -> Tensor:
    """Standard Gumbel noise, [len(rows), size] fp32; each row is a function of its (key, position) alone.

    Drawn in float64: an exponential variate of 24 bits is zero, hence a noise of +inf, once in 2²⁴ draws, which is
    every hundredth token at a vocabulary of 128,256.
    """
    noise = np.empty((len(rows), size), dtype=np.float32)
    for row, (key, position) in zip(noise, rows, strict=True):
        generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, position], np.uint64)))
        row[:] = -np.log(generator.standard_exponential(size))
    return torch.from_numpy(noise)
