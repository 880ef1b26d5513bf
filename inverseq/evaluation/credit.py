"""Token credit: what each token of a response gains under the superior policy.

    credit_t = β (log π̂(y_t | y_<t, x) − log π_l(y_t | y_<t, x)),   value_t = Σ_{s ≤ t} credit_s

The sum over a response is β times its sequence log-ratio. Both log-probabilities stand in a run's sample files, so a
run's credit needs no model; any other response is scored here with two views of one model or with two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..model import FrozenPair, check_head, load_model
from ..records import Message, Prompt, Response, Sample, ScoredSamples
from ..resolve import ResolvedModels, resolve_models
from ..targets import score_targets

__all__ = ["Span", "TokenCredit", "credit_of", "load_pair", "score_texts", "spans_of"]

WINDOW = 8  # tokens decoded before a position, for tokenizers whose text of a token depends on its neighbours
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Span:
    """The shortest run of tokens that decodes to whole characters, mostly one token."""

    start: int  # index of its first token
    stop: int  # one behind its last
    text: str


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """The credit of one response."""

    prompt_id: str
    messages: tuple[Message, ...]
    spans: tuple[Span, ...]
    credit: np.ndarray  # [R] float64 nats
    finish_reason: str

    @property
    def value(self) -> np.ndarray:
        """Running sum of the credit, [R] float64 nats."""
        return np.cumsum(self.credit)

    @property
    def total(self) -> float:
        """β (log π̂(y) − log π_l(y)) of the whole response."""
        return float(self.credit.sum())

    def span_credit(self, span: Span) -> float:
        return float(self.credit[span.start : span.stop].sum())


def credit_of(
    scored: ScoredSamples, index: int, tokenizer: PreTrainedTokenizerBase, *, beta: float = 1.0
) -> TokenCredit:
    """The credit of sample ``index``; tokens of probability 0 under both distributions have credit 0."""
    sample = scored.samples[index]
    rows = slice(int(scored.offsets[index]), int(scored.offsets[index + 1]))
    targets, plain = scored.targets[rows].double(), scored.plain_logprobs[rows].double()
    credit = torch.where(targets == plain, 0.0, targets - plain)  # −inf − (−inf) is not a number
    return TokenCredit(
        prompt_id=sample.rendered.prompt.id,
        messages=sample.rendered.prompt.messages,
        spans=spans_of(tokenizer, sample.response.token_ids),
        credit=beta * credit.numpy(),
        finish_reason=sample.response.finish_reason,
    )


def spans_of(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> tuple[Span, ...]:
    """Split a response into spans whose texts together are its decoded text, special tokens included.

    Tokens that hold parts of one character stand in one span.
    """
    ids, spans, start = token_ids.tolist(), [], 0

    def decode(first: int, stop: int) -> str:
        return tokenizer.decode(ids[first:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for stop in range(1, len(ids) + 1):
        first = spans[-WINDOW].start if len(spans) >= WINDOW else 0
        before = decode(first, start)
        text = decode(first, stop)
        is_whole = not text.endswith(REPLACEMENT) or stop == len(ids) or stop - start >= WINDOW
        if is_whole:
            spans.append(Span(start, stop, text[len(before) :]))
            start = stop
    return tuple(spans)


def score_texts(
    config: Config, conversations: Sequence[tuple[Sequence[Message], str]]
) -> tuple[ResolvedModels, ScoredSamples]:
    """Score given responses with the frozen pair of a configuration.

    ``conversations`` are (messages up to the last user turn, response text). The response is tokenised as text and
    EOS is put behind it, as a model that finished its answer would have done. Raises ValueError for an empty response.
    """
    for messages, response in conversations:
        if not response:
            raise ValueError(f"response={response!r}: expected text for the prompt {messages[-1]['content'][:60]!r}")
    models = resolve_models(config)
    tokenizer = models.tokenizer
    samples = []
    for number, (messages, response) in enumerate(conversations):
        rendered = models.renderer.render(Prompt(f"response-{number}", tuple(messages)))
        ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        response_ids = np.array(ids, dtype=np.int32)
        samples.append(Sample(rendered, Response(response_ids, "stop", 0, "given", "", 0)))
    return models, score_targets(load_pair(models), samples, config, num_valid_vocab=models.num_valid_vocab)


def load_pair(models: ResolvedModels) -> FrozenPair:
    """The frozen pair of a configuration, checked as a run checks it."""
    better = load_model(models.model_path, models.config.model)
    check_head(better, models.probe_pack(), models.num_valid_vocab)
    plain = better
    if models.plain_model_path is not None:
        plain = load_model(models.plain_model_path, models.config.model)
        check_head(plain, models.probe_pack(), models.num_valid_vocab)
    return FrozenPair(better, plain)
