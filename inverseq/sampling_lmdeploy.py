"""Sampling by LMDeploy on the rank's own GPU, asleep while the policy is trained.

Two forms: a server process, possibly in a Python environment of LMDeploy's own (``inverseq.sampling_lmdeploy_server``),
or an engine in this process (``inverseq.sampling_lmdeploy_pipeline``). New weights come from a saved export, which
always works: the engine is started anew. LMDeploy's PyTorch engine under ray can instead take them out of the trainer's
GPU memory (``sampling.lmdeploy.weights=update``); when it refuses, an export is used from then on. TurboMind's call for
that cannot succeed in LMDeploy 0.18: it uses members that nothing creates.

Nothing here has run on a GPU: what is tested are the forms of requests, answers and calls, against LMDeploy's source.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import SamplingConfig
from .freshness import ProbeAnswer
from .records import RenderedPrompt, Response
from .sampling_lmdeploy_client import Answer, BadAnswer, EngineLost, Request, RequestRefused, check_answer, requests_of
from .sampling_lmdeploy_pipeline import InProcess
from .sampling_lmdeploy_server import ApiServer
from .sampling_lmdeploy_weights import layers_of, serialized
from .sampling_server_weights import save_weights
from .sampling_transformers import data_parallel_rank

__all__ = ["LmdeployError", "LmdeploySampler", "check_lmdeploy"]

logger = logging.getLogger(__name__)


class LmdeployError(RuntimeError):
    """LMDeploy could not answer all prompts; the message says how many are missing."""


class Engine(Protocol):
    """One LMDeploy engine, in either form."""

    form: str
    version: str
    can_update: bool
    is_running: bool

    def start(self, model_dir: Path) -> None: ...
    def stop(self) -> None: ...
    def sleep(self) -> None: ...
    def wake_up(self, tags: Sequence[str] = ...) -> None: ...
    def update(self, payload: str, *, finished: bool) -> None: ...
    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Exception]]: ...


def check_lmdeploy(config: SamplingConfig) -> None:
    """Raise ValueError when LMDeploy cannot run here: no CUDA device, or no such package in its environment.

    Asked first, because LMDeploy itself ends the process where it finds no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "sampling.backend='lmdeploy': needs a CUDA device, and there is none; use sampling.backend=transformers, "
            "or sampling.backend=server with a server on another machine"
        )
    python = config.lmdeploy.python
    if not python:
        if importlib.util.find_spec("lmdeploy") is None:
            raise ValueError(
                "sampling.backend='lmdeploy': the package lmdeploy is not installed; pip install 'inverseq[lmdeploy]', "
                "or name the Python of another environment by sampling.lmdeploy.python"
            )
        return
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmdeploy') is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError as error:
        raise ValueError(f"sampling.lmdeploy.python={python!r}: cannot be run: {error}") from error
    if not found:
        raise ValueError(f"sampling.lmdeploy.python={python!r}: has no package lmdeploy")


class LmdeploySampler:
    """One LMDeploy engine, this rank's."""

    name = "lmdeploy"

    def __init__(
        self,
        config: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: tuple[int, ...],
        num_valid_vocab: int,
        weights_dir: Path | None,
        is_main: bool = True,
        engine: Engine | None = None,
    ):
        """``is_main`` is True for the rank that saves the weights, which all ranks load; nothing is started yet."""
        self.config = config
        self.tokenizer = tokenizer
        self.stop_ids = tuple(i for i in stop_ids if i < num_valid_vocab)
        self.num_valid_vocab = num_valid_vocab
        folder = config.lmdeploy.weights_dir or weights_dir
        if folder is None:
            raise ValueError("sampling.lmdeploy.weights_dir='': expected a folder for the weights that LMDeploy loads")
        self.weights_dir = Path(folder).expanduser().absolute()
        self.is_main = is_main
        log_path = self.weights_dir.with_name(f"lmdeploy_rank{data_parallel_rank()}.log")
        if engine is None:
            engine = InProcess(config) if config.lmdeploy.form == "pipeline" else ApiServer(config, log_path=log_path)
        self.engine = engine
        self.version = f"{engine.version} {engine.form}"
        self.policy: PreTrainedModel | None = None
        self.weights_step = 0
        self.synced_step: int | None = None
        self.is_asleep = False
        self.can_update = engine.can_update
        self.recheck: Callable[[], Any] | None = None
        logger.warning("sampling by LMDeploy has never been verified on a CUDA device by this project")
        if engine.form == "server":
            logger.warning("LMDeploy's server takes no seeds: responses differ from run to run")

    def sync(self, policy: nn.Module, weights_step: int) -> None:
        """Give the engine these weights; nothing when it has those of this step already."""
        if not isinstance(policy, PreTrainedModel):
            raise ValueError(f"policy is a {type(policy).__name__}: expected the PreTrainedModel that is trained")
        self.policy = policy
        if weights_step == self.synced_step:
            return
        if self.config.lmdeploy.weights == "reload":
            self.engine.stop()  # its memory first
            if self.is_main:
                save_weights(policy, self.tokenizer, self.weights_dir, self.stop_ids)
            wait_for_all_ranks()
            release_unused_memory()
            self.engine.start(self.weights_dir)
            self.is_asleep = False
        elif not (self.can_update and self.engine.is_running and self.updated(policy)):
            self.restart()  # alone: the engines of other ranks may have taken the weights
        self.weights_step = self.synced_step = weights_step

    def updated(self, policy: PreTrainedModel) -> bool:
        """Load the weights into the running engine; False, for good, when it does not take them."""
        try:
            if not self.is_asleep:
                self.engine.sleep()
            release_unused_memory()
            self.engine.wake_up(["weights"])
            layers = layers_of(policy)
            layer = next(layers)
            for following in layers:
                self.engine.update(serialized(layer), finished=False)
                layer = following
            self.engine.update(serialized(layer), finished=True)
            self.engine.wake_up(["kv_cache"])
        except Exception as error:  # whatever an engine raises that was not made for it
            logger.warning("LMDeploy did not take the weights, they are reloaded from now on: %s", error)
            self.can_update = False
            return False
        self.is_asleep = False
        return True

    def restart(self) -> None:
        """Start the engine with the weights of the policy as it is, saved for this rank alone.

        The folder of all ranks may hold older weights, or be read by another rank.
        """
        if self.policy is None:
            raise LmdeployError("sync has not given LMDeploy any weights")
        self.engine.stop()
        own = self.weights_dir.with_name(f"{self.weights_dir.name}_rank{data_parallel_rank()}")
        save_weights(self.policy, self.tokenizer, own, self.stop_ids)
        release_unused_memory()
        self.engine.start(own)
        self.is_asleep = False

    def rouse(self) -> None:
        """Wake the engine up if it sleeps."""
        if self.is_asleep:
            release_unused_memory()
            self.engine.wake_up()
            self.is_asleep = False

    def rest(self) -> None:
        """Free the GPU for training; an engine that does not go to sleep is stopped, and the next sync starts it."""
        try:
            self.engine.sleep()
            self.is_asleep = True
        except Exception as error:
            logger.warning("LMDeploy does not go to sleep and is stopped: %s", error)
            self.engine.stop()

    def generate(self, prompts: Sequence[RenderedPrompt], *, seed: int) -> Iterator[tuple[int, Response]]:
        """Yield (index of the prompt, response) as they finish; see ``Sampler.generate``.

        A response that must not be trained on is drawn again; an engine that is gone or hangs is started again with
        the same weights and asked for what is missing. Raises LmdeployError when a prompt's, or the engine's, retries
        are spent, and for an answer that is cut off. The engine sleeps afterwards.
        """
        requests = requests_of(prompts, seed, self.config.max_new_tokens, self.stop_ids)
        total, attempt = len(requests), 0
        try:
            while requests:
                self.bring_up(attempt)
                missing: list[tuple[Request, Exception]] = []
                for request, outcome in self.engine.answers(requests):
                    try:
                        if isinstance(outcome, Exception):
                            raise outcome
                        token_ids, reason = check_answer(outcome, request, self.num_valid_vocab)
                    except (BadAnswer, EngineLost) as error:
                        missing.append((retried(request, outcome), error))
                        continue
                    except RequestRefused as error:
                        raise LmdeployError(
                            f"LMDeploy refuses prompt {prompts[request.index].prompt.id!r}: {error}"
                        ) from error
                    yield request.index, self.response(token_ids, reason, seed)
                requests, attempt = [request for request, _ in missing], attempt + 1
                self.judge(missing, total, attempt)
        finally:
            if total:
                self.rest()

    def bring_up(self, attempt: int) -> None:
        """See to it that the engine runs and is awake, with the weights of the last sync."""
        if self.engine.is_running:
            self.rouse()
            return
        self.restart()
        if attempt and self.recheck is not None:
            self.recheck()

    def judge(self, missing: Sequence[tuple[Request, Exception]], total: int, attempt: int) -> None:
        """Raise LmdeployError when retries are spent; stop an engine that was lost, so that it is started again."""
        if not missing:
            return
        lost = [error for _, error in missing if isinstance(error, EngineLost)]
        error = (lost or [error for _, error in missing])[0]
        state = f"LMDeploy ({self.engine.form}): {len(missing)} of {total} prompts are unanswered"
        if attempt > self.config.lmdeploy.retries:
            raise LmdeployError(f"{state} after {attempt} attempts: {error}") from error
        logger.warning("%s, they are asked again: %s", state, error)
        if lost:
            self.engine.stop()

    def response(self, token_ids: np.ndarray, finish_reason: str, seed: int) -> Response:
        return Response(
            token_ids=token_ids,
            finish_reason=finish_reason,
            seed=seed,
            engine=self.name,
            engine_version=self.version,
            weights_step=self.weights_step,
        )

    def probe(self, prompt: RenderedPrompt, num_tokens: int) -> ProbeAnswer:
        """The engine's greedy continuation of a prompt; LMDeploy's log-probs are of what is left after top_k."""
        self.bring_up(0)
        request = Request(0, prompt.policy_ids.tolist(), num_tokens, self.stop_ids, seed=1, greedy=True)
        [(_, outcome)] = self.engine.answers([request])
        if isinstance(outcome, Exception):
            raise LmdeployError(f"LMDeploy: the probe prompt {prompt.prompt.id!r} failed: {outcome}") from outcome
        token_ids, _ = check_answer(outcome, request, self.num_valid_vocab)
        return ProbeAnswer(token_ids, "")

    def close(self) -> None:
        """Stop the engine."""
        self.engine.stop()


def retried(request: Request, outcome: Answer | Exception) -> Request:
    """The request to be sent again, with another seed where the same one would give the answer that was refused.

    One without an answer keeps its seed: with another, what takes long would become rarer than the policy says it.
    """
    if isinstance(outcome, Exception) or outcome.finish_reason not in ("stop", "length"):
        return request
    return Request(
        request.index, request.input_ids, request.max_new_tokens, request.stop_ids, (request.seed + 1) % 2**63
    )


def release_unused_memory() -> None:
    """Give back what torch keeps for later: an engine with an allocator of its own takes what is free.

    Behind a training phase that is most of the GPU. LMDeploy sizes its cache by what is free when it starts, and wakes
    up with a cache of that size.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def wait_for_all_ranks() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
