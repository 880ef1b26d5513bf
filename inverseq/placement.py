"""Where a run's models stand: ZeRO stage, offload to host memory, the frozen models and gradient checkpointing.

``plan_placement`` is a pure function of a ``Job``: sizes of the models, the configuration, the hardware and the number
of ranks. It takes the first choice whose estimate (``inverseq.memory``) fits, in the order of what a choice costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .memory import ModelSize

__all__ = ["Hardware", "Job", "Placement", "plan_placement"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices of one host."""

    name: str
    device_type: str  # "cuda" or "cpu"
    num_devices: int  # GPUs, or 1
    device_bytes: int  # memory of one GPU, or the host's
    host_bytes: int | None  # None is unknown


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
    """Where the models stand. ``reasons`` are lines for the log, one a choice."""

    zero_stage: int  # 0 is no sharding: one process, or plain data parallelism
    offload_optimizer: bool  # optimizer state and fp32 masters in host memory
    offload_parameters: bool  # the policy's weights too (stage 3 only)
    frozen: str  # "replicated" on every rank, "sharded" over the ranks (ZeRO-3), or on the "host" while not scoring
    gradient_checkpointing: bool
    reasons: tuple[str, ...] = ()


def plan_placement(job: Job) -> Placement:
    """The placement of a job: what the configuration fixes, and for each ``auto`` the cheapest choice that fits."""
    stage = job.config.engine.zero_stage
    return Placement(
        zero_stage=int(stage) if stage != "auto" else min(1, job.world_size - 1),
        offload_optimizer=job.config.engine.offload_optimizer == "cpu",
        offload_parameters=job.config.engine.offload_parameters == "cpu",
        frozen="replicated" if job.config.engine.frozen == "auto" else job.config.engine.frozen,
        gradient_checkpointing=bool(job.config.model.gradient_checkpointing),
    )
