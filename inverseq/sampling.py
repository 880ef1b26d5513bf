"""Sampling: the policy answers prompts.

A ``Sampler`` is one sampling engine. Whatever the engine, responses are drawn at temperature 1, top_p 1, top_k 0 and
without penalties: only then is the expected gradient of the loss that of the KL divergence. Log-probabilities of an
engine are never trained on; ``inverseq.freshness`` compares a few of them with the trainer's after each sync.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import SamplingConfig
from .freshness import ProbeAnswer
from .records import RenderedPrompt, Response, Sample
from .sampling_lmdeploy import LmdeploySampler, check_lmdeploy
from .sampling_replay import ReplaySampler
from .sampling_server import ServerSampler
from .sampling_transformers import TransformersSampler, stop_token_ids

__all__ = ["Sampler", "finished_samples", "make_sampler", "sample_responses"]

logger = logging.getLogger(__name__)


class Sampler(Protocol):
    """A sampling engine."""

    name: str
    version: str
    weights_step: int  # optimizer steps behind the weights it samples from

    def sync(self, policy: nn.Module, weights_step: int) -> None:
        """From now on sample from these weights, which ``weights_step`` optimizer steps have made."""
        ...

    def generate(self, prompts: Sequence[RenderedPrompt], *, seed: int) -> Iterator[tuple[int, Response]]:
        """Yield (index of the prompt, its response), exactly one per prompt, as they finish.

        Equal weights, prompts and seed give equal responses. Failure is an exception, never a missing response.
        """
        ...

    def probe(self, prompt: RenderedPrompt, num_tokens: int) -> ProbeAnswer:
        """Continue the prompt greedily; left out by engines without weights (replay)."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def make_sampler(
    config: SamplingConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_valid_vocab: int,
    weights_dir: Path | None = None,
    is_main: bool = True,
) -> Sampler:
    """The sampler of ``sampling.backend``; token ids from ``num_valid_vocab`` on are padding and never sampled.

    ``weights_dir`` is where weights are saved for an engine in another process (RUN/weights); where one such engine
    answers several ranks, ``is_main`` is True for the one that saves them and has them loaded.
    """
    if config.backend == "replay":
        return ReplaySampler(config)
    if config.backend == "server":
        return ServerSampler(
            config,
            tokenizer,
            stop_ids=stop_token_ids(model, tokenizer),
            num_valid_vocab=num_valid_vocab,
            weights_dir=weights_dir,
            is_main=is_main,
        )
    if config.backend == "lmdeploy":
        check_lmdeploy(config)
        return LmdeploySampler(
            config,
            tokenizer,
            stop_ids=stop_token_ids(model, tokenizer),
            num_valid_vocab=num_valid_vocab,
            weights_dir=weights_dir,
            is_main=is_main,
        )
    return TransformersSampler(config, model, tokenizer, num_valid_vocab=num_valid_vocab)


def finished_samples(sampler: Sampler, prompts: Sequence[RenderedPrompt], *, seed: int) -> Iterator[tuple[int, Sample]]:
    """Yield (index of the prompt, its sample) as they finish, exactly one per prompt.

    Raises RuntimeError when the engine answers a prompt twice or not at all, and whatever the engine raises. Closing
    the iterator stops the engine.
    """
    started = time.perf_counter()
    answered: set[int] = set()
    num_tokens = 0
    # Closed explicitly: an interrupt while the caller's code runs must stop the engine too.
    with closing(sampler.generate(prompts, seed=seed)) as finished:
        for index, response in finished:
            if index in answered:
                raise RuntimeError(f"{sampler.name}: prompt {prompts[index].prompt.id!r} was answered twice")
            answered.add(index)
            num_tokens += len(response.token_ids)
            yield index, Sample(prompts[index], response)
    if len(answered) != len(prompts):
        raise RuntimeError(f"{sampler.name}: {len(prompts)} prompts, but {len(answered)} responses came back")
    duration_s = time.perf_counter() - started
    logger.info(
        "%s: %d responses, %d tokens in %.1f s, %.1f tokens per second",
        sampler.name, len(answered), num_tokens, duration_s, num_tokens / max(duration_s, 1e-9),
    )  # fmt: skip


def sample_responses(
    sampler: Sampler,
    prompts: Sequence[RenderedPrompt],
    *,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> list[Sample]:
    """One sample per prompt, in the order of the prompts; ``advance(1)`` is called for each as it finishes.

    Raises what ``finished_samples`` does.
    """
    samples: dict[int, Sample] = {}
    with closing(finished_samples(sampler, prompts, seed=seed)) as finished:
        for index, sample in finished:
            samples[index] = sample
            if advance is not None:
                advance(1)
    return [samples[index] for index in range(len(prompts))]
