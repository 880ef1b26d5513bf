"""An estimate of the memory of a run, part by part and rank by rank, before any weight is loaded.

Every part is a stated formula of the models' shapes, the configuration and the placement. P is the number of
parameters, b the bytes of a weight (4 in fp32, 2 in bf16), N the number of ranks, the other letters are the project's
legend (T tokens of a pack, D, V) with I the MLP's width and Q and KV the widths of all query and key heads. The shares
of ZeRO are those of its paper (arXiv 1910.02054) with fp32 accumulation of the gradients. Left out: what torch itself
takes (about 0.5 GiB on a CPU; ``Hardware.usable_bytes`` keeps it free on CUDA), fragmentation, and the temporaries of
single operations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .config import Config, LoraConfig

__all__ = [
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

PHASES = ("sample", "score", "train")
FP32 = 4
GIB = 2**30
CACHE = "keys and values, sampling"
DEFAULT_WORKSPACE_MIB = {"cuda": 512, "cpu": 256}
# DeepSpeed's defaults, in elements: a reduction bucket, and the parameters that ZeRO-3 holds gathered or prefetched.
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000 + 50_000_000
# Of a GPU: the CUDA context, NCCL's buffers and cuBLAS's workspaces, and the share that fragmentation may take.
CUDA_RESERVE_BYTES, CUDA_USABLE_SHARE = 2 * GIB, 0.95


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
class Hardware:
    """The devices that a run's ranks stand on, one rank a GPU, or all ranks of a host sharing its memory."""

    name: str
    device_type: str  # "cuda" or "cpu"
    device_bytes: int  # memory of one GPU, or of the host
    host_bytes: int | None  # memory of a host; None is unknown and never checked
    ranks_per_host: int = 1

    @property
    def rank_bytes(self) -> int:
        """Bytes of the device that one rank has."""
        return self.device_bytes if self.device_type == "cuda" else self.device_bytes // self.ranks_per_host

    @property
    def usable_bytes(self) -> int:
        """Bytes of a rank that a plan may fill."""
        if self.device_type == "cuda":
            return int(self.device_bytes * CUDA_USABLE_SHARE) - CUDA_RESERVE_BYTES
        return self.rank_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """What has to be placed."""

    config: Config
    policy: ModelSize
    plain: ModelSize | None  # π_l of the model contrast
    weight_bytes: int  # 2 or 4 bytes a weight
    longest_prompt: int  # tokens
    hardware: Hardware
    world_size: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the models stand. ``reasons`` are lines for the log, ``phase_bytes`` the estimate of each phase."""

    zero_stage: int  # 0 is no sharding: one process, or plain data parallelism
    offload_optimizer: bool  # optimizer state, fp32 masters and gradients in host memory
    offload_parameters: bool  # the policy's weights too (stage 3 only)
    frozen: str  # "replicated" on every rank, "sharded" over the ranks (ZeRO-3), or on the "host" while not scoring
    gradient_checkpointing: bool
    reasons: tuple[str, ...] = ()
    phase_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a rank's memory, and the phases of an epoch in which it is held."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    formula: str
    on_host: bool = False  # beside a GPU; on a CPU everything is on the device


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
    """Weights, fp32 masters, AdamW's moments and gradients, each whole or one rank's share of it.

    ZeRO keeps fp32 masters apart from the weights even when these are fp32. A 16-bit gradient is added to its fp32 sum
    and dropped as soon as the backward pass has made it (ZeRO-1 widens it first), unless ZeRO-2 and 3 reduce it bucket
    by bucket. ZeRO-1 on 16-bit weights and ZeRO-3 keep the memory of their sums from one step to the next.
    """
    b, count, stage = job.weight_bytes, job.policy.num_parameters, placement.zero_stage
    if job.config.policy.lora.rank:
        return [MemoryPart("policy weights", count * b, PHASES, "b·P"), *adapter_parts(job, stage)]
    on_gpu = job.hardware.device_type == "cuda"
    offload_optimizer = placement.offload_optimizer and on_gpu
    offload_parameters = placement.offload_parameters and on_gpu

    def share(from_stage: int) -> tuple[int, str]:
        sharded = stage >= from_stage and job.world_size > 1
        return (-(-count // job.world_size), "P/N") if sharded else (count, "P")

    (weights, w), (optimizer, o), (gradients, g) = share(3), share(1), share(2)
    held = PHASES if stage == 3 or (stage == 1 and b < FP32 and not offload_optimizer) else ("train",)
    parts = [MemoryPart("policy weights", weights * b, PHASES, f"b·{w}", offload_parameters)]
    if b < FP32 or stage >= 1:
        parts.append(MemoryPart("fp32 master weights", optimizer * FP32, PHASES, f"4·{o}", offload_optimizer))
    parts += [
        MemoryPart("AdamW moments", 2 * optimizer * FP32, PHASES, f"2·4·{o}", offload_optimizer),
        MemoryPart("gradients", gradients * FP32, held, f"4·{g}, summed in fp32", offload_optimizer),
    ]
    if stage < 2 and b < FP32:
        largest = job.policy.hidden * max(job.policy.vocab, job.policy.intermediate)
        widened, formula = (FP32, "(b + 4)") if stage else (0, "b")
        formula = f"{formula}·max(V·D, I·D), until it is summed"
        parts.append(MemoryPart("gradient of one weight", (b + widened) * largest, ("train",), formula))
    return parts


def adapter_parts(job: Job, stage: int) -> list[MemoryPart]:
    """Adapters and what trains them: in fp32 in one process, under ZeRO in the base's dtype with fp32 masters.

    Gradients are counted whole: what ZeRO-2 saves of so few is less than its buckets take.
    """
    count = adapter_parameters(job.policy, job.config.policy.lora)
    if stage == 0:
        return [
            MemoryPart("adapters", count * FP32, PHASES, f"4·{count:,} in fp32"),
            MemoryPart("AdamW moments", 2 * count * FP32, PHASES, "2·4 per adapter weight"),
            MemoryPart("gradients", count * FP32, ("train",), "4 per adapter weight"),
        ]
    share, b = -(-count // job.world_size), job.weight_bytes
    return [
        MemoryPart("adapters", count * b, PHASES, f"b·{count:,}"),
        MemoryPart("fp32 master weights", share * FP32, PHASES, "4 per adapter weight, over the ranks"),
        MemoryPart("AdamW moments", 2 * share * FP32, PHASES, "2·4 per adapter weight, over the ranks"),
        MemoryPart("gradients", count * (b + FP32), ("train",), "b + 4 per adapter weight"),
    ]


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
    models = [("frozen model", job.policy.num_parameters, "a copy of the initial policy")]
    if job.config.policy.lora.rank:
        models = []
    if job.plain is not None:
        models.append(("frozen plain model", job.plain.num_parameters, "π_l"))
    parts = []
    for name, count, what in models:
        num_bytes = count * job.weight_bytes
        if placement.frozen == "sharded":
            parts.append(MemoryPart(name, -(-num_bytes // job.world_size), PHASES, f"b·P/N, {what}"))
        elif placement.frozen == "host" and job.hardware.device_type == "cuda":
            parts.append(MemoryPart(name, num_bytes, ("score",), f"b·P, {what}; on the host otherwise"))
            parts.append(MemoryPart(f"{name}, host", num_bytes, PHASES, f"b·P, {what}", on_host=True))
        else:
            parts.append(MemoryPart(name, num_bytes, PHASES, f"b·P, {what}"))
    return parts


def gathered_parts(job: Job, placement: Placement) -> list[MemoryPart]:
    """What sharding costs: buckets of the reductions, layers gathered for their computation, the sampler's copy."""
    b, count, stage = job.weight_bytes, job.policy.num_parameters, placement.zero_stage
    parts = []
    if stage >= 1:
        lora = job.config.policy.lora
        reduced = adapter_parameters(job.policy, lora) if lora.rank else count
        buckets = 2 * b * min(reduced, BUCKET_ELEMENTS)
        parts.append(MemoryPart("communication buckets", buckets, ("train",), "two of b·min(trained weights, 5e8)"))
    live = b * min(count, LIVE_ELEMENTS)
    sharded_frozen = placement.frozen == "sharded"
    if stage == 3 or sharded_frozen:
        phases = ("score",) * sharded_frozen + ("train",) * (stage == 3)
        parts.append(MemoryPart("gathered layers", live, phases, "b·min(P, 1.05e9)"))
    backend = job.config.sampling.backend
    if backend == "lmdeploy" or (stage == 3 and backend == "transformers"):  # a server holds its own elsewhere
        parts.append(MemoryPart("sampler's copy of the policy", count * b, ("sample",), "b·P, whole while sampling"))
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
        MemoryPart("activations, scoring pack", score, ("score",), "T·(3 I + 4 D)·b, one layer at a time"),
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
    parts = [MemoryPart("workspace of the operations", workspace, ("score", "train"), "engine.workspace_mib")]
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
    """Memory of the device: the GPU's, or the machine's physical memory."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
