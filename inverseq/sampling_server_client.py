"""Talking to a completions server: one request with its kinds of failure, and many at once with retries.

Built on the ``openai`` package (extra ``server``), whose own retries are off: they would hide a broken connection, and
with it a server that comes back with other weights. The key is read from OPENAI_API_KEY and is written nowhere.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import queue
import random
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .config import ServerConfig
from .sampling_server_protocol import BadAnswer, CompletionsProtocol, NoAnswer, UnfitServer

__all__ = ["Batch", "Client", "RequestOf", "ServerLost", "check_server", "server_version", "why_unreachable"]

logger = logging.getLogger(__name__)

RequestOf = Callable[[int, list[int] | str, int], dict[str, Any]]  # index, prompt, number of the draw → a request

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a request is sent again, doubled each time
QUICK_TIMEOUT_S = 10.0
CLOSING_POLL_S = 0.5
GATEWAY_LOST = (502, 504)  # a gateway says that the server behind it is gone
PASSING = (408, 409, 425, 429)  # and everything from 500 on
VERSION_PATHS = {"vllm": "/version", "sglang": "/get_server_info"}


class ServerLost(Exception):
    """The connection broke: the server may be down, or back with other weights."""


class Overloaded(NoAnswer):
    """An answer that says to come back later, perhaps when."""

    def __init__(self, message: str, retry_after: str | None, *, is_suspect: bool):
        super().__init__(message)
        self.retry_after = retry_after
        self.is_suspect = is_suspect  # True when the server may have been restarted unseen


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"


class Client:
    """One server and the model it is asked for."""

    def __init__(self, config: ServerConfig, model: str):
        self.config = config
        self.model = model

    def open(self) -> Any:
        """An ``openai.AsyncOpenAI`` without retries of its own, to be used in ``async with``."""
        import openai

        timeout = self.config.timeout_s
        return openai.AsyncOpenAI(base_url=self.config.url, api_key=api_key(), max_retries=0, timeout=timeout)

    async def send(self, connection: Any, request: dict[str, Any]) -> Any:
        """One completion. ServerLost when the connection broke, NoAnswer for what may pass, UnfitServer else."""
        import openai

        try:
            create = connection.completions.create(model=self.model, **request)
            return await asyncio.wait_for(create, self.config.timeout_s)
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise Overloaded(f"no answer within {self.config.timeout_s:g} s", None, is_suspect=True) from None
        except openai.APIConnectionError as error:
            raise ServerLost(f"{error} {error.__cause__ or ''}".strip()) from error
        except openai.APIStatusError as error:
            status, message = error.status_code, f"status {error.status_code}: {error.message}"
            if status in GATEWAY_LOST:
                raise ServerLost(message) from error
            if status in PASSING or status >= 500:
                retry_after = error.response.headers.get("retry-after")
                raise Overloaded(message, retry_after, is_suspect=status >= 500) from error
            hint = (
                "; does it take token ids? sampling.server.prompts=text" if isinstance(request["prompt"], list) else ""
            )
            raise UnfitServer(f"{message}{hint}") from error
        except (openai.APIError, ValueError) as error:  # an answer that is not what the protocol says
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    def ask_once(self, request: dict[str, Any]) -> Any:
        """One completion, asked for again as often as the configuration allows; raises what the last attempt did."""

        async def ask() -> Any:
            async with self.open() as connection:
                for attempt in range(self.config.retries + 1):
                    try:
                        completion = await self.send(connection, request)
                        if not completion.choices:
                            raise BadAnswer("no choice in the answer")
                        return completion
                    except (BadAnswer, ServerLost) as error:
                        if attempt == self.config.retries:
                            raise
                        await asyncio.sleep(pause_s(attempt, error))

        return asyncio.run(ask())


class Batch:
    """The requests of one call, sent in their order by an event loop in a thread of its own.

    A context manager: leaving it cancels what is in flight and ends the thread. After the first broken connection
    nothing more is sent, and every prompt that was not in flight comes back as ServerLost.
    """

    def __init__(
        self,
        client: Client,
        protocol: CompletionsProtocol,
        prompts: Sequence[tuple[int, list[int] | str]],
        request_of: RequestOf,
    ):
        self.client = client
        self.protocol = protocol
        self.prompts = prompts
        self.request_of = request_of
        self.results: queue.SimpleQueue = queue.SimpleQueue()
        self.is_lost = False
        self.is_suspect = False  # True when the server may have been restarted unseen
        self.num_redrawn = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.run, name="inverseq-server-requests", daemon=True)

    def __enter__(self) -> Batch:
        self.task = self.loop.create_task(self.answer_all())
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join()
        self.loop.close()
        if self.num_redrawn:
            logger.warning("%s: %d answers were asked for again", self.client.config.url, self.num_redrawn)

    def outcomes(self, closing: threading.Event) -> Iterator[tuple[int, Any]]:
        """(index, Answer or the exception that ended the prompt), one for each prompt, as they come.

        Raises RuntimeError when ``closing`` is set before the last of them is there.
        """
        for _ in self.prompts:
            while True:
                try:
                    outcome = self.results.get(timeout=CLOSING_POLL_S)
                    break
                except queue.Empty:
                    if closing.is_set():
                        raise RuntimeError(f"{self.client.config.url}: closed while answers were due") from None
            yield outcome

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # handed to the caller's thread: without it that would wait forever
            for index, _ in self.prompts:
                self.results.put((index, error))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())

    async def answer_all(self) -> None:
        slots = asyncio.Semaphore(self.client.config.concurrency)
        async with self.client.open() as connection:
            tasks = [asyncio.create_task(self.answer(connection, slots, *prompt)) for prompt in self.prompts]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, connection: Any, slots: asyncio.Semaphore, index: int, prompt: list[int] | str) -> None:
        """Put the outcome of one prompt into the queue."""
        num_refused = 0
        for attempt in range(self.client.config.retries + 1):
            request = self.request_of(index, prompt, num_refused)
            try:
                async with slots:
                    if self.is_lost:
                        raise ServerLost("nothing is sent after a broken connection")
                    completion = await self.send(connection, request)
                outcome: Any = self.protocol.read(completion, request["max_tokens"])
                break
            except BadAnswer as error:
                outcome = error
                self.num_redrawn += 1
                num_refused += not isinstance(error, NoAnswer)
                logger.info("%s: attempt %d at prompt %d: %s", self.client.config.url, attempt + 1, index, error)
                if attempt < self.client.config.retries:
                    await asyncio.sleep(pause_s(attempt, error) if isinstance(error, Overloaded) else 0)
            except Exception as error:
                outcome = error
                break
        self.results.put((index, outcome))

    async def send(self, connection: Any, request: dict[str, Any]) -> Any:
        try:
            return await self.client.send(connection, request)
        except ServerLost:
            self.is_lost = True
            raise
        except Overloaded as error:
            self.is_suspect |= error.is_suspect
            raise


def pause_s(attempt: int, error: Exception) -> float:
    """Seconds until a request is sent again: what the server asks for, else doubling, a little apart from others."""
    try:
        asked_for = float(getattr(error, "retry_after", None) or "")
        return min(max(0.0, asked_for), LONGEST_PAUSE_S)  # in this order "nan" is 0
    except ValueError:
        return min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * random.Random().uniform(0.5, 1.0)


def why_unreachable(config: ServerConfig) -> str | None:
    """What goes wrong in reaching the server; None when it answers at all."""
    import openai

    try:
        list_models(config)
    except openai.APIConnectionError as error:
        return f"{error} {error.__cause__ or ''}".strip()
    except openai.APIError:
        return None  # transformers serve answers 500 without a network
    return None


def list_models(config: ServerConfig) -> list[str]:
    """Names of the models that the server lists."""
    import openai

    with openai.OpenAI(base_url=config.url, api_key=api_key(), max_retries=0, timeout=QUICK_TIMEOUT_S) as client:
        return [model.id for model in client.models.list().data]


def check_server(config: ServerConfig) -> None:
    """Raise ValueError when the package openai is missing, the server cannot be reached, or refuses the model's name.

    A name with {model_dir} is not asked for: its weights do not exist yet.
    """
    if importlib.util.find_spec("openai") is None:
        raise ValueError("sampling.backend='server': needs the package openai; pip install 'inverseq[server]'")
    trouble = why_unreachable(config)
    if trouble is not None:
        raise ValueError(f"sampling.server.url={config.url!r}: cannot be reached: {trouble}")
    if "{" in config.model:
        return
    prompt: list[int] | str = [0] if config.prompts == "ids" else "a"
    try:
        Client(config, config.model).ask_once({"prompt": prompt, "max_tokens": 1, "temperature": 1.0})
    except UnfitServer as error:
        raise ValueError(f"sampling.server.model={config.model!r}: {config.url} refuses it: {error}") from error
    except (BadAnswer, ServerLost) as error:
        raise ValueError(f"sampling.server.url={config.url!r}: a first request failed: {error}") from error


def server_version(config: ServerConfig) -> str:
    """The server's version where its dialect has a place for it."""
    path = VERSION_PATHS.get(config.dialect)
    if path is None:
        return "unknown"
    headers = {"Authorization": f"Bearer {api_key()}"}
    request = urllib.request.Request(config.url.rstrip("/").removesuffix("/v1") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=QUICK_TIMEOUT_S) as answer:
            return str(json.loads(answer.read()).get("version", "unknown"))
    except (OSError, ValueError, AttributeError):
        return "unknown"
