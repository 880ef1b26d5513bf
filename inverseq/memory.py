"""An estimate of the memory of a run, part by part, before any weight is loaded.

Every part is a stated formula of the models' shapes and the configuration. P is the number of parameters, b the bytes
of a weight (4 in fp32, 2 in bf16), the other letters are the project's legend (T tokens of a pack, D, V) with I the
MLP's width and Q and KV the widths of all query and key heads. Left out: what torch itself takes (about 0.5 GiB on a
CPU, 1 GiB on CUDA), fragmentation, and the temporaries of single operations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .config import Config

__all__ = [
    "PHASES",
    "MemoryPart",
    "ModelSize",
    "activation_bytes_per_token",
    "available_bytes",
    "estimate_memory",
    "model_size",
    "needed_bytes",
    "peak_of_phases",
]

PHASES = ("sample", "score", "train")
FP32 = 4
CACHE = "keys and values, sampling"
DEFAULT_WORKSPACE_MIB = {"cuda": 512, "cpu": 256}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the memory of a causal language model depends on."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_value_width: int
    vocab: int


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a run's memory, and the phases of an epoch in which it is held."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    formula: str


def model_size(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelSize:
    """The sizes of a model configuration; parameters are counted on the meta device, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_width=num_heads * head_dim,
        key_value_width=(getattr(text, "num_key_value_heads", None) or num_heads) * head_dim,
        vocab=text.vocab_size,
    )


def activation_bytes_per_token(size: ModelSize, weight_bytes: int, *, checkpointing: bool) -> int:
    """Bytes that a training forward keeps for its backward, per packed token.

    A Llama block keeps two RMSNorms (2 D in fp32, 4 D in the weights' dtype), the MLP's 4 I, and query, key, value
    and output of the attention with keys and values repeated for all heads, 5 Q. With gradient checkpointing a layer
    keeps its input D, and one layer at a time the rest.
    """
    b = weight_bytes
    layer = size.hidden * (4 * b + 2 * FP32) + 4 * b * size.intermediate + 5 * b * size.query_width
    ends = size.hidden * (FP32 + b)  # the embedding's output and the last norm
    if checkpointing:
        return size.num_layers * size.hidden * b + layer + ends
    return size.num_layers * layer + ends


def estimate_memory(
    config: Config,
    policy: ModelSize,
    plain: ModelSize | None = None,
    *,
    weight_bytes: int,
    device_type: str,
    longest_prompt: int,
) -> list[MemoryPart]:
    """The parts of one process's memory; ``plain`` is π_l's size for the model contrast, else None."""
    b, count = weight_bytes, policy.num_parameters
    parts = [MemoryPart("policy weights", count * b, PHASES, "P·b")]
    if b < FP32:
        parts.append(MemoryPart("fp32 master weights", count * FP32, PHASES, "4 P for 16-bit weights"))
    parts += [
        MemoryPart("AdamW moments", 2 * count * FP32, PHASES, "2·4 P"),
        MemoryPart("gradients", count * FP32, ("train",), "4 P"),
        MemoryPart("frozen model", count * b, PHASES, "P·b, a copy of the initial policy"),
    ]
    if plain is not None:
        parts.append(MemoryPart("frozen plain model", plain.num_parameters * b, PHASES, "P·b of π_l"))
    return parts + activation_parts(config, policy, b, longest_prompt) + operation_parts(config, policy, b, device_type)


def activation_parts(config: Config, policy: ModelSize, b: int, longest_prompt: int) -> list[MemoryPart]:
    """What grows with the tokens held at once: keys and values, and the activations of a pack."""
    sampled = config.sampling.batch_size * (longest_prompt + config.sampling.max_new_tokens)
    checkpointing = config.model.gradient_checkpointing
    train = activation_bytes_per_token(policy, b, checkpointing=checkpointing) * config.packing.train_tokens
    score = (3 * policy.intermediate + 4 * policy.hidden) * b * config.packing.score_tokens
    layers = "layers·D·b + one layer" if checkpointing else "layers·((4b + 8) D + 4b I + 5b Q)"
    parts = [
        MemoryPart("activations, training pack", train, ("train",), f"T·({layers} + (4 + b) D)"),
        MemoryPart("activations, scoring pack", score, ("score",), "T·(3 I + 4 D)·b, one layer at a time"),
    ]
    if config.sampling.backend == "transformers":
        cache = 2 * policy.num_layers * policy.key_value_width * b * sampled
        formula = "2·layers·KV·b·batch_size·(longest prompt + max_new_tokens)"
        parts.append(MemoryPart(CACHE, cache, ("sample",), formula))
    return parts


def operation_parts(config: Config, policy: ModelSize, b: int, device_type: str) -> list[MemoryPart]:
    """What the fused operations hold beside their outputs."""
    workspace = (config.engine.workspace_mib or DEFAULT_WORKSPACE_MIB[device_type]) * 2**20
    parts = [MemoryPart("workspace of the operations", workspace, ("score", "train"), "engine.workspace_mib")]
    if b < FP32:
        accumulator = policy.vocab * policy.hidden * FP32
        parts.append(MemoryPart("head gradient accumulator", accumulator, ("train",), "4 V·D for 16-bit weights"))
    return parts


def peak_of_phases(parts: Sequence[MemoryPart]) -> dict[str, int]:
    """Estimated bytes held in each phase."""
    return {phase: sum(part.num_bytes for part in parts if phase in part.phases) for phase in PHASES}


def needed_bytes(parts: Sequence[MemoryPart], device_type: str) -> int:
    """The largest phase. On CUDA the sampler's cache is not counted: it takes what is free and queues the rest."""
    return max(peak_of_phases([p for p in parts if device_type != "cuda" or p.name != CACHE]).values())


def available_bytes(device_type: str) -> int:
    """Memory of the device: the GPU's, or the machine's physical memory."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
