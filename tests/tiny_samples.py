"""Random samples, and the brute-force mathematics the engine is compared with: full logits, no packing, float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inverseq.records import Prompt, RenderedPrompt, Response, Sample

__all__ = ["full_logprobs", "make_samples", "superior_logprobs"]


def make_samples(count: int, *, seed: int = 0, num_views: int = 2, vocab: int = 512, longest: int = 12) -> list[Sample]:
    """Samples of random token ids; every view has a prefix of its own length, the plain one possibly none."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, vocab, rng.integers(low, high + 1)).astype(np.int32)

    samples = []
    for index in range(count):
        prefixes = (ids(4, 9), ids(0, 3))[-num_views:]
        prompt = Prompt(f"tiny-{index}", ({"role": "user", "content": f"question {index}"},))
        rendered = RenderedPrompt(prompt, prefixes, ids(2, longest))
        response = Response(ids(1, longest), "stop" if index % 3 else "length", index, "tiny", "0", 0)
        samples.append(Sample(rendered, response))
    return samples


@torch.no_grad()
def full_logprobs(model, sample: Sample, view: int) -> Tensor:
    """log π(· | y_<t, x) of every response position under a view, [R, V] float64, from a forward of one sequence."""
    model.set_attn_implementation("eager")
    prompt = np.concatenate([sample.rendered.prefix_ids[view], sample.rendered.prompt_ids])
    ids = torch.from_numpy(np.concatenate([prompt, sample.response.token_ids]).astype(np.int64))[None]
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def superior_logprobs(better, plain, samples: list[Sample], alpha: float) -> tuple[Tensor, Tensor]:
    """(log π̂(y_t), log π_l(y_t)) of all actions in sample order, [A] float64."""
    targets, plains = [], []
    for sample in samples:
        log_w, log_l = full_logprobs(better, sample, 0), full_logprobs(plain, sample, -1)
        token_ids = torch.from_numpy(sample.response.token_ids.astype(np.int64))[:, None]
        superior = (alpha * log_w + (1 - alpha) * log_l).log_softmax(-1)
        targets.append(superior.gather(1, token_ids)[:, 0])
        plains.append(log_l.gather(1, token_ids)[:, 0])
    return torch.cat(targets), torch.cat(plains)
