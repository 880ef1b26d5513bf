"""What the memory estimate is made of: the job, the hardware, where things stand, and one part of a rank's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .config import Config

__all__ = ["FP32", "GIB", "PHASES", "Hardware", "Job", "MemoryPart", "ModelSize", "Placement", "Trained"]

# load: until a run's models and its engine stand; train: forward and backward; update: the reductions behind a step's
# last backward, clipping and AdamW.
PHASES = ("load", "sample", "score", "train", "update")
FP32 = 4
GIB = 2**30
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

    @property
    def on_gpu(self) -> bool:
        """True where host memory is another than the device's."""
        return self.hardware.device_type == "cuda"


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights that are trained."""

    count: int
    largest: int  # weights of the largest of them, M
    weight_bytes: int


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
