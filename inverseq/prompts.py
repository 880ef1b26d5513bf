"""The seeded stream of prompts that training draws from.

Left out: reading prompts (prompt_files.py), and rendering, which a ``Renderer`` (chat.py) does.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .records import Prompt, RenderedPrompt

__all__ = ["PromptStream", "Renderer", "StreamReport", "repeat_prompts"]

logger = logging.getLogger(__name__)

ORDER_PURPOSE, HELD_OUT_PURPOSE = 1, 2


class Renderer(Protocol):
    """What the stream needs of ``ChatRenderer``."""

    def render_all(self, prompts: Sequence[Prompt]) -> list[RenderedPrompt]: ...
    def has_control_text(self, prompt: Prompt) -> bool: ...


@dataclass(frozen=True)
class StreamReport:
    """What became of the prompts; ``str`` of it is one log line."""

    num_prompts: int
    num_training: int
    num_held_out: int
    num_too_long: int
    num_equal_to_held_out: int  # dropped from training
    max_prompt_tokens: int
    num_control_text: int  # held a special token's text, which was kept from becoming the token
    median_tokens: int  # of the plain view, prompts over the limit left out
    longest_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_prompts} prompts: {self.num_training} to train on, {self.num_held_out} held out, "
            f"{self.num_too_long} dropped over {self.max_prompt_tokens} tokens, "
            f"{self.num_equal_to_held_out} dropped as equal to a held-out one; "
            f"{self.median_tokens} tokens in the median, {self.longest_tokens} at most; "
            f"{self.num_control_text} with a special token's text, kept as text"
        )


class PromptStream:
    """An endless stream of rendered prompts: pass after pass over all of them, in a new seeded order each pass.

    Prompts whose plain view has more than ``max_prompt_tokens`` tokens are dropped and counted. ``held_out`` are the
    first prompts of a permutation that depends on the seed alone; the stream never yields them. With ``shuffle``
    off every pass keeps the given order. Raises ValueError when nothing is left to train on.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        renderer: Renderer,
        *,
        seed: int,
        shuffle: bool = True,
        max_prompt_tokens: int = 1024,
        held_out: int = 0,
    ):
        logger.info("rendering %d prompts", len(prompts))  # about 1 ms each
        rendered = renderer.render_all(prompts)
        kept = [item for item in rendered if len(item.policy_ids) <= max_prompt_tokens]
        if len(kept) <= held_out:
            raise ValueError(
                f"prompts.held_out={held_out}: expected fewer than the {len(kept)} prompts of at most "
                f"{max_prompt_tokens} tokens (prompts.max_prompt_tokens); {len(rendered)} were given"
            )
        chosen = np.random.default_rng([seed, HELD_OUT_PURPOSE]).permutation(len(kept))[:held_out]
        is_held_out = set(chosen.tolist())
        self.held_out = [kept[index] for index in chosen]
        held_out_ids = {item.policy_ids.tobytes() for item in self.held_out}
        others = [item for index, item in enumerate(kept) if index not in is_held_out]
        self.training = [item for item in others if item.policy_ids.tobytes() not in held_out_ids]
        if not self.training:
            raise ValueError(f"prompts.held_out={held_out}: every other prompt is equal to a held-out one")
        self.seed = seed
        self.shuffle = shuffle
        self.report = StreamReport(
            num_prompts=len(rendered),
            num_training=len(self.training),
            num_held_out=len(self.held_out),
            num_too_long=len(rendered) - len(kept),
            num_equal_to_held_out=len(others) - len(self.training),
            max_prompt_tokens=max_prompt_tokens,
            num_control_text=sum(renderer.has_control_text(item.prompt) for item in kept),
            median_tokens=int(np.median([len(item.policy_ids) for item in kept])),
            longest_tokens=max(len(item.policy_ids) for item in kept),
        )
        self._fingerprint = _fingerprint(self.training, self.held_out, seed, shuffle)
        self._pass_index = 0
        self._cursor = 0
        self._order = self._order_of_pass()

    def next(self, count: int, *, copies: int = 1) -> list[RenderedPrompt]:
        """``count`` prompts to answer: the next ``count // copies``, each ``copies`` times (see ``repeat_prompts``).

        A pass that ends on the way is followed by the next one, whose prompts may be copies of those before. Raises
        ValueError when ``copies`` does not divide.
        """
        if count % copies:
            raise ValueError(f"copies={copies}: expected a divisor of count={count}")
        count //= copies
        drawn: list[RenderedPrompt] = []
        while len(drawn) < count:
            if self._cursor == len(self.training):
                self._pass_index, self._cursor = self._pass_index + 1, 0
                self._order = self._order_of_pass()
            taken = self._order[self._cursor : self._cursor + count - len(drawn)]
            drawn += [self.training[index] for index in taken]
            self._cursor += len(taken)
        return repeat_prompts(drawn, copies)

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream stands; plain numbers and text."""
        return {"pass_index": self._pass_index, "cursor": self._cursor, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Stand where ``state`` was taken; ValueError for a state of other prompts, views or settings."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the stored prompt cursor belongs to other prompts: prompts, principle, chat template, tokenizer, "
                "seed, shuffle and held_out must be those of the run that is resumed"
            )
        self._pass_index, self._cursor = state["pass_index"], state["cursor"]
        self._order = self._order_of_pass()

    def _order_of_pass(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.training))
        return np.random.default_rng([self.seed, ORDER_PURPOSE, self._pass_index]).permutation(len(self.training))


def repeat_prompts(prompts: Sequence[RenderedPrompt], times: int) -> list[RenderedPrompt]:
    """All prompts, ``times`` times over, for as many responses; the copy k ≥ 1 of a prompt has the id ``ID#k``.

    A prompt that stands in ``prompts`` again is numbered on, so the ids of the result are distinct. Copies stand
    ``len(prompts)`` apart: in other optimizer steps, and on one rank where the ranks divide the prompts evenly.
    """
    seen: Counter[str] = Counter()
    copies = []
    for item in [*prompts] * times:
        number = seen[item.prompt.id]
        seen[item.prompt.id] += 1
        name = f"{item.prompt.id}#{number}" if number else item.prompt.id
        copies.append(replace(item, prompt=replace(item.prompt, id=name)))
    return copies


def _fingerprint(
    training: Sequence[RenderedPrompt], held_out: Sequence[RenderedPrompt], seed: int, shuffle: bool
) -> str:
    """A digest of everything that decides what the stream yields: ids and token ids in order, seed and shuffle."""
    digest = hashlib.sha256(f"{len(training)} {len(held_out)} {seed} {shuffle}".encode())
    for item in (*training, *held_out):
        digest.update(f"\n{item.prompt.id}".encode())
        for ids in (*item.prefix_ids, item.prompt_ids):
            digest.update(f" {len(ids)} ".encode() + ids.astype("<i4").tobytes())
    return digest.hexdigest()
