"""What epoch_time.py measures with: model shapes with random weights, lengths of prompts and responses, samples.

Nothing is downloaded and no data set is read: the tables below carry their sources. Random weights take the same time
as trained ones; their losses mean nothing. Left out: Llama 3's scaled rotary frequencies, which cost nothing per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from inverseq.attention import ATTENTION_NAME
from inverseq.config import Config, ContrastConfig, ModelConfig, OptimConfig, PackingConfig, SamplingConfig
from inverseq.memory import (
    Hardware,
    Job,
    Placement,
    available_bytes,
    estimate_memory,
    model_size,
    needed_bytes,
)
from inverseq.records import Prompt, RenderedPrompt, Response, Sample

__all__ = [
    "HH_PERCENTILES",
    "HH_PROMPT_TOKENS",
    "HH_RESPONSE_TOKENS",
    "PRESETS",
    "Architecture",
    "baseline_bytes",
    "benchmark_config",
    "build_random_model",
    "estimated_bytes",
    "hh_lengths",
    "largest_preset",
    "make_samples",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of the Llama family; with ``sliding_window`` it is a Mistral."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    source: str
    sliding_window: int | None = None

    def config(self) -> PretrainedConfig:
        """The model configuration; no token ends a response."""
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if self.sliding_window:
            return MistralConfig(**sizes, sliding_window=self.sliding_window)
        return LlamaConfig(**sizes)


# From small to large. Numbers are those of each model's published config.json, named in ``source``.
PRESETS = {
    "tiny": Architecture(64, 128, 2, 4, 2, 512, True, "none: for trying the benchmark itself"),
    "smollm2-135m": Architecture(576, 1536, 30, 9, 3, 49_152, True, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "llama-1b": Architecture(2048, 8192, 16, 32, 8, 128_256, True, "meta-llama/Llama-3.2-1B"),
    "llama-3b": Architecture(3072, 8192, 28, 24, 8, 128_256, True, "meta-llama/Llama-3.2-3B"),
    "vicuna-7b": Architecture(4096, 11_008, 32, 32, 32, 32_000, False, "lmsys/vicuna-7b-v1.5 (Llama-2-7b)"),
    "zephyr-7b": Architecture(
        4096, 14_336, 32, 32, 8, 32_000, False, "HuggingFaceH4/zephyr-7b-beta (Mistral-7B-v0.1)", sliding_window=4096
    ),
    "vicuna-13b": Architecture(5120, 13_824, 40, 40, 40, 32_000, False, "lmsys/vicuna-13b-v1.5 (Llama-2-13b)"),
}

# Token lengths at these percentiles (nearest rank), counted with SmolLM2's tokenizer and ChatML. Prompts: the 199
# usable conversations of 200 rows of Anthropic HH's harmless test split (multi-turn), up to the last human turn,
# without the system text. Responses: the 4,799 non-empty final answers, chosen and rejected, of those and of 2,200
# single-turn helpful and harmless rows, with the token that ends them. HH's answers are short (mean 48 tokens); chat
# models answer longer.
HH_PERCENTILES = (0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 99, 100)
# fmt: off
HH_PROMPT_TOKENS = (
    15, 19, 20, 22, 24, 29, 33, 43, 59, 78, 99, 120, 133, 139, 155, 169, 182, 207, 255, 308, 603, 838,
)
HH_RESPONSE_TOKENS = (
    2, 8, 10, 12, 15, 17, 19, 22, 25, 28, 32, 36, 41, 46, 52, 60, 70, 81, 106, 145, 254, 455,
)
# fmt: on
PRINCIPLE_TOKENS = 125  # what stands before the prompt under the shipped principle, and under the empty system text
PLAIN_TOKENS = 3
MAX_RESPONSE_TOKENS = 1024
SAMPLES_PER_STEP = 16
# So small that weights stay as they are: every variant and repetition trains the same model.
LEARNING_RATE = 1e-12


def hh_lengths(count: int, *, seed: int, response_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of ``count`` prompts and responses, both [count] int64.

    Sample i takes the percentile 100 (i + ½)/count of the table, so that few samples are as mixed as many; prompts and
    responses are shuffled apart. ``response_scale`` multiplies responses, up to 1,024 tokens.
    """
    rng = np.random.default_rng(seed)
    percentiles = 100 * (np.arange(count) + 0.5) / count
    prompts = np.interp(percentiles, HH_PERCENTILES, HH_PROMPT_TOKENS)
    responses = np.interp(percentiles, HH_PERCENTILES, HH_RESPONSE_TOKENS) * response_scale
    lengths = (np.clip(np.rint(values), 1, None).astype(np.int64) for values in (prompts, responses))
    prompts, responses = (rng.permutation(values) for values in lengths)
    return prompts, np.minimum(responses, MAX_RESPONSE_TOKENS)


def make_samples(count: int, *, vocab: int, seed: int = 0, response_scale: float = 1.0) -> list[Sample]:
    """Samples of random token ids with the lengths of ``hh_lengths``; all share a principle and a system text."""
    rng = np.random.default_rng(seed + 1)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, vocab, length).astype(np.int32)

    prefixes = (ids(PRINCIPLE_TOKENS), ids(PLAIN_TOKENS))
    samples = []
    for index, (prompt, response) in enumerate(
        zip(*hh_lengths(count, seed=seed, response_scale=response_scale), strict=True)
    ):
        message = {"role": "user", "content": f"{prompt} random tokens"}
        rendered = RenderedPrompt(Prompt(f"random-{index}", (message,)), prefixes, ids(prompt))
        samples.append(Sample(rendered, Response(ids(response), "length", seed, "random", "0", 0)))
    return samples


def benchmark_config(device_type: str, samples: Sequence[Sample], *, recompute: bool = False) -> Config:
    """The configuration of our side: the shipped recipes' packs and the paper's batch."""
    on_cuda = device_type == "cuda"
    longest = max(len(s.rendered.prefix_ids[0]) + len(s.rendered.prompt_ids) + s.num_actions for s in samples)
    train_tokens, score_tokens = (4096, 16_384) if on_cuda else (2048, 4096)
    return Config(
        model=ModelConfig(path="benchmark", gradient_checkpointing=recompute),
        contrast=ContrastConfig(alpha=1.4),
        sampling=SamplingConfig(
            max_new_tokens=max(sample.num_actions for sample in samples), samples_per_epoch=len(samples)
        ),
        packing=PackingConfig(
            train_tokens=max(train_tokens, longest),
            score_tokens=max(score_tokens, 2 * longest),
        ),
        optim=OptimConfig(lr=LEARNING_RATE, samples_per_step=SAMPLES_PER_STEP),
        run_dir="benchmark",
    )


def build_random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the architecture's initialisation, made on the device, with packed attention."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return model.eval()


def estimated_bytes(
    config: PretrainedConfig,
    samples: Sequence[Sample],
    device_type: str,
    *,
    recompute: bool = False,
    has_optimizer: bool = True,
) -> int:
    """Estimated peak memory of our side, by the estimate that ``--dry-run`` shows."""
    job = Job(
        config=benchmark_config(device_type, samples, recompute=recompute),
        policy=model_size(config),
        plain=None,
        weight_bytes=2 if device_type == "cuda" else 4,
        longest_prompt=max(len(sample.rendered.policy_ids) for sample in samples),
        # The device's size bounds only the sampler's cache, which is not counted on CUDA.
        hardware=Hardware("this machine", device_type, device_bytes=0, host_bytes=None),
    )
    whole = Placement(
        zero_stage=0,
        offload_optimizer=False,
        offload_parameters=False,
        frozen="replicated",
        gradient_checkpointing=recompute,
    )
    parts = estimate_memory(job, whole)
    if not has_optimizer:
        parts = [part for part in parts if "AdamW" not in part.name and "master" not in part.name]
        # Nothing sums gradients in fp32 then: they stay in the weights' dtype.
        share = job.weight_bytes / 4
        parts = [replace(p, num_bytes=int(p.num_bytes * share)) if p.name == "gradients" else p for p in parts]
    return needed_bytes(parts, device_type)


def baseline_bytes(config: PretrainedConfig, samples: Sequence[Sample], device_type: str) -> int:
    """What the baseline's logits take: two padded rows in the model's dtype, with their gradient."""
    longest = max(len(sample.rendered.policy_ids) + sample.num_actions for sample in samples)
    return 2 * 2 * longest * config.get_text_config().vocab_size * (2 if device_type == "cuda" else 4)


def largest_preset(device_type: str, num_samples: int, *, memory_bytes: int | None = None) -> str:
    """The largest preset whose training fits in nine tenths of the device's memory (recomputing where it must).

    On a CPU it is the smallest real one whatever fits: larger ones take hours.
    """
    if device_type != "cuda":
        return "smollm2-135m"
    limit = 0.9 * (available_bytes(device_type) if memory_bytes is None else memory_bytes)
    for name in reversed(PRESETS):
        config = PRESETS[name].config()
        samples = make_samples(num_samples, vocab=PRESETS[name].vocab)
        ours = estimated_bytes(config, samples, device_type, recompute=True)
        if ours + baseline_bytes(config, samples, device_type) <= limit:
            return name
    return "tiny"
