"""Freshness: does the sampling engine answer with the weights that are trained?

After each sync the engine continues one probe prompt greedily, and the trainer's weights score that continuation:

    logprob_gap   mean |log π_engine(y_t) − log π_θ(y_t)| over the continuation, where the engine gives log-probs
    greedy_gap    mean (max_v log π_θ(v) − log π_θ(y_t)): 0 when the trainer's weights would have chosen the same tokens
    text_differs  0 or 1, for an engine whose text does not tell its tokens: the trainer's own greedy text is compared

All in nats a token. Engines round differently, so a gap is never quite 0 in bfloat16; a gap over the limit, or one that
is clearly smaller for the weights of the sync before, means that the engine kept old weights. Log-probabilities of an
engine are looked at here and nowhere else: they are never trained on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from inverseq_kernels import linear_logprob
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .distributed import Ranks
from .model import action_hidden, head_of
from .packing import write_pack
from .records import RenderedPrompt, Response, Sample

__all__ = ["Freshness", "ProbeAnswer", "StaleWeightsError", "greedy_tokens"]

logger = logging.getLogger(__name__)

NUM_PROBE_TOKENS = 16
MIN_MOVE = 1e-4  # nats; weights whose probe log-probs moved by less cannot be told from the ones before


class StaleWeightsError(RuntimeError):
    """The engine's answers are not those of the weights it was given."""


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """How an engine continues a prompt greedily; ``token_ids`` is None when its text does not tell them."""

    token_ids: np.ndarray | None  # [R] int32, the stop token included when it ended there
    text: str  # without special tokens
    logprobs: np.ndarray | None = None  # [R] fp32, what the engine says of its tokens


class Freshness:
    """Syncs an engine with the trainer and compares the two on one prompt."""

    def __init__(
        self,
        probe: RenderedPrompt,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: tuple[int, ...],
        num_valid_vocab: int,
        max_gap: float,
    ):
        self.probe = probe
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.num_valid_vocab = num_valid_vocab
        self.max_gap = max_gap
        self.previous: tuple[int, bytes, Tensor] | None = None  # step, token ids and log π_θ of the sync before
        self.row: dict[str, float] = {}  # metrics of the last sync
        self.answer: ProbeAnswer | None = None  # the engine's, which passed

    def sync(self, sampler: Any, model: PreTrainedModel, weights_step: int, ranks: Ranks | None = None) -> None:
        """Give the engine the model's weights and check that it answers with them; ``row`` tells how well.

        All ranks call it together: one engine may answer them all, and has the weights when its rank has synced.
        Raises StaleWeightsError when it does not, unless the engine's weights are declared static, and whatever the
        engine raises. An engine without ``probe`` (replay) has no weights to compare.
        """
        started = time.perf_counter()
        sampler.sync(model, weights_step)
        if ranks is not None:
            ranks.barrier()
        self.row = {"sync_duration_s": time.perf_counter() - started}
        if not hasattr(sampler, "probe"):
            return

        def check() -> dict[str, float]:
            return self.check(sampler, model, weights_step)

        if hasattr(sampler, "recheck"):
            sampler.recheck = check  # after an interruption the engine may be back with other weights
        self.row |= {"weights_lag_steps": weights_step - sampler.weights_step} | check()

    def check(self, sampler: Any, model: PreTrainedModel, weights_step: int) -> dict[str, float]:
        """Metrics of one probe; see ``sync``."""
        answer = sampler.probe(self.probe, NUM_PROBE_TOKENS)
        metrics, doubt = self.compare(model, answer, weights_step)
        gap = metrics.get("probe_logprob_gap", metrics.get("probe_greedy_gap", 0.0))
        if not gap <= self.max_gap:
            doubt = f"they differ by {gap:.3g} nats a token"
        if doubt and self.max_gap:
            message = (
                f"{sampler.name} does not answer with the weights of step {weights_step}: on the probe prompt "
                f"{self.probe.prompt.id!r} {doubt} (sampling.max_logprob_gap={self.max_gap}). Either its weights were "
                "not refreshed, or it computes something else (another model, chat or sampling settings, a quantised "
                "or scaled head)"
            )
            if not getattr(sampler, "is_static", False):
                raise StaleWeightsError(message)
            logger.warning("static weights, off-policy samples: %s", message)
        gaps = ", ".join(f"{key}={value:.2g}" for key, value in metrics.items())
        logger.info("%s probed at step %d: %s", sampler.name, weights_step, gaps)
        self.answer = answer
        return metrics

    def check_unchanged(self, sampler: Any) -> None:
        """Compare the engine with its own answer of the last sync, for when the trainer's weights have moved on.

        Raises StaleWeightsError when it continues the probe otherwise, or with log-probs beyond the limit.
        """
        before, now = self.answer, sampler.probe(self.probe, NUM_PROBE_TOKENS)
        assert before is not None, "nothing was synced"
        same = now.text == before.text and (now.token_ids is None) == (before.token_ids is None)
        if same and now.token_ids is not None:
            same = np.array_equal(now.token_ids, before.token_ids)
        if same and now.logprobs is not None and before.logprobs is not None:
            same = bool(np.abs(now.logprobs - before.logprobs).mean() <= self.max_gap)
        if not same and self.max_gap and not getattr(sampler, "is_static", False):
            raise StaleWeightsError(
                f"{sampler.name} no longer answers the probe prompt {self.probe.prompt.id!r} as it did after the last "
                f"sync, with the weights of step {sampler.weights_step}"
            )

    def compare(
        self, model: PreTrainedModel, answer: ProbeAnswer, weights_step: int
    ) -> tuple[dict[str, float], str | None]:
        """The gaps of one answer, and what speaks against these weights whatever the size of the gaps."""
        if answer.token_ids is None:
            ids = greedy_tokens(
                model, self.probe, NUM_PROBE_TOKENS, stop_ids=self.stop_ids, num_valid_vocab=self.num_valid_vocab
            )
            differs = self.tokenizer.decode(ids, skip_special_tokens=True) != answer.text
            return {"probe_text_differs": float(differs)}, "its greedy text differs" if differs else None
        logprobs, best = trainer_logprobs(model, self.probe, answer.token_ids, self.num_valid_vocab)
        metrics, doubt = {"probe_greedy_gap": (best - logprobs).clamp(min=0).mean().item()}, None
        ids = answer.token_ids.tobytes()
        if answer.logprobs is not None:
            engine = torch.from_numpy(answer.logprobs.astype(np.float32))
            metrics["probe_logprob_gap"] = gap = (engine - logprobs).abs().mean().item()
            if self.previous is not None and self.previous[0] != weights_step and self.previous[1] == ids:
                before = (engine - self.previous[2]).abs().mean().item()
                moved = (logprobs - self.previous[2]).abs().mean().item()
                if moved > MIN_MOVE and before < gap / 2:
                    doubt = (
                        f"it agrees to {before:.2g} nats a token with step {self.previous[0]}, to {gap:.2g} with this"
                    )
        self.previous = (weights_step, ids, logprobs)
        return metrics, doubt


@torch.no_grad()
def trainer_logprobs(
    model: PreTrainedModel, prompt: RenderedPrompt, token_ids: np.ndarray, num_valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """log π(y_t) of a response and the largest log π of each position, two [R] fp32 on the host."""
    hidden_AD, ids_A = response_hidden(model, prompt, token_ids)
    head = head_of(model, num_valid_vocab)
    options = {
        "bias": head.bias,
        "softcap": head.softcap,
        "temperature": head.temperature,
        "num_valid_vocab": head.num_valid_vocab,
    }
    best_A = best_words(hidden_AD, head)
    logprobs = [linear_logprob(hidden_AD, head.weight, words, **options).cpu() for words in (ids_A, best_A)]
    return logprobs[0], logprobs[1]


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel,
    prompt: RenderedPrompt,
    num_tokens: int,
    *,
    stop_ids: tuple[int, ...],
    num_valid_vocab: int,
) -> np.ndarray:
    """The model's greedy continuation by the trainer's own forward pass, one pass a token, [R] int32."""
    ids = np.zeros(0, np.int32)
    while len(ids) < num_tokens and not np.isin(ids[-1:], stop_ids).any():
        # The last row predicts the word after those that are there: a stand-in for it makes an action of that row.
        hidden_AD, _ = response_hidden(model, prompt, np.append(ids, np.int32(0)))
        word = best_words(hidden_AD[-1:], head_of(model, num_valid_vocab))
        ids = np.append(ids, np.int32(word.item()))
    return ids


def response_hidden(model: PreTrainedModel, prompt: RenderedPrompt, token_ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a response in the policy's view, [R, D], and its ids [R] int64."""
    response = Response(token_ids, "length", seed=0, engine="probe", engine_version="", weights_step=0)
    pack = write_pack([Sample(prompt, response)], [0], (-1,)).to(model.device)
    return action_hidden(model, pack)[-1], pack.token_ids


def best_words(hidden_AD: Tensor, head) -> Tensor:
    """The most probable word of each row, [A] int64; softcap and temperature do not change which it is."""
    logits_AV = hidden_AD @ head.weight[: head.num_valid_vocab].T.to(hidden_AD.dtype)
    if head.bias is not None:
        logits_AV = logits_AV + head.bias[: head.num_valid_vocab]
    return logits_AV.argmax(-1)
