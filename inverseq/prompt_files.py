"""Reading prompts from files and data sets.

Formats, decided by a source's first row and then required of every row:
- HH: ``chosen`` and ``rejected`` texts of "\\n\\nHuman: … \\n\\nAssistant: …" turns. The prompt is what both share
  up to the last Assistant turn; the final answers are discarded.
- messages: ``messages``, a list of {"role", "content"}; a final assistant message is discarded.
- prompt: ``prompt``, the text of one user turn, or messages as above; ``chosen`` and ``rejected`` beside it are unread.
A row may carry a ``category``. Rows that hold no usable conversation are counted in the report; rows that are not of
the format are errors naming file and line.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import Message, Prompt

__all__ = ["ReadReport", "load_prompts"]

BUNDLED = Path(__file__).parent / "data" / "prompts.jsonl"
ROLES = {"Human": "user", "Assistant": "assistant"}
LAST_ANSWER = "\n\nAssistant:"

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
