"""What LMDeploy is asked and which of its answers may be trained on, for both of its forms.

LMDeploy 0.18 decodes greedily unless told otherwise, at temperature 0.8 and top_k 50 by default; it takes what a
request leaves open from generation_config.json; it drops the stop token from an answer unless asked for it by
``include_stop_str_in_output``, and then the end of a response would never be trained; a failure may come as a finish
reason instead of an error. Hence every setting is sent, and every answer is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .sampling_noise import prompt_keys

__all__ = ["Answer", "BadAnswer", "EngineLost", "Request", "RequestRefused", "check_answer", "requests_of"]

UNTEMPERED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repetition_ngram_size": 0,
    "repetition_ngram_threshold": 0,
    "ignore_eos": False,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}


class BadAnswer(RuntimeError):
    """An answer that must not be trained on; the prompt is asked again."""


class RequestRefused(RuntimeError):
    """The engine will never answer this request."""


class EngineLost(RuntimeError):
    """The engine is gone or hangs; it must be started again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be drawn. ``seed`` is the prompt's own; the HTTP form of LMDeploy 0.18 has no place for it."""

    index: int
    input_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    greedy: bool = False

    def sampling_settings(self) -> dict[str, Any]:
        """The fields that ``GenerationConfig`` and ``POST /generate`` share, under the names of both."""
        greedy = {"top_k": 1} if self.greedy else {}  # POST /generate samples always: among one word
        return UNTEMPERED | {"stop_token_ids": list(self.stop_ids)} | greedy

    def http_body(self) -> dict[str, Any]:
        """The JSON of ``POST /generate``."""
        return self.sampling_settings() | {
            "input_ids": self.input_ids,
            "max_tokens": self.max_new_tokens,
            "stream": False,
        }

    def generation_arguments(self) -> dict[str, Any]:
        """The keywords of ``lmdeploy.GenerationConfig``."""
        return self.sampling_settings() | {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "random_seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids and finish reason as the engine gave them."""

    token_ids: list[int]
    finish_reason: str | None


def requests_of(prompts: Sequence, seed: int, max_new_tokens: int, stop_ids: tuple[int, ...]) -> list[Request]:
    """One request for each prompt, long prompts first: a response that starts late is alone at the end.

    A prompt's seed depends on the call's seed, the prompt and its number among equal ones, not on its place.
    """
    keys = prompt_keys(prompts, seed)
    requests = [
        Request(index, prompt.policy_ids.tolist(), max_new_tokens, stop_ids, int(keys[index][0] >> np.uint64(1)))
        for index, prompt in enumerate(prompts)
    ]
    return sorted(requests, key=lambda request: -len(request.input_ids))


def check_answer(answer: Answer, request: Request, num_valid_vocab: int) -> tuple[np.ndarray, str]:
    """(token ids [R] int32, finish reason) of an answer that may be trained on.

    BadAnswer says what is wrong with another; RequestRefused is raised for one that the engine has cut off: its PyTorch
    form lowers ``max_new_tokens`` to what its context and cache hold, without a word in the answer.
    """
    ids, reason = answer.token_ids, answer.finish_reason
    if reason not in ("stop", "length"):
        raise BadAnswer(f"finish reason {reason!r} after {len(ids)} tokens")
    if not 0 < len(ids) <= request.max_new_tokens:
        raise BadAnswer(f"{len(ids)} tokens, asked for 1 … {request.max_new_tokens}")
    outside = [i for i in ids if not 0 <= i < num_valid_vocab]
    if outside:
        raise BadAnswer(f"token id {outside[0]} is not among the {num_valid_vocab} words")
    stops = np.isin(ids, request.stop_ids)
    if stops[:-1].any():
        raise BadAnswer(f"{len(ids)} tokens, stop tokens at {np.flatnonzero(stops).tolist()}")
    if reason == "stop" and not stops[-1]:
        raise BadAnswer("finish reason 'stop' without the stop token")
    if reason == "length" and not stops[-1] and len(ids) < request.max_new_tokens:
        raise RequestRefused(
            f"its answer was cut off after {len(ids)} of {request.max_new_tokens} tokens, for want of context or "
            "cache; asked again, such prompts would get short answers only"
        )
    return np.array(ids, dtype=np.int32), "stop" if stops[-1] else "length"
