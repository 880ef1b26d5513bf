"""Asking a judge behind an OpenAI-compatible server: concurrency, backoff, a budget, and a cache of every answer.

An answer is written to the cache, durably, before it is used, under a digest of everything that was asked; a run that
was interrupted, or is repeated, asks only what has no answer yet. The key comes from the environment and goes into the
request's header and nowhere else: texts from the server that hold it are written with ``***`` in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..atomic import json_line
from .command import EvaluationError, require_package

__all__ = ["AnswerCache", "Answers", "JudgeClient", "JudgeSettings", "Reply", "ask_all", "question_key"]

logger = logging.getLogger(__name__)

BACKOFF_S = 1.0  # before the first repetition; doubled with each further one
MAX_WAIT_S = 120.0  # between two tries, unless the server asks for more
MAX_ASKED_S = 3600.0  # the most of that which is waited
MAX_FAILURES_IN_A_ROW = 8  # questions that spent all their tries: then the server is taken for down
RETRIED_STATUS = (408, 409, 425, 429)  # and 500 upwards
FATAL_STATUS = (401, 403, 404)
NO_QUOTA = "insufficient_quota"  # a 429 that waiting does not mend


class Fatal(EvaluationError):
    """The server will answer no question: the run stops, and what it has answered is kept."""


class Unanswered(EvaluationError):
    """One question stays without an answer; the others go on."""


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge is asked, and how. ``request`` holds further fields of a chat completion."""

    model: str
    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI's
    key_env: str = "OPENAI_API_KEY"
    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 1024})
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 6
    max_requests: int | None = None  # repeated ones included

    def __post_init__(self):
        if not self.model.strip():
            raise ValueError("--judge: expected the name of a model")
        for name, minimum in (("concurrency", 1), ("retries", 0), ("timeout_s", 0.001)):
            if getattr(self, name) < minimum:
                flag = name.removesuffix("_s")
                raise ValueError(f"--{flag} {getattr(self, name)}: expected {minimum} or more")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url {self.base_url}: expected http://… or https://…")
        if self.max_requests is not None and self.max_requests < 0:
            raise ValueError(f"--max-requests {self.max_requests}: expected 0 or more")

    @property
    def server(self) -> str:
        """The server's address without user, password and query, for keys and messages."""
        parts = urlsplit(self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}".rstrip("/")

    @property
    def api_key(self) -> str | None:
        return os.environ.get(self.key_env, "").strip() or None  # a line end of the file it came from is no part of it

    def check_key(self) -> None:
        """Raise ValueError when OpenAI's own server is to be asked and the environment holds no key."""
        if self.api_key is None and self.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            raise ValueError(
                f"no key for {self.server}: put it into the environment variable {self.key_env} (--key-env names "
                f"another one), or name a server of your own with --base-url"
            )


@dataclass(frozen=True)
class Reply:
    """A judge's answer as it came."""

    raw: str
    finish_reason: str  # the server's word: "stop", "length", "content_filter" …
    refused: bool = False


@dataclass
class Answers:
    """What came of a set of questions: replies and failures by key, and what they cost."""

    replies: dict[str, Reply] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    num_cached: int = 0
    num_requests: int = 0  # repeated ones included
    stopped: str = ""  # why not all questions were asked


def question_key(settings: JudgeSettings, text: str) -> str:
    """A digest of all that an answer depends on: server, model, request fields and text."""
    asked = [settings.server, settings.model, dict(settings.request), text]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by key in a JSON Lines file that is only appended to; a line cut short by a kill is passed over."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.lock = threading.Lock()
        self.replies: dict[str, Reply] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
                self.replies[row["key"]] = Reply(row["raw"], row["finish_reason"], row["refused"])
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    logger.warning("%s: a line that is no answer is passed over", self.path)
        self.needs_newline = bool(content) and not content.endswith(b"\n")

    def put(self, key: str, settings: JudgeSettings, reply: Reply) -> None:
        row = {"key": key, "judge": settings.model, "server": settings.server}
        row |= {"raw": reply.raw, "finish_reason": reply.finish_reason, "refused": reply.refused}
        with self.lock:
            with open(self.path, "ab") as file:
                file.write(b"\n" * self.needs_newline + json_line(row))
                file.flush()
                os.fsync(file.fileno())
            self.needs_newline = False
            self.replies[key] = reply


class JudgeClient:
    """One server. ``ask`` may be called from several threads; its counts and pauses are shared."""

    def __init__(self, settings: JudgeSettings):
        openai = require_package("openai")
        settings.check_key()
        self.settings = settings
        self.openai = openai
        self.client = openai.OpenAI(
            api_key=settings.api_key or "none",
            base_url=settings.base_url,
            timeout=settings.timeout_s,
            max_retries=0,  # repeated requests are counted here
        )
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.ended = ""  # why
        self.num_requests = 0
        self.failures_in_a_row = 0
        self.not_before = 0.0  # a rate limit holds for every thread

    def ask(self, text: str) -> Reply:
        """The judge's answer to one message; waits and repeats when the server is busy, fails or does not answer.

        Raises Unanswered when the tries are spent or this question is turned down, Fatal when no question would be
        answered (key, permission, unknown model, quota) or the budget is spent.
        """
        for attempt in range(self.settings.retries + 1):
            self.wait_for_turn()
            try:
                return self.request(text)
            except self.openai.APIStatusError as error:
                reason = self.describe(error)
                if error.status_code in FATAL_STATUS or error.code == NO_QUOTA:
                    raise Fatal(reason) from None
                if error.status_code < 500 and error.status_code not in RETRIED_STATUS:
                    raise Unanswered(reason) from None
                self.back_off(attempt, error)
            except (self.openai.APIError, ValueError) as error:
                reason = self.describe(error)  # no connection, no answer in time, or one that is no chat completion
                self.back_off(attempt, error)
        raise Unanswered(f"{reason} ({self.settings.retries + 1} tries)")

    def request(self, text: str) -> Reply:
        """One request; ValueError when what comes back is not a chat completion."""
        with self.lock:
            limit = self.settings.max_requests
            if limit is not None and self.num_requests >= limit:
                raise Fatal(f"the budget of {limit} requests is spent")
            self.num_requests += 1
        completion = self.client.chat.completions.create(
            model=self.settings.model,
            messages=[{"role": "user", "content": text}],
            extra_body={name: value for name, value in self.settings.request.items() if value is not None},
        )
        reply = reply_of(completion)
        return dataclasses.replace(reply, raw=self.hide_key(reply.raw))

    def wait_for_turn(self) -> None:
        while (pause := self.not_before - time.monotonic()) > 0 and not self.stop.is_set():
            self.stop.wait(pause)
        if self.stop.is_set():
            raise Fatal(self.ended or "stopped")

    def end(self, reason: str) -> None:
        """Let no thread send anything more; the first reason is the one that is told."""
        with self.lock:
            self.ended = self.ended or reason
        self.stop.set()

    def count(self, failure: Unanswered | None) -> None:
        """Note how one question ended; ends all when too many in a row stayed unanswered."""
        with self.lock:
            self.failures_in_a_row = 0 if failure is None else self.failures_in_a_row + 1
            number = self.failures_in_a_row
        if number == MAX_FAILURES_IN_A_ROW:
            self.end(f"{number} questions in a row stayed unanswered: {failure}")

    def back_off(self, attempt: int, error: Exception) -> None:
        """Let time pass before the next try: what the server asks for, else twice as long each time, with jitter."""
        if attempt == self.settings.retries:
            return
        pause = min(BACKOFF_S * 2**attempt, MAX_WAIT_S) * random.uniform(0.75, 1.25)
        asked = retry_after_s(getattr(error, "response", None))
        if asked is not None or getattr(error, "status_code", None) == 429:
            pause = pause if asked is None else asked
            if pause > MAX_WAIT_S:
                logger.warning("%s asks to wait %.0f s before the next request", self.settings.server, pause)
            with self.lock:
                self.not_before = max(self.not_before, time.monotonic() + pause)
        else:
            self.stop.wait(pause)

    def describe(self, error: Exception) -> str:
        """One line about an error, without the key."""
        kind = f"status {error.status_code}" if hasattr(error, "status_code") else type(error).__name__
        hint = f"; is {self.settings.key_env} set and valid?" if kind in ("status 401", "status 403") else ""
        code = f" ({error.code})" if getattr(error, "code", None) else ""
        text = " ".join(str(error).split())
        return self.hide_key(f"{self.settings.server} ({self.settings.model}): {kind}: {text[:300]}{code}{hint}")

    def hide_key(self, text: str) -> str:
        return text.replace(self.settings.api_key, "***") if self.settings.api_key else text


def reply_of(completion) -> Reply:
    """The text of a chat completion; ValueError when the object is none (a proxy's page, a cut-off body)."""
    try:
        choice = completion.choices[0]
        refusal, content = getattr(choice.message, "refusal", None), choice.message.content
        raw, finish_reason = refusal or content or "", choice.finish_reason or "none"
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("the server's answer is not a chat completion") from None
    if not isinstance(raw, str) or not isinstance(finish_reason, str):
        raise ValueError("the server's answer is not a chat completion of text")
    return Reply(raw, finish_reason, refused=bool(refusal) or finish_reason == "content_filter")


def retry_after_s(response) -> float | None:
    """What a Retry-After header asks for, at most MAX_ASKED_S seconds; None without one that is a finite number."""
    try:
        asked = float(response.headers["retry-after"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return min(max(asked, 0.0), MAX_ASKED_S) if math.isfinite(asked) else None


def ask_all(
    questions: Mapping[str, str],
    settings: JudgeSettings,
    cache: AnswerCache,
    advance: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Replies to all questions (key to text), from the cache or the judge; never raises for what a server does.

    A question that stays unanswered is in ``failures``; what ended the run early is in ``stopped``. An interrupt waits
    for the answers that are on their way, caches them and is raised again.
    """
    answers = Answers({key: cache.replies[key] for key in questions if key in cache.replies})
    answers.num_cached = len(answers.replies)
    advance(answers.num_cached)
    open_questions = [key for key in questions if key not in cache.replies]
    if not open_questions:
        return answers
    client = JudgeClient(settings)

    def ask(key: str) -> Reply:
        try:  # what ends all is known here, before this thread takes the next question
            reply = client.ask(questions[key])
        except Fatal as error:
            client.end(str(error))
            raise
        except Unanswered as error:
            client.count(error)
            raise
        client.count(None)
        cache.put(key, settings, reply)
        return reply

    with ThreadPoolExecutor(settings.concurrency) as pool:
        running: dict[Future, str] = {}
        try:  # what has been submitted would all be asked before an interrupt leaves the pool
            running.update((pool.submit(ask, key), key) for key in open_questions)
            collect(answers, running, advance, stop=lambda: give_up(client, running))
        except BaseException:
            give_up(client, running)
            raise
        finally:
            answers.num_requests = client.num_requests
    answers.stopped = client.ended
    return answers


def collect(
    answers: Answers, running: Mapping[Future, str], advance: Callable[[int], None], stop: Callable[[], None]
) -> None:
    """Enter replies and failures as they come; calls ``stop`` once the judge will answer nothing more."""
    for future in as_completed(running):
        if future.cancelled():
            continue
        error = future.exception()
        if error is None:
            answers.replies[running[future]] = future.result()
            advance(1)
        elif isinstance(error, Unanswered):
            answers.failures[running[future]] = str(error)
        elif isinstance(error, Fatal):
            stop()
        else:
            raise error


def give_up(client: JudgeClient, running: Mapping[Future, str]) -> None:
    """Ask nothing more: waiting threads wake up, questions that have not begun are cancelled."""
    client.stop.set()
    for future in running:
        future.cancel()
