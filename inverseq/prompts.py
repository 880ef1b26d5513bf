"""Prompts: reading them from files and data sets, and the seeded stream that training draws from.

Formats, decided by a source's first row and then required of every row:
- HH: ``chosen`` and ``rejected`` texts of "\\n\\nHuman: … \\n\\nAssistant: …" turns. The prompt is what both share
  up to the last Assistant turn; the final answers are discarded.
- messages: ``messages``, a list of {"role", "content"}; a final assistant message is discarded.
- prompt: ``prompt``, the text of one user turn, or messages as above; ``chosen`` and ``rejected`` beside it are unread.
A row may carry a ``category``. Rows that hold no usable conversation are counted in the report; rows that are not of
the format are errors naming file and line. Left out: rendering, which a ``Renderer`` (chat.py) does.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .records import Message, Prompt, RenderedPrompt

__all__ = ["PromptStream", "ReadReport", "Renderer", "StreamReport", "load_prompts", "repeat_prompts"]

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parent / "data" / "prompts.jsonl"
ROLES = {"Human": "user", "Assistant": "assistant"}
LAST_ANSWER = "\n\nAssistant:"
ORDER_PURPOSE, HELD_OUT_PURPOSE = 1, 2

Row = tuple[str, int, Any]  # where it stands (for errors), its number, its value
Parser = Callable[[str, dict, Counter], tuple[Message, ...]]


@dataclass
class ReadReport:
    """What became of a source's rows; ``str`` of it is one log line."""

    source: str
    format: str = ""
    num_rows: int = 0
    num_prompts: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    notes: Counter = field(default_factory=Counter)  # rows kept in spite of something
    first_dropped: dict[str, str] = field(default_factory=dict)  # reason -> where

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.num_prompts} prompts from {self.num_rows} rows ({self.format})"]
        parts += [f"dropped {n}: {why} (first {self.first_dropped[why]})" for why, n in self.dropped.items()]
        parts += [f"{n} {what}" for what, n in self.notes.items()]
        return "; ".join(parts)


class _Unusable(Exception):
    """A well-formed row that holds no prompt; its text is the reason that is counted."""


def load_prompts(source: str | Path) -> tuple[list[Prompt], ReadReport]:
    """Read prompts from ``bundled``, a .jsonl or .jsonl.gz file, or ``hf:NAME[:SPLIT]`` (hub name or local folder).

    A prompt's id is the file's stem (or the data set's name and split) and its line (or row) number from 1. Raises
    ValueError naming source and line for what cannot be read, has no rows, or has no usable row.
    """
    if str(source).startswith("hf:"):
        name, _, split = str(source)[len("hf:") :].partition(":")
        if not name:
            raise ValueError(f"{source}: expected hf:NAME or hf:NAME:SPLIT")
        stem, rows = f"{name}:{split or 'train'}", _dataset_rows(name, split or "train")
    else:
        path = BUNDLED if source == "bundled" else Path(source).expanduser()
        stem, rows = path.name.removesuffix(".gz").removesuffix(".jsonl"), _file_rows(path)
    return _parse_rows(rows, stem, ReadReport(str(source)))


def _parse_rows(rows: Iterator[Row], stem: str, report: ReadReport) -> tuple[list[Prompt], ReadReport]:
    prompts: list[Prompt] = []
    parse: Parser | None = None
    for where, number, row in rows:
        report.num_rows += 1
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {_kind(row)}")
        if parse is None:
            report.format, parse = _choose_format(where, row)
        try:
            messages = parse(where, row, report.notes)
        except _Unusable as reason:
            report.dropped[str(reason)] += 1
            report.first_dropped.setdefault(str(reason), where)
            continue
        category = row.get("category")
        prompts.append(Prompt(f"{stem}-{number}", messages, None if category is None else str(category)))
    report.num_prompts = len(prompts)
    if not report.num_rows:
        raise ValueError(f"{report.source}: is empty; expected rows with chosen and rejected, messages, or prompt")
    if not prompts:
        raise ValueError(f"no usable prompt in {report}")
    return prompts, report


def _choose_format(where: str, row: dict) -> tuple[str, Parser]:
    if "messages" in row:
        return "messages", _parse_messages
    if "prompt" in row:
        return "prompt", _parse_prompt
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return "HH", _parse_hh
    keys = ", ".join(map(str, row)) or "none"
    raise ValueError(f"{where}: expected the keys chosen and rejected (texts), messages, or prompt; found {keys}")


def _parse_hh(where: str, row: dict, notes: Counter) -> tuple[Message, ...]:
    chosen, found, answer = _text(where, row, "chosen").rpartition(LAST_ANSWER)
    rejected, found_too, other_answer = _text(where, row, "rejected").rpartition(LAST_ANSWER)
    if not (found and found_too):
        raise _Unusable("no Assistant turn")
    if chosen != rejected:
        raise _Unusable("chosen and rejected differ before the last answer")
    before, *turns = re.split(r"\n\n(Human|Assistant):", chosen)
    if before.strip():
        raise _Unusable("text before the first turn")
    roles, texts = turns[::2], [text.strip() for text in turns[1::2]]
    messages = tuple({"role": ROLES[role], "content": text} for role, text in zip(roles, texts, strict=True))
    _check_turns(messages)
    if not (answer.strip() and other_answer.strip()):
        notes["with an empty final answer, kept"] += 1
    return messages


def _parse_messages(where: str, row: dict, notes: Counter, key: str = "messages") -> tuple[Message, ...]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        found = _kind(turns) if key in row else "no such key"
        raise ValueError(f"{where}: {key}: expected a list of messages, found {found}")
    messages = []
    for index, turn in enumerate(turns):
        here = f"{where}: {key}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{here}: expected an object with role and content, found {_kind(turn)}")
        role = _text(here, turn, "role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{here}: role: expected system, user or assistant, found {role!r}")
        messages.append({"role": role, "content": _text(here, turn, "content")})
    if messages[-1]["role"] == "assistant":
        messages.pop()
        notes["with a final answer, discarded"] += 1
    _check_turns(messages[1:] if messages and messages[0]["role"] == "system" else messages)
    return tuple(messages)


def _parse_prompt(where: str, row: dict, notes: Counter) -> tuple[Message, ...]:
    if isinstance(row.get("prompt"), list):
        return _parse_messages(where, row, notes, key="prompt")
    text = _text(where, row, "prompt")
    if not text.strip():
        raise ValueError(f"{where}: prompt: expected a text, found an empty one")
    return ({"role": "user", "content": text},)


def _check_turns(turns: Sequence[Message]) -> None:
    """Chat templates need user and assistant in turns, a user's first and last, none of them empty."""
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or any(turn["role"] != role for turn, role in zip(turns, expected, strict=False)):
        raise _Unusable("user and assistant do not alternate")
    if not all(turn["content"].strip() for turn in turns):
        raise _Unusable("empty turn")


def _text(where: str, row: dict, key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key}: expected a text, found {_kind(text) if key in row else 'no such key'}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key}: holds half of a surrogate pair, which no tokenizer reads") from None
    return text


def _kind(value: Any) -> str:
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _file_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON Lines file, gzip or not (its first bytes tell); blank lines are skipped."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a .jsonl or .jsonl.gz file (a data set's folder is hf:{path})")
    if path.suffix in (".parquet", ".arrow", ".csv", ".tsv"):
        raise ValueError(f"{path}: is no .jsonl file; a folder of such files is a data set, hf:{path.parent}")
    number = 0
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if is_gzip else raw, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield f"{path}:{number}", number, _parse_json(f"{path}:{number}", line)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a data set on the hub is written hf:NAME[:SPLIT]") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: gzip data is cut off or damaged behind line {number}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse_json(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"{where}: is not JSON: {error.msg} at column {error.colno}"
        raise ValueError(f"{where}; expected one object a line") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where}: is not a row: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: is not a row: nested too deeply") from None


def _dataset_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of a hub data set (streamed), a local folder of its files, or a folder written by ``save_to_disk``."""
    import datasets  # slow to import and needed here only

    folder = Path(name).expanduser()
    source = f"hf:{name}:{split}"
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(folder)
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f"no split {split!r}; it has {', '.join(splits)}")
            rows = splits[split]
        else:
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else name, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{source} row {number}", number, row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source}: cannot be read as a data set: {' '.join(str(error).split())}") from error


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
