"""A proxy before a real server that passes everything on, but for the faults planned for single completions.

``plan`` maps the number of a completion request (from 0, in the order they arrive) to a fault; see ``FAULTS`` for
those that change an answer, and ``Fault`` for those that prevent one. What passes is kept in ``requests``.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["FAULTS", "Fault", "FaultProxy"]


@dataclass(frozen=True)
class Fault:
    """Instead of an answer: a status (with a Retry-After), silence for some seconds, or a closed connection."""

    status: int = 0
    retry_after: str = ""
    silence_s: float = 0.0
    drop: bool = False


def cut_short(answer: dict) -> None:
    """Fewer tokens than asked for, and no stop token, whatever the answer was: one may consist of that alone."""
    choice = answer["choices"][0]
    choice["text"], choice["finish_reason"] = "w1", "length"
    answer["usage"]["completion_tokens"] = 1


def fail(answer: dict) -> None:
    answer["choices"][0] |= {"finish_reason": "error", "text": "w1"}


def garble(answer: dict) -> None:
    """A text that does not tokenise to ids of that text."""
    answer["choices"][0]["text"] = "w1 \ufffd w2"


def miscount(answer: dict) -> None:
    """A text of other tokens than those that were drawn: their number gives it away."""
    answer["usage"]["completion_tokens"] += 2


def empty(answer: dict) -> None:
    answer["choices"] = []


FAULTS: dict[str, Callable[[dict], None]] = {
    "cut short": cut_short,
    "error": fail,
    "garbled": garble,
    "miscounted": miscount,
    "empty": empty,
}


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # a full queue would make connections wait a second, and look late
    daemon_threads = True


class FaultProxy:
    """A context manager: the proxy runs inside the block, at ``root``."""

    def __init__(self, target: str):
        self.target = target
        self.plan: dict[int, Fault | str] = {}
        self.requests: list[dict] = []
        self.arrived_s: list[float] = []  # when each of them came
        self.delay_s = 0.0  # before each of them is passed on
        self.in_flight = self.most_in_flight = 0
        self.num_refreshes = 0
        self.refresh_bodies: list[dict | None] = []
        self.rewrite: Callable[[dict], None] | None = None  # changes a completion request's body
        self.adapt: Callable[[dict], None] | None = None  # changes a completion
        self.on_refresh: Callable[[], None] | None = None
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                proxy.handle(self, None)

            def do_POST(self):
                proxy.handle(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def log_message(self, *arguments):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = self.pass_on(handler, body)
        finally:
            with self.lock:  # behind the answer the client's next request could come first
                self.in_flight -= 1
        if answer is None:
            handler.close_connection = True
        else:
            self.reply(handler, *answer)

    def pass_on(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> tuple[int, bytes, dict] | None:
        """Status, body and headers of the answer; None when the connection is closed without one."""
        fault: Fault | str | None = None
        if handler.path.endswith("/completions"):
            request = json.loads(body)
            with self.lock:
                fault = self.plan.get(len(self.requests))
                self.requests.append(request)
                self.arrived_s.append(time.monotonic())
            if self.rewrite is not None:
                self.rewrite(request)
                body = json.dumps(request).encode()
        elif handler.path == "/reset":
            with self.lock:
                self.num_refreshes += 1
                self.refresh_bodies.append(json.loads(body) if body else None)
            if self.on_refresh is not None:
                self.on_refresh()
        time.sleep(self.delay_s)
        if isinstance(fault, Fault) and fault.drop:
            return None
        if isinstance(fault, Fault) and fault.silence_s:
            time.sleep(fault.silence_s)
            return None
        if isinstance(fault, Fault):
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return fault.status, b'{"error": {"message": "planned"}}', headers
        status, answer = self.ask_target(handler.path, body)
        if handler.path.endswith("/completions") and status == 200:
            content = json.loads(answer)
            for change in (FAULTS.get(fault), self.adapt):
                if change is not None:
                    change(content)
            answer = json.dumps(content).encode()
        return (status, answer, {}) if status else None  # the server is gone, and so is the connection

    def ask_target(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.target + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def reply(self, handler: BaseHTTPRequestHandler, status: int, answer: bytes, headers: dict[str, str]) -> None:
        try:
            handler.send_response(status)
            for name, value in (headers | {"Content-Type": "application/json"}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(answer)))
            handler.end_headers()
            handler.wfile.write(answer)
        except OSError:
            handler.close_connection = True  # the client has given up
