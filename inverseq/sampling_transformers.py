"""Sampling by transformers' continuous batching, on the policy's own weights: nothing is copied or synchronised.

A finished sequence makes room for the next prompt at once, so no step is spent on padding. Prompts that are equal are
read once and the cache is forked; a page of the cache that a prompt shares with an earlier one is read again only where
it has left the cache.

By default the engine's thread draws every token from one torch generator: responses depend on the seed, the weights and
the list of prompts, and are bitwise equal for equal ones. With ``sampling.per_prompt_seeds`` a response depends on its
own prompt only (see ``inverseq.sampling_noise``).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from .config import SamplingConfig
from .freshness import ProbeAnswer
from .records import RenderedPrompt, Response
from .sampling_attention import PAGED_ATTENTION_NAME, needs_paged_attention, paged_attention_is_supported
from .sampling_cache import (
    CUDA_PAGE_TOKENS,
    CUDA_STEP_TOKENS,
    engine_bytes,
    free_cuda_bytes,
    num_layer_groups,
)
from .sampling_noise import gumbel_noise, prompt_keys

__all__ = ["TransformersSampler", "data_parallel_rank", "stop_token_ids"]

# The engine tells its life story at INFO, four times an epoch; warnings and errors are let through.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)

CPU_PAGE_TOKENS = 32  # tokens per page of the key-value cache
CPU_STEP_TOKENS = 256  # prompt and decoded tokens of one forward pass
CUDA_CACHE_FRACTION = 0.8  # of free memory, when the cache of a full batch does not fit
POLL_S = 0.5


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token ids that end a response: the tokenizer's EOS and those of generation_config.json (Llama-3 has several).

    Raises ValueError when there is none: every response would then run to its limit.
    """
    ids: set[int] = set()
    for source in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        ids.update(source if isinstance(source, list | tuple) else () if source is None else (source,))
    if not ids:
        raise ValueError("the tokenizer and generation_config.json name no EOS token: no response could end")
    return tuple(sorted(ids))


class TransformersSampler:
    """Continuous batching on the weights of ``model``, which must be the model that is trained."""

    name = "transformers"
    version = transformers.__version__

    def __init__(
        self,
        config: SamplingConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_valid_vocab: int,
    ):
        self.config = config
        self.model = model
        self.weights_step = 0
        self.num_valid_vocab = num_valid_vocab
        self.stop_ids = tuple(i for i in stop_token_ids(model, tokenizer) if i < num_valid_vocab)
        if not self.stop_ids:
            raise ValueError(f"no EOS token id is among the {num_valid_vocab} words: no response could end")

    def sync(self, policy: nn.Module, weights_step: int) -> None:
        """Note how old the weights are; they are read where they are."""
        if not isinstance(policy, PreTrainedModel):
            raise ValueError(f"policy is a {type(policy).__name__}: expected the PreTrainedModel that is trained")
        self.model = policy
        self.weights_step = weights_step

    def generate(
        self, prompts: Sequence[RenderedPrompt], *, seed: int, lengths: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Response]]:
        """Yield (index of the prompt, response) as they finish; see ``Sampler.generate``.

        ``lengths`` forces each response to have so many tokens, with no token that ends it, for benchmarks.

        While it runs, the model is in evaluation mode with the engine's attention, and torch's global generators are
        the engine's: use neither before the last response is there. Then, or when it is closed early or raises, all of
        them are as before and the engine's thread has ended. Raises RuntimeError for whatever goes wrong in it.
        """
        if not prompts:
            return
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), engine_mode(self.model, self.num_valid_vocab):
            manager, waiting = self.submit(prompts, seed, lengths)
            try:
                with interrupts_held():  # one before the new thread runs would find no thread to end
                    manager.start()
                while waiting:
                    output = next_output(manager)
                    index = waiting.pop(output.request_id)
                    if lengths is None:
                        self.check(output.generated_tokens)
                    yield index, self.response(output.generated_tokens, seed)
            finally:
                try:
                    stop(manager, waiting)
                except KeyboardInterrupt:
                    stop(manager, waiting)  # perhaps before the thread was told
                    raise

    def submit(self, prompts: Sequence[RenderedPrompt], seed: int, lengths: Sequence[int] | None = None):
        """An engine that has all prompts and is not running yet, and the prompt's index of every request's name.

        Long prompts first: a step that reads a long prompt holds up the decoding of the others, and a response that
        starts late is alone at the end. All before the thread starts: what stands together in a batch must not depend
        on how fast two threads run.
        """
        limits, stop_ids = [self.config.max_new_tokens] * len(prompts), self.stop_ids
        groups = equal_prompts(prompts, self.config.batch_size)
        if lengths is not None:
            limits, stop_ids, groups = list(lengths), (-1,), [[index] for index in range(len(prompts))]
        manager = self.model.init_continuous_batching(
            generation_config=self.generation_config(stop_ids),
            continuous_batching_config=self.batching_config(
                [len(prompt.policy_ids) for prompt in prompts], seed, num_forks=max(map(len, groups)) - 1
            ),
        )
        use_paged_attention(self.model)
        if not hasattr(manager, "num_return_sequences"):  # an older release, which cannot fork
            groups = [[index] for index in range(len(prompts))]
        waiting: dict[str, int] = {}
        for first, *others in sorted(groups, key=lambda group: -len(prompts[group[0]].policy_ids)):
            manager.num_return_sequences = 1 + len(others)
            name = manager.add_request(
                prompts[first].policy_ids.tolist(), request_id=str(first), max_new_tokens=limits[first]
            )
            if name is None:
                raise RuntimeError("transformers' continuous batching refused a prompt")
            waiting[name] = first
            waiting.update((f"{name}__child#{i}", index) for i, index in enumerate(others))
        if self.config.per_prompt_seeds:
            use_prompt_noise(manager, prompts, waiting, seed)
        return manager, waiting

    @torch.no_grad()
    def probe(self, prompt: RenderedPrompt, num_tokens: int) -> ProbeAnswer:
        """The greedy continuation of a prompt and its log-probs, with a cache and the engine's attention.

        One token at a time without the engine's thread, whose start and end take longer than all of it.
        """
        ids: list[int] = []
        logprobs: list[float] = []
        inputs, cache = torch.from_numpy(prompt.policy_ids.astype(np.int64))[None].to(self.model.device), DynamicCache()
        with engine_mode(self.model, self.num_valid_vocab):
            while len(ids) < num_tokens and ids[-1:] not in [[i] for i in self.stop_ids]:
                logits_V = self.model(inputs, past_key_values=cache, use_cache=True).logits[0, -1].float()
                best = logits_V.log_softmax(-1).max(-1)
                ids.append(best.indices.item())
                logprobs.append(best.values.item())
                inputs = best.indices.view(1, 1)
        return ProbeAnswer(np.array(ids, np.int32), "", np.array(logprobs, np.float32))

    def close(self) -> None:
        """Nothing is held between two calls of ``generate``."""

    def generation_config(self, stop_ids: Sequence[int] | None = None) -> GenerationConfig:
        """Untempered sampling. The model's generation_config.json is not read, whatever it says."""
        limits = {"max_new_tokens": self.config.max_new_tokens, "eos_token_id": list(stop_ids or self.stop_ids)}
        if self.config.per_prompt_seeds:
            return GenerationConfig(do_sample=False, **limits)  # the largest sum of logit and noise is the draw
        return GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **limits)

    def batching_config(self, prompt_lengths: list[int], seed: int, *, num_forks: int = 0) -> ContinuousBatchingConfig:
        """Cache and batch sizes for these prompts. The engine's own defaults take most of the memory (and time)."""
        on_cuda = self.model.device.type == "cuda"
        page = CUDA_PAGE_TOKENS if on_cuda else CPU_PAGE_TOKENS
        batch_size = min(self.config.batch_size, len(prompt_lengths))
        pages = [-(-(length + self.config.max_new_tokens) // page) for length in prompt_lengths]
        num_blocks: int | None = sum(sorted(pages)[-(batch_size + num_forks) :])  # a forked prompt may overshoot
        if on_cuda and engine_bytes(self.model, num_blocks * page) > free_cuda_bytes() * CUDA_CACHE_FRACTION:
            num_blocks = None  # as many as fit; the engine queues what does not
        known = {item.name for item in fields(ContinuousBatchingConfig)}
        if num_blocks is not None and "page_size" not in known:  # an older release, whose blocks are a group's alone
            num_blocks *= num_layer_groups(self.model)
        options: dict[str, Any] = {
            "page_size" if "page_size" in known else "block_size": page,
            "num_blocks": num_blocks,
            "max_batch_tokens": max(batch_size, CUDA_STEP_TOKENS if on_cuda else CPU_STEP_TOKENS),
            "max_requests_per_batch": batch_size,
            "max_memory_percent": CUDA_CACHE_FRACTION if on_cuda else None,
            "safety_margin": None if num_blocks is None else 0.0,  # the cache holds a full batch: keep nothing back
            "allow_block_sharing": True,
            "auto_switch_to_flash": False,  # engine_mode has chosen
            "seed": seed - data_parallel_rank(),  # the engine adds the rank: the seed is the one that is recorded
        }
        if self.config.per_prompt_seeds or needs_paged_attention(self.model):
            options["use_cuda_graph"] = False  # noise is made, or each sequence's bounds are read, on the host
        if self.config.per_prompt_seeds:
            options["use_async_batching"] = False  # no step ahead of the noise
        # Releases before 5.17 lack some of these; there the cache's size alone bounds the batch.
        return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})

    def check(self, token_ids: Sequence[int]) -> None:
        """Raise RuntimeError for a response that ends where it should not."""
        stops = np.isin(token_ids, self.stop_ids)
        if not (0 < len(stops) <= self.config.max_new_tokens) or stops[:-1].any():
            raise RuntimeError(f"transformers returned {len(stops)} tokens, stop tokens at {np.flatnonzero(stops)}")
        if not stops[-1] and len(stops) < self.config.max_new_tokens:
            raise RuntimeError(f"transformers ended a response after {len(stops)} tokens without a stop token")

    def response(self, token_ids: Sequence[int], seed: int) -> Response:
        """The engine's tokens as a record; the stop token is kept, because ending is an action that is trained."""
        return Response(
            token_ids=np.array(token_ids, dtype=np.int32),
            finish_reason="stop" if token_ids[-1] in self.stop_ids else "length",
            seed=seed,
            engine=self.name,
            engine_version=self.version,
            weights_step=self.weights_step,
        )


@contextmanager
def engine_mode(model: PreTrainedModel, num_valid_vocab: int) -> Iterator[None]:
    """Evaluation mode, an attention that reads a paged cache, and padding words at logit −inf; then all as before."""
    attention = model.config._attn_implementation
    training = {module: module.training for module in model.modules()}

    def mask_padding(module, args, output):
        output.logits[..., num_valid_vocab:] = float("-inf")
        return output

    padded = model.get_output_embeddings().weight.shape[0] > num_valid_vocab
    hook = model.register_forward_hook(mask_padding) if padded else None
    try:
        model.eval()
        model.set_attn_implementation(engine_attention(model))
        yield
    finally:
        if hook is not None:
            hook.remove()
        model.set_attn_implementation(attention)
        for module, was_training in training.items():
            module.training = was_training


def engine_attention(model: PreTrainedModel) -> str:
    """The attention that the engine is made with; ``eager`` reads a plain cache right where the paged one is ours."""
    if needs_paged_attention(model):
        return "eager"
    flash = model.device.type == "cuda" and model.dtype != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def equal_prompts(prompts: Sequence[RenderedPrompt], limit: int) -> list[list[int]]:
    """Indices of prompts, those with equal tokens together, at most ``limit`` of them: each group is read once.

    Every copy reads the prompt's last token itself, so a prompt of one token has nothing to share.
    """
    equal: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        equal.setdefault(prompt.policy_ids.tobytes(), []).append(index)
    groups = []
    for indices in equal.values():
        size = limit if len(prompts[indices[0]].policy_ids) > 1 else 1
        groups += [indices[start : start + size] for start in range(0, len(indices), size)]
    return groups


def data_parallel_rank() -> int:
    """The rank that continuous batching adds to its seed: that of the process, where there are several."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def use_paged_attention(model: PreTrainedModel) -> None:
    """Replace attention that masks a product over the whole batch, or is wrong, by that of each sequence to itself.

    After the engine was made, which knows transformers' own by name only; ``engine_mode`` undoes it.
    """
    if needs_paged_attention(model):
        model.set_attn_implementation(PAGED_ATTENTION_NAME)
        return
    sixteen_bits = model.dtype in (torch.float16, torch.bfloat16)
    on_device = model.device.type != "cuda" or sixteen_bits  # var-len kernels are for 16 bits
    if model.config._attn_implementation == "sdpa" and on_device and paged_attention_is_supported():
        model.set_attn_implementation(PAGED_ATTENTION_NAME)


def use_prompt_noise(manager, prompts: Sequence[RenderedPrompt], names: dict[str, int], seed: int) -> None:
    """Make the engine add each prompt's own noise to its logits. Raises RuntimeError where transformers is too old."""
    try:
        from transformers.generation.continuous_batching import cb_logits_processors as base
    except ImportError as error:
        raise RuntimeError("sampling.per_prompt_seeds needs a newer transformers (5.23 does)") from error
    keys = prompt_keys(prompts, seed)

    class PromptNoise(base.ContinuousBatchingLogitsProcessor):
        """Adds Gumbel noise; one call prepares the rows of the step that the next call computes."""

        supported_kwargs: dict[str, type] = {}
        ignored_kwargs = ()

        def fill_defaults(self, int32_tensor):
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token):
            self.rows = []
            for request in requests_with_new_token:
                index = names_of_all[request.state.request_id]
                position = request.state.position_offset - len(prompts[index].policy_ids)
                self.rows.append((keys[index], position))
            return torch.zeros(len(self.rows), dtype=torch.int32)

        def __call__(self, scores, tensor_arg):
            drawn = len(self.rows)  # rows behind these are of prompts that are not read to the end, and not used
            noise = gumbel_noise(self.rows, scores.shape[-1]).to(scores.device)
            return torch.cat([scores[:drawn] + noise, scores[drawn:]])

    names_of_all = dict(names)  # the caller takes out what is finished
    manager.logit_processor = base.ContinuousBatchingLogitsProcessorList([PromptNoise()])
    manager.logit_processor.tensors_required = 1


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let signals that have a handler in Python wait for the end of the block; they come to the main thread alone."""
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers if callable(signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def next_output(manager):
    """The engine's next finished request; RuntimeError when it failed or the engine's thread has died."""
    while True:
        alive = manager.is_running()
        output = manager.get_result(timeout=POLL_S)
        if output is not None and output.error is not None:
            raise RuntimeError(f"transformers' continuous batching failed: {output.error}")
        if output is not None and output.is_finished():
            return output
        if output is None and not alive:
            raise RuntimeError("transformers' continuous batching ended before all responses were there")


def stop(manager, waiting: dict[str, int]) -> None:
    """End the engine's thread: what still waits is given up, and the thread is joined whatever happened."""
    if not manager.is_running():
        return
    for request_id in waiting:
        manager.cancel_request(request_id)
    manager.stop(block=True, hard_stop=bool(waiting))
    manager.destroy()
