"""What DeepSpeed's optimizers hold beside the weights, stage by stage, as its version 0.19 is written.

P counts the trained weights, N the ranks, M the largest weight, B = min(2^28, P) the gradients reduced at a time, b the
bytes of a weight; one rank's share of P is P/N. The stages are three programs and two of their variants:

    ZeRO-1, 16-bit           sums all gradients in fp32, one by one, and reduces a 16-bit copy of the whole at the end
    ZeRO-2, 16-bit           fills buckets in 16 bits, reduces a flat copy and adds the rank's part to its fp32 sums
    the same, offloaded      its fp32 sums stay on the GPU until the last micro-batch; the host holds a second set
    ZeRO-1 and 2, fp32       as ZeRO-2, but the rank's part is set aside and added later
    ZeRO-3                   one bucket and one set of fp32 sums, held all the time; offloaded the host holds two sets

Reductions that overlap with the backward pass (CUDA) have two buckets under ZeRO-1 and 2. Offloaded optimizers are
fused, as on CUDA; on a CPU AdamW makes two temporaries of what it updates at a time.
"""

from __future__ import annotations

from .memory_records import FP32, PHASES, Job, MemoryPart, Placement, Trained
from .zero_options import SUB_GROUP_NUMEL, reduce_bucket_numel

__all__ = ["pinned_bytes", "zero_parts"]

STEP = ("train", "update")


def zero_parts(job: Job, placement: Placement, trained: Trained) -> list[MemoryPart]:
    """Masters, moments, gradients, buckets and copies of one rank."""
    share = -(-trained.count // job.world_size)
    away = placement.offload_optimizer and job.on_gpu
    if away:
        parts = offloaded_parts(placement, trained, share)
    else:
        parts = [
            MemoryPart("fp32 master weights", FP32 * share, PHASES, "4·P/N"),
            MemoryPart("AdamW moments", 2 * FP32 * share, PHASES, "2·4·P/N"),
        ]
    if placement.zero_stage == 3:
        parts += stage_3_parts(job, trained, share, away)
    elif trained.weight_bytes == FP32:
        parts += full_precision_parts(job, placement, trained, share)
    elif placement.zero_stage == 2:
        parts += stage_2_parts(job, trained, share)
    else:
        parts += stage_1_offloaded_parts(job, trained, share) if away else stage_1_parts(trained)
    if not job.on_gpu:
        updated = min(share, SUB_GROUP_NUMEL) if placement.zero_stage == 3 else share
        parts.append(MemoryPart("temporaries of AdamW", 2 * FP32 * updated, ("update",), "2·4·P/N"))
    return parts


def offloaded_parts(placement: Placement, trained: Trained, share: int) -> list[MemoryPart]:
    """Masters, moments and gradients in host memory, most of it pinned; ZeRO-3's masters are not."""
    b, is_pinned = trained.weight_bytes, placement.zero_stage < 3
    masters = pinned_bytes(FP32 * share) if is_pinned else FP32 * share
    gradients = pinned_bytes(FP32 * share)
    if not is_pinned:
        full, rest = divmod(share, SUB_GROUP_NUMEL)
        gradients += full * pinned_bytes(FP32 * SUB_GROUP_NUMEL) + pinned_bytes(FP32 * rest)
    parts = [
        MemoryPart("fp32 master weights", masters, PHASES, "4·P/N", on_host=True),
        MemoryPart("AdamW moments", 2 * FP32 * share, PHASES, "2·4·P/N", on_host=True),
        MemoryPart("gradients, host", gradients, PHASES, "4·P/N, pinned" if is_pinned else "2·4·P/N", on_host=True),
    ]
    if is_pinned:
        staged = b * trained.largest
        buffers = pinned_bytes(b * share) + pinned_bytes(staged)
        parts.append(MemoryPart("16-bit copies, host", buffers, PHASES, "b·P/N + b·M, pinned", on_host=True))
        parts.append(MemoryPart("staging of offloaded gradients", staged, PHASES, "b·M"))
    return parts


def stage_1_parts(trained: Trained) -> list[MemoryPart]:
    """``BF16_Optimizer``: its sums stay from one step to the next, and there are no buckets."""
    b = trained.weight_bytes
    return [
        MemoryPart("gradients", FP32 * trained.count, PHASES, "4·P, summed in fp32"),
        MemoryPart("gradient of one weight", (b + FP32) * trained.largest, ("train",), "(b + 4)·M, until it is summed"),
        MemoryPart("gradients as they are reduced", b * trained.count, ("update",), "b·P"),
    ]


def stage_1_offloaded_parts(job: Job, trained: Trained, share: int) -> list[MemoryPart]:
    """``DeepSpeedZeroOptimizer`` with sums of all gradients, fp32 buckets, and the rank's own part once more."""
    b, bucket = trained.weight_bytes, reduce_bucket_numel(trained.count)
    copies = (FP32 + b) * max(bucket, trained.largest) + FP32 * trained.largest
    return [
        MemoryPart("gradients", FP32 * (trained.count + share), STEP, "4·P + 4·P/N, summed in fp32"),
        MemoryPart("gradient of one weight", b * trained.largest, ("train",), "b·M, until it is summed"),
        MemoryPart("reduction buckets", num_buckets(job) * FP32 * bucket + copies, ("train",), "4·B each, and copies"),
    ]


def stage_2_parts(job: Job, trained: Trained, share: int) -> list[MemoryPart]:
    """``DeepSpeedZeroOptimizer`` with partitioned gradients."""
    b, bucket = trained.weight_bytes, reduce_bucket_numel(trained.count)
    buckets = b * (num_buckets(job) * bucket + max(bucket, trained.largest))
    return [
        MemoryPart("gradients", FP32 * share, STEP, "4·P/N, summed in fp32"),
        MemoryPart("gradient of one weight", (b + FP32) * trained.largest, ("train",), "(b + 4)·M, until it is summed"),
        MemoryPart("reduction buckets", buckets, ("train",), f"b·({num_buckets(job)} B + max(B, M))"),
    ]


def full_precision_parts(job: Job, placement: Placement, trained: Trained, share: int) -> list[MemoryPart]:
    """ZeRO-1 and 2 on fp32 weights: reduced gradients are copied out of their bucket, and flat for the update."""
    bucket, whole = reduce_bucket_numel(trained.count), placement.zero_stage == 1
    copies = FP32 * (num_buckets(job) * bucket + max(bucket, trained.largest, share))
    gradients = FP32 * (trained.count if whole else share)
    return [
        MemoryPart("gradients", gradients, ("train",), "4·P" if whole else "4·P/N"),
        MemoryPart("gradients of the update", FP32 * share, ("update",), "4·P/N"),
        MemoryPart("reduction buckets", copies, ("train",), f"4·({num_buckets(job)} B + max(B, M, P/N))"),
    ]


def stage_3_parts(job: Job, trained: Trained, share: int, away: bool) -> list[MemoryPart]:
    """``DeepSpeedZeroOptimizer_Stage3``: bucket and sums are made once."""
    b, bucket = trained.weight_bytes, reduce_bucket_numel(trained.count)
    scattered = b * max(bucket, trained.largest) + FP32 * -(-bucket // job.world_size)
    parts = [
        MemoryPart("reduction bucket", b * bucket, PHASES, "b·B"),
        MemoryPart("gradients as they are reduced", scattered, ("train",), "b·max(B, M) + 4·B/N"),
        MemoryPart("gradient of one weight", b * trained.largest, ("train",), "b·M, until it is reduced"),
    ]
    if not away:
        flat = FP32 * min(share, SUB_GROUP_NUMEL + trained.largest)
        parts.append(MemoryPart("gradients", FP32 * share, PHASES, "4·P/N, summed in fp32"))
        parts.append(MemoryPart("gradients of the update", flat, ("update",), "4·min(P/N, 1e9 + M)"))
    return parts


def num_buckets(job: Job) -> int:
    """One is filled while another is reduced, where reductions overlap."""
    return 2 if job.on_gpu else 1


def pinned_bytes(num_bytes: int) -> int:
    """What torch takes for one pinned allocation: the next power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
