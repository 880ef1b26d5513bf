"""Chat rendering: a prompt becomes the token ids that the better view, the plain view and the policy read.

A view is rendered whole by the tokenizer's chat template and tokenised once, exactly as
``tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)`` does; a view's prefix is what
stands before the longest token suffix common to all views of the prompt.

System text of the views:
- plain: the conversation's own system message if it has one, else ``plain_system`` (``""`` is an explicit empty
  system message, ``None`` sends none, so that the template shows its own default if it has one);
- better: the plain view's text (the template's default included), a blank line, the principle.
Where a template has no system role the text goes in front of the first user turn, and the log says so.

A special token's text inside a conversation (``</s>``, ``<|im_end|>``) would become a control token. Tokenizers know
no escape for it, so a zero-width space is put behind its first character: the text looks the same and stays text.
Role markers that a tokenizer sees as ordinary text (``USER:``, ``<|user|>`` of Zephyr) are left as they are.
Left out: tools, images, thinking switches.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from .records import Message, Prompt, RenderedPrompt

__all__ = ["ChatRenderer", "load_chat_template", "load_principle"]

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
BREAK = "\u200b"  # zero-width space
PROBE = "Xq7vZk"  # stands for a message's text while the template is examined
SYSTEM_PROBE = "Jw4pTb"
# What a template's own text can do wrong, beyond its syntax: add None to text, read a missing key, divide by zero …
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError)


def load_principle(name: str) -> str | None:
    """The principle's text: a shipped name or a text file's path; None for an empty name.

    Raises ValueError for an unknown name and for a file that is missing, empty or not UTF-8 text.
    """
    return _load_text(name, "contrast.principle", PACKAGE / "principles", ".txt").strip() if name else None


def load_chat_template(name: str) -> str | None:
    """The chat template's text: a shipped name (vicuna, zephyr) or a file's path; None for an empty name.

    Raises ValueError for an unknown name and for a file that is missing, empty or not UTF-8 text.
    """
    return _load_text(name, "model.chat_template", PACKAGE / "templates", ".jinja") if name else None


def _load_text(name: str, key: str, folder: Path, suffix: str) -> str:
    shipped = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    path = shipped.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ValueError(f"{key}={name!r}: expected a text file or a shipped name ({', '.join(shipped)})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}={name!r}: cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{key}={name!r}: the file is empty")
    return text


class ChatRenderer:
    """Renders prompts with a tokenizer's chat template; two views (better, plain) with a principle, else one.

    ``chat_template`` is a template's text and replaces the tokenizer's own. Raises ValueError for a tokenizer without
    chat template or EOS token, a template that cannot render a plain conversation, a blank principle, and an empty
    plain system text where the template would put its default text instead.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        principle_text: str | None = None,
        plain_system: str | None = "",
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.tokenizer_name = tokenizer.name_or_path or type(tokenizer).__name__
        self.chat_template = chat_template
        self.template_name = f"the chat template of {self.tokenizer_name}"
        if chat_template is not None:
            self.template_name = "the template of model.chat_template"
        self.principle_text = principle_text
        self.plain_system = plain_system
        self._control_pattern = _control_pattern(tokenizer)
        if chat_template is None and not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {self.tokenizer_name} has no chat template: pass one by model.chat_template (a file or one "
                f"of the shipped names vicuna and zephyr)"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {self.tokenizer_name} has no EOS token: set eos_token in its tokenizer_config.json"
            )
        self.has_system_role, self.default_system = self._examine_template()
        self._check_views()

    @property
    def num_views(self) -> int:
        return 1 if self.principle_text is None else 2

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """Token ids of all views of one prompt; ValueError naming the prompt when the template refuses it."""
        return self.render_all([prompt])[0]

    def render_all(self, prompts: Sequence[Prompt]) -> list[RenderedPrompt]:
        """Token ids of all views of many prompts, in order; equal to ``render`` one by one, and faster."""
        if not prompts:
            return []
        views = [self.view_ids(prompts, principle) for principle in (self.principle_text, None)[-self.num_views :]]
        return [_split_common_suffix(prompt, ids) for prompt, *ids in zip(prompts, *views, strict=True)]

    def view_ids(self, prompts: Sequence[Prompt], principle: str | None) -> list[np.ndarray]:
        """Token ids of whole conversations, per prompt [P_v + P] int32; the plain view is the one without principle."""
        conversations = [self.conversation(prompt, principle) for prompt in prompts]
        encoded = self.tokenizer(
            self._render_texts(prompts, conversations),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def conversation(self, prompt: Prompt, principle: str | None) -> list[Message]:
        """The messages that the template renders for one view, with special tokens' texts broken."""
        turns = [
            {"role": turn["role"], "content": self._break_control_text(turn["content"])} for turn in prompt.messages
        ]
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else self.plain_system
        if principle is not None:
            shown = self.default_system if system is None else system
            system = f"{shown}\n\n{principle}" if shown else principle
        if self.has_system_role:
            return turns if system is None else [{"role": "system", "content": system}, *turns]
        if system:
            turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
        return turns

    def has_control_text(self, prompt: Prompt) -> bool:
        """Whether the conversation holds a special token's text, which rendering keeps from becoming the token."""
        return any(self._control_pattern.search(message["content"]) for message in prompt.messages)

    def _break_control_text(self, text: str) -> str:
        while self._control_pattern.search(text):
            text = self._control_pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        return text

    def _render_texts(self, prompts: Sequence[Prompt], conversations: list[list[Message]]) -> list[str]:
        try:
            return self._apply_template(conversations)
        except TEMPLATE_ERRORS as error:
            if len(prompts) == 1:
                raise ValueError(
                    f"prompt {prompts[0].id}: {self.template_name} refuses it: {error}"
                ) from error
        # One of them is refused: render one by one, so that the error names it.
        return [self._render_texts([one], [turns])[0] for one, turns in zip(prompts, conversations, strict=True)]

    def _apply_template(self, conversations: list[list[Message]]) -> list[str]:
        return self.tokenizer.apply_chat_template(
            conversations, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def _examine_template(self) -> tuple[bool, str | None]:
        """Whether the template shows a system message, and the system text that it shows when there is none.

        The default is what stands where a given text would: the template is rendered with a system message and
        without, and the surroundings of the message are looked for in the second text. None: no such place.
        """
        user = {"role": "user", "content": PROBE}
        try:
            [bare] = self._apply_template([[user]])
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"{self.template_name} fails on a single user message ({error}): "
                f"pass another one by model.chat_template"
            ) from error
        if PROBE not in bare:
            raise ValueError(
                f"{self.template_name} leaves out user messages: "
                f"pass another one by model.chat_template"
            )
        try:
            [shown] = self._apply_template([[{"role": "system", "content": SYSTEM_PROBE}, user]])
        except TEMPLATE_ERRORS:
            shown = bare
        before, found, after = shown.partition(SYSTEM_PROBE)
        if not found:
            if self.principle_text is not None or self.plain_system:
                logger.info("%s: no system role; system text goes before the first user turn", self.tokenizer_name)
            return False, None
        if bare.startswith(before) and bare.endswith(after) and len(bare) >= len(before) + len(after):
            return True, bare[len(before) : len(bare) - len(after)]
        return True, None

    def _check_views(self) -> None:
        if self.principle_text is not None and not self.principle_text.strip():
            raise ValueError("contrast.principle: the text is empty")
        prompt = Prompt("probe", ({"role": "user", "content": PROBE},))
        if self.plain_system == "" and self.default_system:
            [plain] = self._apply_template([self.conversation(prompt, None)])
            if self.default_system in plain:
                raise ValueError(
                    f"contrast.plain_system='': {self.template_name} puts its own system text in "
                    f"place of an empty one ({self.default_system!r}); pass a text, or null to keep the template's"
                )
        if not all(len(ids) for ids in self.render(prompt).prefix_ids[:-1]):
            raise ValueError(
                f"{self.template_name} shows the same text with and without principle"
            )


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the text of any special token of two or more characters."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = sorted({text for text in (*added, *tokenizer.all_special_tokens) if len(text) > 1})
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _split_common_suffix(prompt: Prompt, views: Sequence[np.ndarray]) -> RenderedPrompt:
    """The record of a prompt from its views' token ids."""
    limit = min(map(len, views))
    tails = np.stack([ids[len(ids) - limit :] for ids in views])
    differing = np.flatnonzero((tails != tails[0]).any(axis=0))
    common = limit - 1 - int(differing[-1]) if len(differing) else limit
    prefixes = tuple(ids[: len(ids) - common] for ids in views)
    return RenderedPrompt(prompt, prefixes, views[-1][len(views[-1]) - common :])
