"""Sampling by an OpenAI-compatible completions server that somebody else has started: vLLM, SGLang and others.

Requests go out longest prompt first: how long a response gets is not known, a long prompt costs most to read, and
what is long should not be what all others are waited for at the end. An answer that fails or is late is asked for
again with its own seed, for another would favour answers that are short; one that must not be trained on is drawn again
with another seed. A prompt whose retries are spent ends the run, and so does an answer that the server cuts off.

A server that drops a connection may come back with other weights, so from then on nothing is sent until it answers
again, has been checked against the trainer (``recheck``) and, if it fails that, has been told to load the weights
anew. No answer that is accepted began in between.

Responses depend on the server's own randomness: equal seeds give equal responses only where the server promises that.
A sample records the seed of the call, by which a replay finds it; a request's own follows from it (``request_of``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import SamplingConfig
from .freshness import ProbeAnswer, StaleWeightsError
from .records import RenderedPrompt, Response
from .sampling_server_client import Batch, Client, RequestOf, ServerLost, server_version, why_unreachable
from .sampling_server_protocol import Answer, BadAnswer, CompletionsProtocol, UnfitServer
from .sampling_server_weights import fill_template, one_at_a_time, refresh, save_weights

__all__ = ["ServerError", "ServerSampler"]

logger = logging.getLogger(__name__)

NEVER_VERIFIED = ("openai", "vllm", "sglang")  # dialects that no real server of that kind has been asked in
POLL_S = 0.5
PROBE_SEED = 1


class ServerError(RuntimeError):
    """The server could not answer all prompts; the message names it and how many are missing."""


class ServerSampler:
    """One completions server, which may answer several ranks."""

    name = "server"

    def __init__(
        self,
        config: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: tuple[int, ...],
        num_valid_vocab: int,
        weights_dir: Path | None = None,
        is_main: bool = True,
    ):
        """``is_main`` is True for the one process that saves the weights and refreshes the server at a sync."""
        self.max_new_tokens = config.max_new_tokens
        self.config = config.server
        self.tokenizer = tokenizer
        self.protocol = CompletionsProtocol(
            config.server, tokenizer, stop_ids=stop_ids, num_valid_vocab=num_valid_vocab
        )
        folder = config.server.weights_dir or weights_dir
        if folder is None and not self.is_static:
            raise ValueError("sampling.server.weights_dir='': expected a folder for the weights that the server loads")
        self.weights_dir = Path(folder or ".").expanduser().absolute()
        self.is_main = is_main
        self.weights_step = 0
        self.synced_step: int | None = None
        self.recheck: Callable[[], Any] | None = None
        self.closing = threading.Event()
        self.version = f"{config.server.dialect} {server_version(config.server)}"
        if config.server.dialect in NEVER_VERIFIED:
            logger.warning("sampling.server.dialect=%s: never verified with a real server", config.server.dialect)

    @property
    def is_static(self) -> bool:
        return self.config.static

    @property
    def model_name(self) -> str:
        return fill_template(self.config.model, self.weights_dir, self.weights_step)

    def sync(self, policy: nn.Module, weights_step: int) -> None:
        """Save the weights and make the server load them; nothing when it has those of this step already.

        Raises RuntimeError when they cannot be saved or loaded. Whether the server then answers with them is what
        ``inverseq.freshness`` looks at.
        """
        if self.is_static:
            if self.synced_step is None:
                logger.warning("%s: static weights; the samples are off-policy", self.config.url)
            self.synced_step = weights_step
            return
        if not isinstance(policy, PreTrainedModel):
            raise ValueError(f"policy is a {type(policy).__name__}: expected the PreTrainedModel that is trained")
        if weights_step == self.synced_step:
            return
        if self.is_main:
            with one_at_a_time(self.weights_dir):
                save_weights(policy, self.tokenizer, self.weights_dir, self.protocol.stop_ids)
                refresh(self.config, self.weights_dir, weights_step)
        self.weights_step = self.synced_step = weights_step

    def generate(self, prompts: Sequence[RenderedPrompt], *, seed: int) -> Iterator[tuple[int, Response]]:
        """Yield (index of the prompt, response) as they finish; see ``Sampler.generate``.

        Requests go on while the caller works on what has been yielded. Raises ServerError when a prompt's retries are
        spent or the server stays away for ``wait_s``, StaleWeightsError when it comes back with other weights. Closing
        the iterator cancels what is in flight.
        """
        sent = [self.protocol.prompt_of(prompt) for prompt in prompts]
        waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].policy_ids))
        num_lost, is_suspect = 0, False
        while waiting:
            lost: ServerLost | None = None
            with Batch(
                self.make_client(), self.protocol, [(i, sent[i]) for i in waiting], self.request_of(seed)
            ) as batch:
                for index, outcome in batch.outcomes(self.closing):
                    if isinstance(outcome, ServerLost):
                        lost = lost or outcome  # the first is the cause, the others were not sent
                        continue
                    if isinstance(outcome, Exception):
                        raise self.given_up(prompts[index], len(waiting), len(prompts), outcome) from outcome
                    waiting.remove(index)
                    yield index, self.response(outcome, seed)
                is_suspect |= batch.is_suspect
            if lost is not None:
                num_lost += 1
                state = f"{len(waiting)} of {len(prompts)} prompts are unanswered"
                logger.warning("%s: lost the connection, %s: %s", self.config.url, state, lost)
                if num_lost > self.config.retries:
                    raise ServerError(f"{self.config.url}: the connection broke {num_lost} times, {state}: {lost}")
                self.bring_back(state)
        if is_suspect and self.recheck is not None:
            self.recheck()  # it may have been restarted behind a gateway

    def make_client(self) -> Client:
        return Client(self.config, self.model_name)

    def request_of(self, seed: int) -> RequestOf:
        """The request for a prompt: each prompt and each draw of a call has a seed of its own."""

        def request(index: int, prompt: list[int] | str, draw: int) -> dict[str, Any]:
            entropy = np.random.SeedSequence([seed, index, draw])
            own_seed = int(entropy.generate_state(1, np.uint32)[0] >> 1)
            return self.protocol.request(prompt, self.max_new_tokens, seed=own_seed)

        return request

    def response(self, answer: Answer, seed: int) -> Response:
        return Response(
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            seed=seed,
            engine=self.name,
            engine_version=self.version,
            weights_step=self.weights_step,
        )

    def given_up(self, prompt: RenderedPrompt, num_waiting: int, num_prompts: int, error: Exception) -> Exception:
        return ServerError(
            f"{self.config.url}: prompt {prompt.prompt.id!r} is given up, {num_waiting} of {num_prompts} prompts are "
            f"unanswered: {error}"
        )

    def probe(self, prompt: RenderedPrompt, num_tokens: int) -> ProbeAnswer:
        """The server's greedy continuation of a prompt, with its log-probs where it gives them."""
        request = self.protocol.request(self.protocol.prompt_of(prompt), num_tokens, seed=PROBE_SEED, greedy=True)
        try:
            completion = self.make_client().ask_once(request)
            text, reason = completion.choices[0].text or "", completion.choices[0].finish_reason
            if reason not in ("stop", "length"):
                raise BadAnswer(f"finish reason {reason!r}")
        except (ServerLost, BadAnswer, UnfitServer) as error:
            raise ServerError(f"{self.config.url}: the probe prompt {prompt.prompt.id!r} failed: {error}") from error
        try:
            answer = self.protocol.read(completion, num_tokens)
        except BadAnswer as error:
            logger.info("%s: the probe's answer is compared as text: %s", self.config.url, error)
            return ProbeAnswer(None, text)
        return ProbeAnswer(answer.token_ids, text, answer.logprobs)

    def bring_back(self, state: str) -> None:
        """Wait until the server answers again and has the weights of the last sync; ServerError after ``wait_s``."""
        deadline = time.monotonic() + self.config.wait_s
        while (trouble := why_unreachable(self.config)) is not None:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.config.url}: still away after sampling.server.wait_s={self.config.wait_s:g} seconds, "
                    f"{state}: {trouble}"
                )
            if self.closing.wait(POLL_S):
                raise ServerError(f"{self.config.url}: closed while the server was away, {state}")
        if self.recheck is None or self.is_static:
            return
        with one_at_a_time(self.weights_dir):
            try:
                self.recheck()
            except (StaleWeightsError, ServerError) as error:
                logger.warning("%s: loading step %d anew: %s", self.config.url, self.weights_step, error)
                refresh(self.config, self.weights_dir, self.weights_step)
                self.recheck()

    def close(self) -> None:
        """End a call of ``generate`` that runs in another thread. The server is somebody else's."""
        self.closing.set()
