"""DeepSpeed's configuration, and the sizes in it that decide what a rank holds: read by the engine and the estimate."""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "GATHER_NUMEL",
    "LIVE_NUMEL",
    "PREFETCH_NUMEL",
    "SUB_GROUP_NUMEL",
    "reduce_bucket_numel",
    "zero_config",
]

GATHER_NUMEL = 2**28  # weights gathered at a time for a full copy
REDUCE_NUMEL = 2**28  # gradients reduced at a time
LIVE_NUMEL = 1_000_000_000  # gathered weights that ZeRO-3 keeps for their next use
PREFETCH_NUMEL = 50_000_000  # weights that ZeRO-3 gathers before they are needed
SUB_GROUP_NUMEL = 1_000_000_000  # weights of a rank that ZeRO-3 updates at a time


def reduce_bucket_numel(num_trained: int) -> int:
    """Gradients reduced at a time, of so many trained weights."""
    return min(REDUCE_NUMEL, num_trained)


def zero_config(
    stage: int,
    *,
    offload_optimizer: bool,
    offload_parameters: bool,
    max_grad_norm: float,
    num_trained: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """DeepSpeed's configuration for weights of one dtype, of which so many are trained, and the device that computes.

    Several functions read only a part of it; one configuration keeps them from contradicting each other.
    """
    on_cuda = device.type == "cuda"
    host = {"device": "cpu", "pin_memory": on_cuda}
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_cuda,
        "reduce_bucket_size": reduce_bucket_numel(num_trained),
        "sub_group_size": SUB_GROUP_NUMEL,
        "stage3_max_live_parameters": LIVE_NUMEL,
        "stage3_max_reuse_distance": LIVE_NUMEL,
        "stage3_prefetch_bucket_size": PREFETCH_NUMEL,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = host
    if offload_parameters:
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,  # 1.0 unless said otherwise
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        # ZeRO-1 would keep the 16-bit gradients of a whole micro-batch beside their fp32 sums.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
