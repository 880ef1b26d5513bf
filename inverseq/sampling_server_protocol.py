"""What is sent to a completions server, and which of its answers may be trained on.

A request asks for the policy's own distribution: temperature 1, top_p 1, no penalties, and top_k off where the server
has such a field (``sampling.server.dialect``). An answer is token ids where the server returns them (vLLM and SGLang:
``return_token_ids``). Else its text is tokenised again, and is refused unless the ids decode to that text, and number
as many as the server counted. Then the stop token, which texts leave out, is appended: ending is an action too.

Text alone has two limits. An answer whose tokens are not those that its text tokenises to is drawn again, which
conditions the sampled distribution on the others; and tokenizers that decode two words to one text (SentencePiece at
the start of a word) are refused. Servers that return ids have neither.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .config import ServerConfig
from .records import RenderedPrompt

__all__ = ["Answer", "BadAnswer", "CompletionsProtocol", "NoAnswer", "UnfitServer"]

logger = logging.getLogger(__name__)

COUNTS_STOP_TOKEN = ("vllm", "sglang", "transformers")  # usage.completion_tokens includes it
# What leaves the distribution alone. transformers fills every field that is absent from the served model's
# generation_config.json, also beside a GenerationConfig of the request; no value of these does nothing by itself:
# bad_words_ids, sequence_bias, forced tokens, exponential_decay_length_penalty, top_h, watermarking_config.
UNTEMPERED = {
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 decode to


class BadAnswer(Exception):
    """An answer that must not be trained on; asking again may give another."""


class NoAnswer(BadAnswer):
    """Nothing came that says what was drawn. The same is asked for again: with another seed, what takes long or fails
    for what it says would become rarer than the policy says it."""


class UnfitServer(RuntimeError):
    """The server, or its dialect, cannot give what training needs; asking again is no use."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to one prompt."""

    token_ids: np.ndarray  # [R] int32, the stop token included when it ended there
    finish_reason: str  # "stop" or "length"
    logprobs: np.ndarray | None  # [R] fp32; only a probe asks for them


class CompletionsProtocol:
    """Requests and answers of one server for one tokenizer."""

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: tuple[int, ...],
        num_valid_vocab: int,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.stop_ids = tuple(i for i in stop_ids if i < num_valid_vocab)
        if not self.stop_ids:
            raise ValueError(f"no EOS token id is among the {num_valid_vocab} words: no response could end")
        self.num_valid_vocab = num_valid_vocab
        self.silent_ids = {i for i in tokenizer.all_special_ids if i < num_valid_vocab}  # left out of a text
        self.text_is_checked = False

    def prompt_of(self, rendered: RenderedPrompt) -> list[int] | str:
        """The policy's prompt as the server takes it; UnfitServer when no text tokenises to it."""
        ids = rendered.policy_ids.tolist()
        if self.config.prompts == "ids":
            return ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        bos = self.tokenizer.bos_token or ""
        for candidate in (text, text.removeprefix(bos)):  # servers tokenise as the tokenizer does, adding its BOS
            if self.tokenizer(candidate)["input_ids"] == ids:
                return candidate
        raise UnfitServer(
            f"sampling.server.prompts='text': no text tokenises to prompt {rendered.prompt.id!r}; "
            "expected ids, and a server that takes them (vLLM, SGLang)"
        )

    def request(self, prompt: list[int] | str, num_tokens: int, *, seed: int, greedy: bool = False) -> dict[str, Any]:
        """Arguments of the openai client's ``completions.create``, but for the model's name."""
        request = {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0.0 if greedy else 1.0,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
        }
        if greedy:
            request["logprobs"] = 1
        extra = self.extra_fields(greedy=greedy)
        return request | ({"extra_body": extra} if extra else {})

    def extra_fields(self, *, greedy: bool) -> dict[str, Any]:
        """The dialect's fields beyond OpenAI's.

        vLLM and SGLang fill absent ones from the served model's generation_config.json; −1 is their top_k without a
        limit. transformers takes a GenerationConfig in JSON, would decode greedily without it, and fills it likewise.
        """
        if self.config.dialect == "openai":
            return {}
        if self.config.dialect == "transformers":
            sampling = UNTEMPERED | ({} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0})
            sampling |= {"do_sample": not greedy, "eos_token_id": [*self.stop_ids]}
            return {"generation_config": json.dumps(sampling | {"pad_token_id": self.pad_id()})}
        return {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [*self.stop_ids],
            "return_token_ids": True,
        }

    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else pad

    def read(self, completion: Any, num_tokens: int) -> Answer:
        """The answer in a completion of at most ``num_tokens`` tokens.

        Raises BadAnswer for one that must not be trained on: an error as its finish reason, a stop token inside,
        padding words, text that is not that of its tokens. Raises UnfitServer for fewer tokens than asked for without
        a stop token.
        """
        if not completion.choices:
            raise NoAnswer("no choice in the answer")
        choice = completion.choices[0]
        reason = choice.finish_reason
        if reason not in ("stop", "length"):
            raise NoAnswer(f"finish reason {reason!r}")
        reasons = (getattr(choice, name, None) for name in ("stop_reason", "matched_stop"))
        stopped_by = next((found for found in reasons if found is not None), None)  # a token's id may be 0
        if isinstance(stopped_by, str):
            raise BadAnswer(f"stopped at the text {stopped_by!r}, which is no stop token")
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            ids, reason = self.ids_of_text(choice.text or "", reason, completion.usage, num_tokens)
        ids = [*ids]
        if reason == "stop" and (not ids or ids[-1] not in self.stop_ids):
            ids.append(stopped_by if stopped_by in self.stop_ids else self.default_stop_id())
        self.check_ids(ids, reason, num_tokens)
        token_ids = np.array(ids, dtype=np.int32)
        return Answer(token_ids, "stop" if ids[-1] in self.stop_ids else "length", logprobs_of(choice, len(ids)))

    def check_ids(self, ids: list[int], reason: str, num_tokens: int) -> None:
        """Raise BadAnswer unless these can be the tokens of a whole response, UnfitServer for one that was cut off."""
        if not all(type(i) is int and 0 <= i < self.num_valid_vocab for i in ids):
            raise BadAnswer(f"token ids outside the vocabulary of {self.num_valid_vocab}")
        stops = [i in self.stop_ids for i in ids]
        if any(stops[:-1]):
            raise BadAnswer(f"a stop token is number {stops.index(True) + 1} of {len(ids)} tokens")
        if len(ids) > num_tokens:
            raise BadAnswer(f"{len(ids)} tokens, more than the {num_tokens} asked for")
        if reason == "length" and not stops[-1:] == [True] and len(ids) < num_tokens:
            raise UnfitServer(
                f"an answer was cut off after {len(ids)} of {num_tokens} tokens, for want of context or cache; asked "
                "again, such prompts would get short answers only"
            )

    def default_stop_id(self) -> int:
        """The stop token of an answer that does not say which ended it."""
        eos = self.tokenizer.eos_token_id
        return eos if eos in self.stop_ids else self.stop_ids[0]

    def ids_of_text(self, text: str, reason: str, usage: Any, num_tokens: int) -> tuple[list[int], str]:
        """Token ids of an answer that is only text, without the stop token, and its finish reason."""
        self.check_text_tells_tokens()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.decode(ids, skip_special_tokens=True) != text or REPLACEMENT in text:
            raise BadAnswer("its text does not tokenise to ids of that text")
        count = getattr(usage, "completion_tokens", None)
        if count is None:
            raise UnfitServer(f"{self.config.url}: answers hold neither token ids nor their number (usage)")
        missing = count - len(ids)
        counts_stop = self.config.dialect in COUNTS_STOP_TOKEN
        if reason == "length" and counts_stop and missing == 1 and self.silent_ids <= {*self.stop_ids}:
            return ids, "stop"  # the last of the tokens asked for was the stop token
        expected = (0,) if reason == "length" else (1,) if counts_stop else (0, 1)
        if missing not in expected:
            raise BadAnswer(f"its text tokenises to {len(ids)} tokens, the server counted {count}")
        return ids, reason

    def check_text_tells_tokens(self) -> None:
        """Raise UnfitServer when two words of the vocabulary decode to the same text; looked at once."""
        if self.text_is_checked:
            return
        ids = [i for i in range(self.num_valid_vocab) if i not in self.silent_ids]
        texts = self.tokenizer.batch_decode([[i] for i in ids])
        seen: dict[str, int] = {}
        for i, text in zip(ids, texts, strict=True):
            if text in seen and REPLACEMENT not in text:
                raise UnfitServer(
                    f"{self.config.url}: answers hold no token ids, and this tokenizer's words {seen[text]} and {i} "
                    f"both decode to {text!r}, so that text does not tell them apart; expected a server that returns "
                    "ids (sampling.server.dialect=vllm or sglang)"
                )
            seen[text] = i
        self.text_is_checked = True
        logger.warning(
            "%s: answers hold no token ids; they are tokenised again, and drawn again where the text does not tell "
            "its tokens, which conditions the sampled distribution",
            self.config.url,
        )


def logprobs_of(choice: Any, num_tokens: int) -> np.ndarray | None:
    """What the server says of the answer's tokens, [R] fp32; None when it says nothing or not of every token."""
    values = getattr(getattr(choice, "logprobs", None), "token_logprobs", None)
    if not values or len(values) != num_tokens or any(value is None for value in values):
        return None
    return np.array(values, dtype=np.float32)
