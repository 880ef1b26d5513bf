"""An estimate of the memory of a run, part by part and rank by rank, before any weight is loaded.

Every part is a stated formula of the models' shapes, the configuration and the placement. P is the number of
parameters, b the bytes of a weight (4 in fp32, 2 in bf16), N the number of ranks, M the size of the largest weight, the
other letters are the project's legend (T tokens of a pack, D, V) with I the MLP's width and Q and KV the widths of all
query and key heads. What DeepSpeed holds is in ``memory_zero``. Left out: what torch itself takes (about 0.5 GiB on a
CPU; ``Hardware.usable_bytes`` keeps it free on CUDA), fragmentation, the temporaries of single operations, pages of the
weights' files, which the system may drop, and what checkpoints and exports copy to the host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from .architecture import empty_model
from .config import LoraConfig
from .memory_records import FP32, GIB, PHASES, Hardware, Job, MemoryPart, ModelSize, Placement, Trained
from .memory_zero import zero_parts
from .zero_options import GATHER_NUMEL, LIVE_NUMEL, PREFETCH_NUMEL

__all__ = [
    "GIB",
    "PHASES",
    "Hardware",
    "Job",
    "MemoryPart",
    "ModelSize",
    "Placement",
    "activation_bytes_per_token",
    "adapter_parameters",
    "available_bytes",
    "estimate_memory",
    "host_bytes_of",
    "model_size",
    "needed_bytes",
    "peak_of_phases",
]

CACHE = "keys and values, sampling"
DEFAULT_WORKSPACE_MIB = {"cuda": 512, "cpu": 256}
# Of Linux's control groups, the second version and the first.
CONTAINER_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def model_size(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelSize:
    """The sizes of a model configuration; parameters are counted on the meta device, tied ones once."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
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


def estimate_memory(job: Job, placement: Placement) -> list[MemoryPart]:
    """The parts of one rank's memory under a placement. On CUDA the sampler's cache takes at most what is free."""
    parts = [
        *policy_parts(job, placement),
        *frozen_parts(job, placement),
        *gathered_parts(job, placement),
        *activation_parts(job, placement),
        *operation_parts(job),
    ]
    if job.hardware.device_type != "cuda":
        return parts
    free = job.hardware.usable_bytes - peak_of_phases([part for part in parts if part.name != CACHE])["sample"]
    return [
        part if part.name != CACHE or part.num_bytes <= free
        else replace(part, num_bytes=max(0, free), formula="what is free; sequences without room wait")
        for part in parts
    ]  # fmt: skip


def policy_parts(job: Job, placement: Placement) -> list[MemoryPart]:
    """The policy's weights, and what trains them; under LoRA the whole base, and adapters that alone are trained.

    In one process adapters are fp32; DeepSpeed has one dtype, which is the base's.
    """
    policy, lora, b, stage = job.policy, job.config.policy.lora, job.weight_bytes, placement.zero_stage
    if not lora.rank:
        trained = Trained(policy.num_parameters, policy.hidden * max(policy.vocab, policy.intermediate), b)
        share = -(-trained.count // job.world_size) if stage == 3 else trained.count
        formula, away = "b·P/N" if stage == 3 and job.world_size > 1 else "b·P", placement.offload_parameters
        weights = [MemoryPart("policy weights", share * b, PHASES, formula, away and job.on_gpu)]
    else:
        b = b if stage else FP32
        trained = Trained(adapter_parameters(policy, lora), lora.rank * max(policy.hidden, policy.intermediate), b)
        weights = [
            MemoryPart("policy weights", policy.num_parameters * job.weight_bytes, PHASES, "b·P"),
            MemoryPart("adapters", trained.count * b, PHASES, f"{b}·{trained.count:,}"),
        ]
    return [*weights, *(zero_parts(job, placement, trained) if stage else plain_parts(job, trained))]


def plain_parts(job: Job, trained: Trained) -> list[MemoryPart]:
    """What ``TorchEngine`` holds beside the weights: a 16-bit gradient leaves as soon as it is made."""
    count, largest, b = trained.count, trained.largest, trained.weight_bytes
    parts = [MemoryPart("fp32 master weights", count * FP32, PHASES, "4·P")] if b < FP32 else []
    parts += [
        MemoryPart("AdamW moments", 2 * count * FP32, PHASES, "2·4·P"),
        MemoryPart("gradients", count * FP32, ("train", "update"), "4·P, summed in fp32"),
    ]
    if b < FP32:
        parts.append(MemoryPart("gradient of one weight", b * largest, ("train",), "b·M, until it is summed"))
    if not job.on_gpu:  # the fused optimizer of CUDA makes none
        parts.append(MemoryPart("temporaries of AdamW", 2 * FP32 * largest, ("update",), "2·4·M"))
    return parts


def scoring(job: Job) -> tuple[str, ...]:
    """The phases in which frozen models run."""
    return ("sample", "score") if job.config.sampling.overlap else ("score",)


def adapter_parameters(size: ModelSize, lora: LoraConfig) -> int:
    """Weights of LoRA adapters: rank·(in + out) for each linear layer of a Llama block that gets one."""
    d, i, q, kv = size.hidden, size.intermediate, size.query_width, size.key_value_width
    layers = {
        "q_proj": d + q, "k_proj": d + kv, "v_proj": d + kv, "o_proj": q + d,
        "gate_proj": d + i, "up_proj": d + i, "down_proj": i + d,
    }  # fmt: skip
    names = [name.strip() for name in lora.target_modules.split(",")]
    chosen = layers if names == ["all-linear"] else {name: layers.get(name, d + i) for name in names}
    return size.num_layers * lora.rank * sum(chosen.values())


def frozen_parts(job: Job, placement: Placement) -> list[MemoryPart]:
    """The frozen models; those kept on the host are moved to the device to score. Under LoRA μ is the policy's base."""
    # What is not copied from a policy that stands on the device passes through it, like what is moved there to score.
    loaded = ("load",) * (placement.zero_stage == 3)
    models = [("frozen model", job.policy.num_parameters, "a copy of the initial policy", loaded)]
    if job.config.policy.lora.rank:
        models = []
    if job.plain is not None:
        models.append(("frozen plain model", job.plain.num_parameters, "π_l", ("load",)))
    parts = []
    for name, count, what, loaded in models:
        num_bytes = count * job.weight_bytes
        if placement.frozen == "sharded":
            parts.append(MemoryPart(name, -(-num_bytes // job.world_size), PHASES, f"b·P/N, {what}"))
        elif placement.frozen == "host" and job.on_gpu:
            parts.append(MemoryPart(name, num_bytes, (*loaded, *scoring(job)), f"b·P, {what}; on the host otherwise"))
            parts.append(MemoryPart(f"{name}, host", num_bytes, PHASES, f"b·P, {what}", on_host=True))
        else:
            parts.append(MemoryPart(name, num_bytes, PHASES, f"b·P, {what}"))
    return parts


def gathered_parts(job: Job, placement: Placement) -> list[MemoryPart]:
    """What sharding costs beside its reductions: gathered weights, and the whole copy that a sampler is given.

    Weights are gathered into one buffer and copied out of it, of one rank used where they are: one module's while a
    model is read, layers while it is run.
    """
    b, policy, stage = job.weight_bytes, job.policy, placement.zero_stage
    count, largest = policy.num_parameters, policy.hidden * max(policy.vocab, policy.intermediate)
    parts = []
    sharded_frozen = placement.frozen == "sharded"
    if stage == 3 or sharded_frozen:
        parts.append(MemoryPart("weights as they are read", 2 * b * largest, ("load",), "2·b·M, one after the other"))
    if (stage == 3 or sharded_frozen) and (job.world_size > 1 or placement.offload_parameters):
        live = b * (min(count, LIVE_NUMEL + largest) + min(count, PREFETCH_NUMEL + largest))
        phases = scoring(job) * sharded_frozen + ("train",) * (stage == 3)
        parts.append(MemoryPart("gathered layers", live, phases, "b·(min(P, 1e9 + M) + min(P, 5e7 + M))"))
    if stage == 3:
        parts.append(MemoryPart("whole copy of the policy", count * b, ("sample",), "b·P, while sampling"))
        buffers = 2 * b * min(count, GATHER_NUMEL)
        parts.append(MemoryPart("buffers of its gathering", buffers, ("sample",), "2·b·min(P, 2^28)"))
    if job.config.sampling.backend == "lmdeploy":
        asleep = tuple(phase for phase in PHASES if phase != "sample")
        parts.append(MemoryPart("weights of LMDeploy", count * b, ("sample",), "b·P; asleep they are on the host"))
        parts.append(MemoryPart("weights of LMDeploy, host", count * b, asleep, "b·P, asleep", on_host=True))
    return parts


def activation_parts(job: Job, placement: Placement) -> list[MemoryPart]:
    """What grows with the tokens held at once: keys and values, and the activations of a pack."""
    config, policy, b = job.config, job.policy, job.weight_bytes
    checkpointing = placement.gradient_checkpointing
    train = activation_bytes_per_token(policy, b, checkpointing=checkpointing) * config.packing.train_tokens
    score = (3 * policy.intermediate + 4 * policy.hidden) * b * config.packing.score_tokens
    layers = "layers·D·b + one layer" if checkpointing else "layers·((4b + 8) D + 4b I + 5b Q)"
    parts = [
        MemoryPart("activations, training pack", train, ("train",), f"T·({layers} + (4 + b) D)"),
        MemoryPart("activations, scoring pack", score, scoring(job), "T·(3 I + 4 D)·b, one layer at a time"),
    ]
    if config.sampling.backend in ("transformers", "lmdeploy"):
        together = min(config.sampling.batch_size, -(-config.sampling.samples_per_epoch // job.world_size))
        sampled = together * (job.longest_prompt + config.sampling.max_new_tokens)
        cache = 2 * policy.num_layers * policy.key_value_width * b * sampled
        formula = f"2·layers·KV·b·{together}·(longest prompt + max_new_tokens)"
        parts.append(MemoryPart(CACHE, cache, ("sample",), formula))
    return parts


def operation_parts(job: Job) -> list[MemoryPart]:
    """What the fused operations hold beside their outputs."""
    workspace = (job.config.engine.workspace_mib or DEFAULT_WORKSPACE_MIB[job.hardware.device_type]) * 2**20
    parts = [MemoryPart("workspace of the operations", workspace, (*scoring(job), "train"), "engine.workspace_mib")]
    if job.weight_bytes < FP32 and not job.config.policy.lora.rank:
        accumulator = job.policy.vocab * job.policy.hidden * FP32
        parts.append(MemoryPart("head gradient accumulator", accumulator, ("train",), "4 V·D for 16-bit weights"))
    return parts


def peak_of_phases(parts: Sequence[MemoryPart]) -> dict[str, int]:
    """Estimated bytes of the device held in each phase."""
    return {phase: sum(p.num_bytes for p in parts if phase in p.phases and not p.on_host) for phase in PHASES}


def needed_bytes(parts: Sequence[MemoryPart], device_type: str) -> int:
    """The largest phase. On CUDA the sampler's cache is not counted: it takes what is free and queues the rest."""
    return max(peak_of_phases([p for p in parts if device_type != "cuda" or p.name != CACHE]).values())


def host_bytes_of(parts: Sequence[MemoryPart]) -> int:
    """Estimated bytes that one rank holds in host memory beside its GPU."""
    return sum(part.num_bytes for part in parts if part.on_host)


def available_bytes(device_type: str) -> int:
    """Memory of the device: the GPU's, or the machine's physical memory as far as this container may use it."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])  # "max" is none
