"""``sampling.overlap``: finished samples are scored while others are still being generated.

The engine goes on in its own thread or process; here samples are collected until they fill a scoring pack. Which
samples share a pack then depends on who finished first, so targets equal those of two separate phases to rounding, not
bit for bit. Frozen models that are sharded over ranks are left out: their forwards must be equally many everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .distributed import Ranks
from .model import FrozenPair
from .records import RenderedPrompt, Sample, ScoredSamples
from .sampling import Sampler, finished_samples
from .targets import score_targets

__all__ = ["sample_and_score"]


def sample_and_score(
    sampler: Sampler,
    frozen: FrozenPair,
    prompts: Sequence[RenderedPrompt],
    config: Config,
    *,
    seed: int,
    ranks: Ranks,
    num_valid_vocab: int,
    advance: Callable[[int], None],
) -> tuple[ScoredSamples, float]:
    """The prompts answered and scored, and the seconds that this rank spent scoring.

    All ranks give all prompts and get all samples; each answers and scores its share. ``advance(1)`` is called for each
    sample that finishes.
    """
    share = ranks.share(prompts)
    pieces: list[Any] = [None] * len(share)
    waiting: list[tuple[int, Sample]] = []
    num_tokens, score_s = 0, 0.0

    def score_waiting() -> None:
        nonlocal num_tokens, score_s
        started = time.perf_counter()
        scored = score_targets(frozen, [sample for _, sample in waiting], config, num_valid_vocab=num_valid_vocab)
        for position, (index, sample) in enumerate(waiting):
            actions = slice(int(scored.offsets[position]), int(scored.offsets[position + 1]))
            pieces[index] = (sample, {name: values[actions] for name, values in scored.values.items()})
        waiting.clear()
        num_tokens, score_s = 0, score_s + time.perf_counter() - started

    with closing(finished_samples(sampler, share, seed=seed)) as finished:
        for index, sample in finished:
            advance(1)
            length = scored_tokens(sample, together=config.contrast.scores_views_together)
            if waiting and num_tokens + length > config.packing.score_tokens:
                score_waiting()
            waiting.append((index, sample))
            num_tokens += length
    if waiting:
        score_waiting()
    return joined(ranks.unshare(pieces)), score_s


def scored_tokens(sample: Sample, *, together: bool) -> int:
    """Tokens that a sample takes in a scoring pack: those of all its views, or of the longest."""
    shared = len(sample.rendered.prompt_ids) + sample.num_actions
    views = [len(prefix) + shared for prefix in sample.rendered.prefix_ids]
    return sum(views) if together else max(views)


def joined(pieces: Sequence[tuple[Sample, dict[str, Tensor]]]) -> ScoredSamples:
    """One record of the samples with their values by name."""
    samples = [sample for sample, _ in pieces]
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)], dtype=np.int64)
    names = pieces[0][1] if pieces else ("targets", "plain_logprobs")
    columns = {name: torch.cat([torch.empty(0), *(values[name] for _, values in pieces)]) for name in names}
    return ScoredSamples(samples, offsets=offsets, **columns)
