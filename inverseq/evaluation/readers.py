"""Test sets and files of responses: what evaluation reads.

Test sets, told apart by their first row:
- BeaverTails-Evaluation: rows with ``prompt``, ``category`` and ``category_id``, as a .json list or .jsonl;
- MT-bench: rows with ``question_id``, ``category`` and ``turns``; the second turn is asked behind the first answer;
- XSTest: a .csv with the columns id, prompt and type (the category; unsafe ones begin with ``contrast_``);
- responses of another model or epoch: their ids and conversations are kept, so that the answers pair up;
- what training reads (``inverseq.prompt_files``): HH test splits, ``messages`` or ``prompt`` rows, ``hf:NAME``.

Responses are rows {id, messages, response, model, finish_reason, category?} of one model a file.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..records import Message, Prompt

__all__ = [
    "BEAVERTAILS_CATEGORIES",
    "CATEGORY_SETS",
    "Answer",
    "Pair",
    "Question",
    "Responses",
    "pair_up",
    "question_of",
    "read_categories",
    "read_questions",
    "read_responses",
    "turn_id",
]

BEAVERTAILS_CATEGORIES = {  # as the data set writes them: as a plot does
    "animal_abuse": "animal abuse",
    "child_abuse": "child abuse",
    "controversial_topics,politics": "controversial topics, politics",
    "discrimination,stereotype,injustice": "discrimination, stereotype, injustice",
    "drug_abuse,weapons,banned_substance": "drug abuse, weapons, banned substance",
    "financial_crime,property_crime,theft": "financial crime, property crime, theft",
    "hate_speech,offensive_language": "hate speech, offensive language",
    "misinformation_regarding_ethics,laws_and_safety": "misinformation on ethics, laws and safety",
    "non_violent_unethical_behavior": "non-violent unethical behavior",
    "privacy_violation": "privacy violation",
    "self_harm": "self-harm",
    "sexually_explicit,adult_content": "sexually explicit, adult content",
    "terrorism,organized_crime": "terrorism, organized crime",
    "violence,aiding_and_abetting,incitement": "violence, aiding and abetting, incitement",
}
XSTEST_CATEGORIES = (
    "homonyms figurative_language safe_targets safe_contexts definitions nons_group_real_discr real_group_nons_discr "
    "historical_events privacy_public privacy_fictional contrast_homonyms contrast_figurative_language "
    "contrast_safe_targets contrast_safe_contexts contrast_definitions contrast_discr contrast_historical_events "
    "contrast_privacy"
).split()
MT_BENCH_CATEGORIES = "writing roleplay reasoning math coding extraction stem humanities".split()
CATEGORY_SETS: dict[str, dict[str, str]] = {
    "beavertails": BEAVERTAILS_CATEGORIES,
    "xstest": {name: name.replace("_", " ") for name in XSTEST_CATEGORIES},
    "mt-bench": {name: name for name in MT_BENCH_CATEGORIES},
}
FIRST_IDS = 3  # named in an error


@dataclass(frozen=True, slots=True)
class Question:
    """A test prompt, and what the user says after each answer (MT-bench's second turn)."""

    prompt: Prompt
    follow_ups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of a response file."""

    id: str
    messages: tuple[Message, ...]
    response: str
    finish_reason: str
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Responses:
    """A response file: one model's answers by id, in the file's order."""

    path: Path
    model: str
    answers: dict[str, Answer]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models' answers to one prompt. ``messages`` is what both conversations share; an answer that follows
    different earlier ones (a second turn) begins where they part, as text with the roles named."""

    id: str
    messages: tuple[Message, ...]
    response_a: str
    response_b: str
    category: str | None = None


def read_questions(source: str) -> tuple[list[Question], str]:
    """The questions of a test set, and one line that says what was read.

    Raises ValueError naming file and row for what is not of the format, repeated ids, and unknown BeaverTails
    categories.
    """
    rows = None if source == "bundled" or source.startswith("hf:") else _rows_of(Path(source).expanduser())
    if rows is None:
        from ..prompt_files import load_prompts

        prompts, report = load_prompts(source)
        return [Question(prompt) for prompt in prompts], str(report)
    name, parse = _format_of(rows[0][1])
    questions = [parse(where, row, number) for number, (where, row) in enumerate(rows, start=1)]
    counts = Counter(question.prompt.id for question in questions)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{source}: {len(repeated)} ids stand there twice ({_some(repeated)})")
    return questions, f"{source}: {len(questions)} prompts ({name})"


def _rows_of(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """(where, row) of a file in a format of this module; None when it is for ``inverseq.prompt_files`` to read."""
    if not path.is_file():
        return None
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".json":
        return _json_rows(path)
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if is_gzip else open)(path, "rb") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        first = json.loads(lines[0][1]) if lines else None
    except (OSError, EOFError, ValueError):
        return None  # the other reader says what is wrong
    if not isinstance(first, dict) or _format_of(first)[0] == "":
        return None
    return [(f"{path}:{number}", _json_object(f"{path}:{number}", line)) for number, line in lines]


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(f"{path} row {number}", row) for number, row in enumerate(csv.DictReader(file), 1)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is not a CSV file of UTF-8 text: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    if not {"id", "prompt", "type"} <= set(rows[0][1]):
        raise ValueError(f"{path}: expected the columns id, prompt and type (XSTest); found {', '.join(rows[0][1])}")
    return rows


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects with prompt and category")
    if not _format_of(rows[0])[0]:
        raise ValueError(f"{path}: expected rows of BeaverTails-Evaluation or MT-bench; found {', '.join(rows[0])}")
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def _json_object(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _format_of(row: dict[str, Any]):
    """Name and row parser of a format; an empty name when the row is of none of them."""
    if {"id", "messages", "response"} <= set(row):
        return "responses", _parse_response
    if {"question_id", "turns"} <= set(row):
        return "MT-bench", _parse_mt_bench
    if {"prompt", "category", "category_id"} <= set(row):
        return "BeaverTails-Evaluation", _parse_beavertails
    if {"id", "prompt", "type", "label"} <= set(row) or {"id", "prompt", "type", "focus"} <= set(row):
        return "XSTest", _parse_xstest
    return "", None


def _parse_response(where: str, row: dict[str, Any], number: int) -> Question:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ValueError(f"{where}: messages: expected a list of messages with the texts role and content")
    return _question(_text(where, row, "id"), messages, row.get("category"))


def _parse_mt_bench(where: str, row: dict[str, Any], number: int) -> Question:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where}: turns: expected a list of texts")
    first = [{"role": "user", "content": turns[0]}]
    return _question(f"mt-bench-{row.get('question_id')}", first, row.get("category"), tuple(turns[1:]))


def _parse_beavertails(where: str, row: dict[str, Any], number: int) -> Question:
    category = _text(where, row, "category")
    if category not in BEAVERTAILS_CATEGORIES:
        raise ValueError(
            f"{where}: category={category!r}: expected one of the 14 of BeaverTails-Evaluation "
            f"({', '.join(BEAVERTAILS_CATEGORIES)})"
        )
    return _question(f"beavertails-{number}", [{"role": "user", "content": _text(where, row, "prompt")}], category)


def _parse_xstest(where: str, row: dict[str, Any], number: int) -> Question:
    messages = [{"role": "user", "content": _text(where, row, "prompt")}]
    return _question(f"xstest-{_text(where, row, 'id')}", messages, _text(where, row, "type"))


def _question(id: str, messages: list, category: Any, follow_ups: tuple[str, ...] = ()) -> Question:
    from ..records import Prompt

    return Question(Prompt(id, tuple(messages), None if category is None else str(category)), follow_ups)


def _text(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key}={value!r}: expected a text that is not empty")
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def read_responses(path: Path | str, *, empty: str = "error") -> Responses:
    """The answers of one model. Empty answers are an error, dropped or kept, as ``empty`` (error, drop, keep) says.

    Raises ValueError naming file and row for rows that lack a field, repeated ids, several models in one file, and a
    file without answers.
    """
    from ..sample_files import read_evaluation

    answers: dict[str, Answer] = {}
    models: dict[str, None] = {}
    for row in read_evaluation(path):
        if row["id"] in answers:
            raise ValueError(f"{path}: the id {row['id']!r} stands there twice")
        category = row.get("category")
        answers[row["id"]] = Answer(
            id=row["id"],
            messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in row["messages"]),
            response=row["response"],
            finish_reason=row["finish_reason"],
            category=None if category is None else str(category),
        )
        models[row["model"]] = None
    if len(models) > 1:
        raise ValueError(f"{path}: holds answers of several models ({_some([*models])}); expected one model a file")
    hollow = [key for key, answer in answers.items() if not answer.response.strip()]
    if hollow and empty == "error":
        raise ValueError(
            f"{path}: {len(hollow)} of {len(answers)} responses are empty ({_some(hollow)}); --empty drop leaves them "
            f"out, --empty keep shows them to the judge as they are"
        )
    if empty == "drop":
        answers = {key: answer for key, answer in answers.items() if answer.response.strip()}
    if not answers:
        raise ValueError(f"{path}: holds no responses")
    return Responses(Path(path), next(iter(models)), answers)


def pair_up(a: Responses, b: Responses, *, common: bool = False) -> list[Pair]:
    """The answers of two models to the same prompts, in the order of ``a``.

    Raises ValueError when the files hold one model's name, different ids (unless ``common``, which takes the ids that
    both have), or different questions under one id.
    """
    if a.model == b.model:
        raise ValueError(f"{a.path} and {b.path}: both are of the model {a.model!r}; names must differ")
    only_a, only_b = ([key for key in x.answers if key not in y.answers] for x, y in ((a, b), (b, a)))
    if (only_a or only_b) and not common:
        raise ValueError(
            f"{a.path} and {b.path} do not pair up by id: {len(only_a)} ids are only in the first ({_some(only_a)}), "
            f"{len(only_b)} only in the second ({_some(only_b)}); --common judges those that both have"
        )
    pairs = [_pair(a, b, key) for key in a.answers if key in b.answers]
    if not pairs:
        raise ValueError(f"{a.path} and {b.path} have no id in common")
    return pairs


def _pair(a: Responses, b: Responses, key: str) -> Pair:
    ours, theirs = a.answers[key], b.answers[key]
    asked = [[turn for turn in answer.messages if turn["role"] != "assistant"] for answer in (ours, theirs)]
    if asked[0] != asked[1] or len(ours.messages) != len(theirs.messages):
        raise ValueError(f"{a.path} and {b.path}: id {key!r} is another question in each")
    shared = 0
    while shared < len(ours.messages) and ours.messages[shared] == theirs.messages[shared]:
        shared += 1
    first, second = (_continuation(answer, shared) for answer in (ours, theirs))
    return Pair(key, ours.messages[:shared], first, second, ours.category or theirs.category)


def _continuation(answer: Answer, shared: int) -> str:
    """The answer; with the turns before it, roles named, when the conversations part earlier."""
    turns = [*answer.messages[shared:], {"role": "assistant", "content": answer.response}]
    if len(turns) == 1:
        return answer.response
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def read_categories(sources: Sequence[str], known: dict[str, str] | None) -> dict[str, str]:
    """Category by id of test sets or response files; ValueError for none, contradictions, and unknown categories."""
    categories: dict[str, str] = {}
    for key, category in _iter_categories(sources):
        if known is not None and category not in known:
            raise ValueError(f"id {key!r}: category={category!r}: expected one of {', '.join(known)}")
        if categories.setdefault(key, category) != category:
            raise ValueError(f"id {key!r}: is of category {categories[key]!r} and of {category!r}")
    if not categories:
        raise ValueError(f"{', '.join(sources)}: no row has a category")
    return categories


def _iter_categories(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    for source in sources:
        for question in read_questions(source)[0]:
            if question.prompt.category is not None:
                for turn in range(1, 2 + len(question.follow_ups)):
                    yield turn_id(question.prompt.id, turn), question.prompt.category


def turn_id(id: str, turn: int) -> str:
    """The id of the answer to a question's first turn (1) or to a later one."""
    return id if turn == 1 else f"{id}-turn-{turn}"


def question_of(id: str) -> str:
    """The id of the question that an answer is to, whatever its turn: what ``turn_id`` was given."""
    return re.sub(r"-turn-[1-9][0-9]*$", "", id)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:FIRST_IDS])) + (", …" if len(ids) > FIRST_IDS else "") if ids else "none"
