"""LMDeploy as a process of its own: ``lmdeploy serve api_server``, started, watched and stopped by us.

One process for each rank, on the rank's GPU, on a free port of the loopback interface, possibly in another Python
environment (LMDeploy pins other packages than training needs). Requests are ``POST /generate`` with token ids; the
text endpoints would tokenise again. In LMDeploy 0.18 that endpoint takes no seed: responses are drawn from seeds of the
server's own and cannot be repeated. So a late answer ends the run. After a crash what was in flight is drawn anew: long
responses are likelier to be in flight, and this once rarer.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from .config import SamplingConfig
from .sampling_lmdeploy_client import Answer, BadAnswer, EngineLost, Request, RequestRefused

__all__ = ["ApiServer", "server_environment"]

logger = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("sampling_lmdeploy_guard.py")
POLL_S, QUICK_TIMEOUT_S, STOP_S = 0.5, 10.0, 30.0
TAIL = 2000  # characters of the log in an error
PASSING = (408, 409, 425, 429)  # and everything from 500 on
# What a launcher has set for the ranks of training; an engine that reads it would wait for other ranks.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


class ApiServer:
    """One ``lmdeploy serve api_server`` process."""

    form = "server"

    def __init__(self, config: SamplingConfig, *, log_path: Path):
        self.batch_size = config.batch_size
        self.share_prompts = config.samples_per_prompt > 1
        self.config = config.lmdeploy
        self.log_path = log_path
        self.process: subprocess.Popen | None = None
        self.url = ""

    @property
    def can_update(self) -> bool:
        return self.config.weights == "update"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def command(self, model_dir: Path, port: int) -> list[str]:
        """The command line of the server."""
        options: dict[str, Any] = {
            "--server-name": "127.0.0.1",
            "--server-port": port,
            "--backend": "pytorch" if self.config.engine == "pytorch" else "turbomind",  # falls back to pytorch
            "--tp": 1,
            "--max-batch-size": self.batch_size,
            "--cache-max-entry-count": self.config.cache_fraction,
            "--generation-config": "lmdeploy",  # not the model's generation_config.json
            "--log-level": "ERROR",
        }
        if self.can_update:
            options["--distributed-executor-backend"] = "ray"  # the only one of 0.18 that takes weights
        words = [self.config.python or sys.executable, "-m", "lmdeploy", "serve", "api_server", str(model_dir)]
        for name, value in options.items():
            words += [name, str(value)]
        words += ["--disable-metrics"]
        # A cache of prompts would outlive an update of the weights, which only a new process forgets.
        if self.share_prompts and not self.can_update:
            words += ["--enable-prefix-caching"]
        return words

    def start(self, model_dir: Path) -> None:
        """Serve the weights in ``model_dir``; RuntimeError with the end of the log when the server does not come up."""
        self.stop()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with held_port() as holder:  # until the server is there: other ranks look for ports at the same moment
            port = holder.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            command = self.command(model_dir, port)
            self.process = subprocess.Popen(
                [sys.executable, str(GUARD), str(self.log_path), *command],
                stdin=subprocess.PIPE,  # the guard ends the server when this closes, also when we are killed
                env=server_environment(os.environ),
            )
            self.wait_until_healthy(command)
        logger.info("LMDeploy serves %s at %s; its log is %s", model_dir, self.url, self.log_path)

    def wait_until_healthy(self, command: Sequence[str]) -> None:
        deadline = time.monotonic() + self.config.start_s
        while not self.is_healthy():
            if not self.is_running:
                raise RuntimeError(f"`{' '.join(command)}` ended: {self.last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(
                    f"`{' '.join(command)}` did not come up within sampling.lmdeploy.start_s={self.config.start_s:g} "
                    f"seconds: {self.last_words()}"
                )
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End the server and all its processes."""
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def last_words(self) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""
        return f"{text[-TAIL:].strip() or 'it wrote nothing'} ({self.log_path})"

    def is_healthy(self) -> bool:
        try:
            self.ask("GET", "/health", timeout_s=QUICK_TIMEOUT_S)
        except (EngineLost, BadAnswer, RequestRefused):
            return False
        return True

    def sleep(self) -> None:
        """Free the GPU: weights to host memory, the cache away. Raises EngineLost and what ``ask`` raises."""
        self.ask("POST", "/sleep?level=1", {}, timeout_s=self.config.timeout_s)

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Wake what ``tags`` name (weights, kv_cache), or all that sleeps; a tag that is awake would undo the call."""
        query = "&".join(f"tags={tag}" for tag in tags)
        self.ask("POST", f"/wakeup?{query}", {}, timeout_s=self.config.timeout_s)

    def update(self, payload: str, *, finished: bool) -> None:
        """Load tensors given as handles of this GPU's memory; the last call says ``finished``."""
        body = {"serialized_named_tensors": payload, "load_format": None, "finished": finished}
        self.ask("POST", "/update_weights", body, timeout_s=self.config.timeout_s)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Exception]]:
        """Each request with its answer or what went wrong, as they come; as many at once as the engine decodes."""
        results: queue.SimpleQueue = queue.SimpleQueue()
        pool = ThreadPoolExecutor(max_workers=max(1, min(self.batch_size, len(requests))))

        def work(request: Request) -> None:
            try:
                results.put((request, self.answer(request)))
            except Exception as error:
                results.put((request, error))

        try:
            for request in requests:
                pool.submit(work, request)
            for _ in requests:
                yield results.get()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def answer(self, request: Request) -> Answer:
        """The answer to a request; RequestRefused for one that is late.

        It took no seed: asked again it would be drawn anew, and long responses, which are the late ones, become rarer.
        """
        try:
            found = self.ask("POST", "/generate", request.http_body(), timeout_s=self.config.timeout_s)
        except EngineLost as error:
            if not is_late(error):
                raise
            raise RequestRefused(
                f"no answer within sampling.lmdeploy.timeout_s={self.config.timeout_s:g}: drawn again, without a seed, "
                f"such prompts would get short answers only; allow the time of {request.max_new_tokens} tokens"
            ) from error
        try:
            ids = [int(token) for token in found["output_ids"]]
            return Answer(ids, (found["meta_info"]["finish_reason"] or {}).get("type"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadAnswer(f"not an answer of /generate: {str(found)[:200]}") from error

    def ask(self, method: str, path: str, body: dict | None = None, *, timeout_s: float) -> Any:
        """The JSON that the server answers with. EngineLost when it is gone or late, BadAnswer for what may pass."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with DIRECT.open(request, timeout=timeout_s) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            message = f"{method} {path}: status {error.code}: {error.read().decode(errors='replace')[:TAIL]}"
            is_passing = error.code in PASSING or error.code >= 500
            raise (BadAnswer if is_passing else RequestRefused)(message) from error
        except (OSError, HTTPException) as error:  # urllib's errors and timeouts are OSErrors
            raise EngineLost(f"{method} {path}: {error}") from error
        except ValueError as error:
            raise BadAnswer(f"{method} {path}: not JSON: {text[:200]!r}") from error

    @property
    def version(self) -> str:
        """The version of LMDeploy in the server's environment."""
        code = "import importlib.metadata as m; print(m.version('lmdeploy'))"
        done = subprocess.run([self.config.python or sys.executable, "-c", code], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"


def is_late(error: EngineLost) -> bool:
    """Whether it was the time-out that ended a request, and not its connection."""
    cause = error.__cause__
    return isinstance(getattr(cause, "reason", cause), TimeoutError)


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the loopback interface needs no proxy


def held_port() -> socket.socket:
    """A socket that is bound to a free port of the loopback interface and does not listen.

    As long as it is open the system gives that port to nobody, and a connection to it is refused. A server that sets
    SO_REUSEADDR, as asyncio's and Python's own do, can listen there all the same.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a server: without a launcher's, without this Python's paths, and with this rank's GPU alone."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in (*LAUNCHER_VARIABLES, "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        and not name.startswith(LAUNCHER_PREFIXES)
    }
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device].strip() if visible else str(device)
    return kept
