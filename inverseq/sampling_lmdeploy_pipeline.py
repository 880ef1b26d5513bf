"""LMDeploy inside this process: one engine on the rank's GPU.

Token ids go through ``AsyncEngine``, for the pipeline itself takes text; the engine's event loop runs in a thread of
the pipeline's. Each request carries its prompt's own seed, so equal calls give equal responses as far as LMDeploy's
kernels do. TurboMind where it supports the architecture, LMDeploy's PyTorch engine otherwise.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import SamplingConfig
from .sampling_lmdeploy_client import Answer, BadAnswer, EngineLost, Request, RequestRefused

__all__ = ["InProcess"]

logger = logging.getLogger(__name__)

LOST = ("ENGINE_UNAVAILABLE",)  # names of lmdeploy's ErrorCode
REFUSED = ("INVALID_REQUEST", "CONTEXT_LENGTH_EXCEEDED", "UNSUPPORTED_FEATURE")


class InProcess:
    """One ``lmdeploy.pipeline``."""

    form = "pipeline"

    def __init__(self, config: SamplingConfig):
        self.batch_size = config.batch_size
        self.share_prompts = config.samples_per_prompt > 1
        self.config = config.lmdeploy
        self.pipe: Any = None

    @property
    def can_update(self) -> bool:
        return self.config.weights == "update"

    @property
    def is_running(self) -> bool:
        return self.pipe is not None

    def start(self, model_dir: Path) -> None:
        """Load the weights in ``model_dir`` into a new engine.

        Raises RuntimeError for the PyTorch engine on another GPU than the process's first: its thread would take that.
        """
        import lmdeploy
        from lmdeploy.archs import autoget_backend

        self.stop()
        backend = "pytorch" if self.config.engine == "pytorch" else autoget_backend(str(model_dir))
        if self.config.engine == "turbomind" and backend != "turbomind":
            raise RuntimeError("sampling.lmdeploy.engine='turbomind': TurboMind does not support this architecture")
        device = torch.cuda.current_device()
        if backend == "pytorch" and device != 0:
            raise RuntimeError(
                f"LMDeploy's PyTorch engine in the process of GPU {device} would run on GPU 0; use "
                "sampling.lmdeploy.form=server"
            )
        arguments = engine_arguments(self.config, backend, self.batch_size, device, share_prompts=self.share_prompts)
        engine_config = lmdeploy.PytorchEngineConfig if backend == "pytorch" else lmdeploy.TurbomindEngineConfig
        self.pipe = lmdeploy.pipeline(str(model_dir), backend_config=engine_config(**arguments), log_level="ERROR")
        logger.info("LMDeploy's %s engine runs %s on GPU %d", backend, model_dir, device)

    def stop(self) -> None:
        """Free the engine and its GPU memory."""
        if self.pipe is None:
            return
        self.pipe.close()
        self.pipe = None
        gc.collect()
        torch.cuda.empty_cache()

    def run(self, coroutine) -> Any:
        """Run a coroutine in the engine's event loop and return its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.pipe.internal_thread.loop)
        return future.result(self.config.timeout_s)

    def sleep(self) -> None:
        """Free the GPU: weights to host memory, the cache away."""
        self.run(self.pipe.async_engine.sleep(1))

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Wake what ``tags`` name (weights, kv_cache), or all that sleeps; a tag that is awake would undo the call."""

        async def wake_up() -> None:
            self.pipe.async_engine.wakeup(list(tags) or None)

        self.run(wake_up())

    def update(self, payload: str, *, finished: bool) -> None:
        """Load tensors given as handles of this GPU's memory; the last call says ``finished``."""
        from lmdeploy.serve.openai.protocol import UpdateParamsRequest

        request = UpdateParamsRequest(serialized_named_tensors=payload, finished=finished)
        self.pipe.async_engine.engine.update_params(request)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Exception]]:
        """Each request with its answer or what went wrong, as they come; as many at once as the engine decodes."""
        results: queue.SimpleQueue = queue.SimpleQueue()

        async def answer_all() -> None:
            slots = asyncio.Semaphore(self.batch_size)

            async def work(request: Request) -> None:
                try:
                    async with slots:
                        answer = await asyncio.wait_for(self.answer(request), self.config.timeout_s)
                    results.put((request, answer))
                except asyncio.CancelledError:
                    raise
                except asyncio.TimeoutError:
                    results.put((request, EngineLost(f"no answer within {self.config.timeout_s:g} s")))
                except Exception as error:
                    results.put((request, error))

            await asyncio.gather(*(work(request) for request in requests))

        running = asyncio.run_coroutine_threadsafe(answer_all(), self.pipe.internal_thread.loop)
        try:
            for _ in requests:
                yield results.get()
        finally:
            running.cancel()

    async def answer(self, request: Request) -> Answer:
        from lmdeploy import GenerationConfig
        from lmdeploy.serve.core.exceptions import RequestError

        engine = self.pipe.async_engine
        ids: list[int] = []
        reason = None
        try:
            prepared = await engine.preprocess(
                messages=None,
                session_id=engine.session_mgr.get(),
                gen_config=GenerationConfig(**request.generation_arguments()),
                do_preprocess=False,
                input_ids=request.input_ids,
            )
            async for part in engine.generate(prepared, stream_response=False):
                ids += part.token_ids or []
                reason = part.finish_reason or reason
        except RequestError as error:
            raise failure(error) from error
        return Answer(ids, reason)

    @property
    def version(self) -> str:
        import lmdeploy

        return lmdeploy.__version__


def failure(error: Any) -> Exception:
    """An lmdeploy ``RequestError`` as what it means for the caller."""
    message = f"{error.code.name}: {error.message}"
    if error.code.name in REFUSED:
        return RequestRefused(message)
    return EngineLost(message) if error.code.name in LOST else BadAnswer(message)


def engine_arguments(config, backend: str, batch_size: int, device: int, *, share_prompts: bool) -> dict[str, Any]:
    """The keywords of ``lmdeploy.TurbomindEngineConfig`` or ``PytorchEngineConfig``: one GPU, weights in its memory."""
    arguments: dict[str, Any] = {
        "tp": 1,
        "max_batch_size": batch_size,
        "cache_max_entry_count": config.cache_fraction,
        # A cache of prompts would outlive an update of the weights, which only a new engine forgets.
        "enable_prefix_caching": share_prompts and config.weights == "reload",
        "enable_metrics": False,
    }
    if backend == "turbomind":
        return arguments | {"devices": [device]}
    return arguments | ({"distributed_executor_backend": "ray"} if config.weights == "update" else {})
