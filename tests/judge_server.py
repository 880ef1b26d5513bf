"""A stand-in judge for tests: an OpenAI-compatible server on loopback that answers as a function says, faults included.

``JudgeServer(answer)`` calls ``answer(text, number)`` with the text of the question and the number of the request (from
0) and sends what it returns: a str (the judge's words) or one of the faults below. It keeps every question it was sent,
and those that it answered.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from inverseq.evaluation.cli import main

__all__ = [
    "CutOff",
    "Hang",
    "JudgeServer",
    "Raw",
    "Refusal",
    "Status",
    "by_length",
    "first_shown",
    "judge",
    "results",
    "shown_answers",
    "summary_of",
    "write_answers",
    "write_two_models",
]


@dataclass(frozen=True)
class Status:
    """An error status."""

    code: int
    retry_after: str | None = None
    body: str = '{"error": {"message": "planted", "code": "planted"}}'


@dataclass(frozen=True)
class Hang:
    """No answer for so long; then one."""

    seconds: float
    text: str = "[[A]]"


@dataclass(frozen=True)
class CutOff:
    """An answer that ended at the length limit."""

    text: str


@dataclass(frozen=True)
class Refusal:
    text: str


@dataclass(frozen=True)
class Raw:
    """A body that is no chat completion; half of it when ``broken``: the connection ends early."""

    body: str
    content_type: str = "application/json"
    broken: bool = False


def shown_answers(text: str) -> tuple[str, str]:
    """The answers that a question shows, in the order shown."""
    found = re.search(
        r"^--- (\w+) answer A ---\n(.*?)\n--- \1 answer B ---\n(.*?)\n--- \1 end ---$", text, re.DOTALL | re.MULTILINE
    )
    return found[2], found[3]


def by_length(text: str, number: int = 0) -> str:
    """A judge who prefers the longer answer."""
    first, second = shown_answers(text)
    return "The longer one.\n[[A]]" if len(first) > len(second) else "The longer one.\n[[B]]"


def first_shown(text: str, number: int = 0) -> str:
    """A judge who prefers what is shown first."""
    return "The first one.\n\n[[A]]"


class Handler(BaseHTTPRequestHandler):
    """One request; what it belongs to is ``server.owner``."""

    def do_POST(self):
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        with owner.lock:
            number = len(owner.asked)
            owner.asked.append(text)
            owner.bodies.append(body)
            owner.headers.append({name.lower(): value for name, value in self.headers.items()})
            owner.times.append(time.monotonic())
            owner.running += 1
            owner.most_at_once = max(owner.most_at_once, owner.running)
        try:
            self.reply(owner.answer(text, number), text, body["model"])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has gone

    def reply(self, answer, text, model):
        if isinstance(answer, Hang):
            time.sleep(answer.seconds)
            answer = answer.text
        if isinstance(answer, Status):
            extra = {"retry-after": answer.retry_after} if answer.retry_after else {}
            return self.send(answer.code, answer.body, "application/json", extra)
        if isinstance(answer, Raw):
            return self.send(200, answer.body, answer.content_type, {}, broken=answer.broken)
        message = {"role": "assistant", "content": answer}
        if isinstance(answer, CutOff):
            message["content"] = answer.text
        if isinstance(answer, Refusal):
            message |= {"content": None, "refusal": answer.text}
        reason = "length" if isinstance(answer, CutOff) else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
        self.send(200, json.dumps(completion), "application/json", {})
        with self.server.owner.lock:
            self.server.owner.answered.append(text)

    def send(self, code, body, content_type, extra, broken=False):
        content = body.encode()
        with self.server.owner.lock:
            self.server.owner.running -= 1  # behind the answer the client's next question could come first
        self.send_response(code)
        for name, value in {"content-type": content_type, **extra}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if broken else content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # a full queue would reset connections, faults that no test has planted
    daemon_threads = True


@dataclass
class JudgeServer:
    """Use as a context manager; ``url`` is what ``--base-url`` takes."""

    answer: Callable[[str, int], object]
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    running: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> JudgeServer:
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.owner = self
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def write_answers(path, model, answers, category=None):
    """A file of one model's answers (id to text); returns its name."""
    with open(path, "w") as file:
        for key, answer in answers.items():
            messages = [{"role": "user", "content": f"question {key}"}]
            row = {"id": str(key), "messages": messages, "response": answer, "model": model, "finish_reason": "stop"}
            file.write(json.dumps(row if category is None else {**row, "category": category(key)}) + "\n")
    return str(path)


def write_two_models(folder):
    """Two models' answers to 12 questions: new's are longer on the first 8."""
    new = {key: "n" * (20 if key < 8 else 5) for key in range(12)}
    old = {key: "o" * 10 for key in range(12)}
    return write_answers(folder / "new.jsonl", "new", new), write_answers(folder / "old.jsonl", "old", old)


def judge(files, url, *words, out=None):
    """Exit status of the command; the summary is in the folder of results."""
    options = ["--judge", "stand-in", "--base-url", url, "--yes", *words]
    return main(["judge", "--a", files[0], "--b", files[1], *options, *(["--out", str(out)] if out else [])])


def results(files, out=None):
    """The folder that the command writes to."""
    return Path(out or Path(files[0]).parent / "new-vs-old")


def summary_of(files, out=None):
    """What it found."""
    return json.loads((results(files, out) / "summary.json").read_text())
