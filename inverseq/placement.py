"""Where a run's models stand: ZeRO stage, offload to host memory, the frozen models and gradient checkpointing.

``plan_placement`` is a pure function of a ``Job``: sizes of the models, the configuration, the hardware and the number
of ranks. What the configuration fixes stays; of what is left to it (``auto``) it takes the first that fits, in the
order of what a choice costs in time. For a 7B model on eight A800 that is, from dear to cheap: optimizer state on the
host (seconds an optimizer step), recomputed activations (a third of the training compute), ZeRO-3 (two gathers of the
weights a micro-batch, about 0.1 s), ZeRO-2 over ZeRO-1 (a reduction a micro-batch), frozen models that come from the
host once an epoch or are gathered for every scoring pack (under a second an epoch each). The seconds are estimates from
bandwidths (400 GB/s NVLink, 25 GB/s PCIe), not measurements.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence

import torch

from .config import Config
from .distributed import Ranks
from .memory import (
    GIB,
    Hardware,
    Job,
    Placement,
    available_bytes,
    estimate_memory,
    host_bytes_of,
    model_size,
    needed_bytes,
    peak_of_phases,
)
from .model import resolve_device, resolve_dtype
from .resolve import Resolved

__all__ = [
    "Placement",
    "check_fits",
    "job_of",
    "local_hardware",
    "parse_hardware",
    "place_run",
    "plan_placement",
    "problem_of",
    "smallest_hardware",
]

logger = logging.getLogger(__name__)

# Memory as torch reports it, in GiB, of GPUs that may be named instead of their size.
GPU_GIB = {"A800": 79.1, "A100": 79.1, "H100": 79.1, "H800": 79.1, "H200": 139.8}
HARDWARE = re.compile(r"(\d+)x(?:(\d+)GB|([A-Za-z]\w*))(?:\+(\d+)GB)?")
GPUS_PER_HOST = 8
PLACEMENT_KEYS = (
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.frozen",
    "model.gradient_checkpointing",
)
KEPT_PARTS = ("policy weights", "fp32 master weights", "AdamW moments")


def parse_hardware(text: str) -> tuple[Hardware, int]:
    """Hardware and number of ranks of ``8xA800``, ``1x80GB`` or ``8x80GB+1000GB`` (host memory of each host).

    A GB is 10⁹ bytes. Hosts are taken to have 8 GPUs. Raises ValueError for anything else.
    """
    match = HARDWARE.fullmatch(text)
    name = match and match[3] and match[3].upper()
    if not match or int(match[1]) < 1 or match[2] == "0" or (name and name not in GPU_GIB):
        known = ", ".join(GPU_GIB)
        raise ValueError(f"--hardware {text!r}: expected for example 8xA800, 1x80GB or 8x80GB+1000GB (GPUs: {known})")
    device_bytes = int(GPU_GIB[name] * GIB) if name else int(match[2]) * 10**9
    num_gpus, host_bytes = int(match[1]), int(match[4]) * 10**9 if match[4] else None
    return Hardware(text, "cuda", device_bytes, host_bytes, min(num_gpus, GPUS_PER_HOST)), num_gpus


def local_hardware(device: torch.device, *, ranks_per_host: int = 1) -> Hardware:
    """The machine this process runs on."""
    host = available_bytes("cpu")
    if device.type == "cuda":
        return Hardware(torch.cuda.get_device_name(device), "cuda", available_bytes("cuda"), host, ranks_per_host)
    return Hardware("this machine", "cpu", host, host, ranks_per_host)


def smallest_hardware(machines: Sequence[Hardware]) -> Hardware:
    """What each of the ranks' machines has: ranks that plan differently wait for each other for ever.

    GPUs or hosts of one kind may differ by a few bytes, and a plan turns at some byte.
    """
    ranks_per_host = max(machine.ranks_per_host for machine in machines)
    on_gpu = machines[0].device_type == "cuda"
    host_bytes = min((machine.host_bytes or 0) // machine.ranks_per_host for machine in machines) * ranks_per_host
    return dataclasses.replace(
        machines[0],
        device_bytes=min(machine.device_bytes for machine in machines) if on_gpu else host_bytes,
        host_bytes=host_bytes,
        ranks_per_host=ranks_per_host,
    )


def job_of(resolved: Resolved, hardware: Hardware, *, world_size: int = 1) -> Job:
    """What a resolved configuration asks to be placed on some hardware; no weight is loaded."""
    config = resolved.config
    trust = config.model.trust_remote_code
    plain = resolved.plain_model_config
    dtype = resolve_dtype(config.model, torch.device(hardware.device_type))
    return Job(
        config=config,
        policy=model_size(resolved.model_config, trust_remote_code=trust),
        plain=None if plain is None else model_size(plain, trust_remote_code=trust),
        weight_bytes=dtype.itemsize,
        longest_prompt=resolved.prompts.report.longest_tokens,
        hardware=hardware,
        world_size=world_size,
    )


def place_run(resolved: Resolved, ranks: Ranks | None = None) -> Placement:
    """The placement of a real run on its machines, logged; ValueError before any weight is loaded when it cannot fit.

    ``LOCAL_WORLD_SIZE``, which launchers set, says how many of the ranks share this host. All ranks call it together
    and plan alike.
    """
    ranks = ranks or Ranks()
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    hardware = local_hardware(resolve_device(resolved.config.model), ranks_per_host=ranks_per_host)
    hardware = smallest_hardware(ranks.gather(hardware))
    job = job_of(resolved, hardware, world_size=ranks.world_size)
    placement = plan_placement(job)
    check_fits(job, placement)
    for reason in placement.reasons:
        logger.info("placement: %s", reason)
    problem = problem_of(job, placement)
    if problem:
        logger.warning("%s", problem)
    return placement


def plan_placement(job: Job) -> Placement:
    """The cheapest placement that fits, or the smallest one when none does; ValueError for keys that contradict."""
    check_keys(job)
    plans = list(candidates(job))
    fitting = [plan for plan in plans if excess_bytes(job, plan) <= 0]
    chosen = fitting[0] if fitting else min(plans, key=lambda plan: excess_bytes(job, plan))
    why = [explain(job, chosen, key, plans) for key in PLACEMENT_KEYS]
    peaks = peak_of_phases(estimate_memory(job, chosen))
    peaks["train"] = max(peaks["train"], peaks.pop("update"))  # a run measures them as one phase
    return dataclasses.replace(chosen, reasons=tuple(why), phase_bytes=peaks)


def candidates(job: Job) -> Iterator[Placement]:
    """Every placement that the configuration allows, the cheapest in time first."""
    engine, on_gpu = job.config.engine, job.hardware.device_type == "cuda"
    recomputed = str(job.config.model.gradient_checkpointing).lower()
    checkpointing = (False, True) if recomputed == "auto" else (recomputed == "true",)
    if job.config.policy.lora.rank:  # each rank holds the base once, for the policy and the frozen models
        for recompute, stage in itertools.product(checkpointing, stages(job, False, False)):
            yield Placement(stage, False, False, "replicated", recompute)
        return
    frozen = ("replicated",) + ("sharded",) * (job.world_size > 1) + ("host",) * on_gpu
    if engine.frozen != "auto":
        frozen = (engine.frozen,)
    for (offload_optimizer, offload_parameters), recompute in itertools.product(offloads(job), checkpointing):
        pairs = itertools.product(stages(job, offload_optimizer, offload_parameters), frozen)
        # Stage 2 overlaps what stage 1 reduces at the end; frozen models that are not here are moved in every epoch.
        for stage, where in sorted(pairs, key=lambda pair: (pair[0] == 3, frozen.index(pair[1]))):
            yield Placement(stage, offload_optimizer, offload_parameters, where, recompute)


def offloads(job: Job) -> list[tuple[bool, bool]]:
    """Allowed pairs of (optimizer, parameters) in host memory. Parameters go there only behind the optimizer."""
    engine, offers = job.config.engine, job.hardware.device_type == "cuda" and job.config.engine.kind != "torch"
    allowed = {"none": (False,), "cpu": (True,), "auto": (False, True) if offers else (False,)}
    pairs = itertools.product(allowed[engine.offload_optimizer], allowed[engine.offload_parameters])
    forced = engine.offload_parameters == "cpu"
    return [(optimizer, parameters) for optimizer, parameters in pairs if optimizer or not parameters or forced]


def stages(job: Job, offload_optimizer: bool, offload_parameters: bool) -> tuple[int, ...]:
    """ZeRO stages from the lowest; offload of the optimizer starts at stage 2, of the weights at 3."""
    engine, several = job.config.engine, job.world_size > 1
    if engine.zero_stage != "auto":
        fixed = int(engine.zero_stage)
        return (fixed,) if fixed == 3 or not offload_parameters and (fixed or not offload_optimizer) else ()
    if offload_parameters:
        return (3,)
    if offload_optimizer:
        return (2, 3) if several else (2,)
    if several:
        return (1, 2) if job.config.policy.lora.rank else (1, 2, 3)
    return (1,) if engine.kind == "deepspeed" else (0,)


def check_keys(job: Job) -> None:
    """Raise ValueError for keys of the engine that contradict each other, or adapters."""
    engine = job.config.engine
    if engine.offload_parameters == "cpu" and engine.zero_stage not in ("auto", "3"):
        raise ValueError(
            f"engine.offload_parameters='cpu': expected engine.zero_stage=3 or auto, not {engine.zero_stage}"
        )
    if engine.offload_optimizer == "cpu" and engine.zero_stage == "0":
        raise ValueError("engine.offload_optimizer='cpu': expected engine.zero_stage=1, 2, 3 or auto, not 0")
    if job.config.policy.lora.rank:
        check_lora_keys(job.config)
    if engine.kind != "torch":
        return
    needs = {
        "engine.zero_stage": engine.zero_stage not in ("auto", "0"),
        "engine.offload_optimizer": engine.offload_optimizer == "cpu",
        "engine.offload_parameters": engine.offload_parameters == "cpu",
        "engine.frozen": engine.frozen == "sharded",
    }
    for key in (key for key, needed in needs.items() if needed):
        value = getattr(engine, key.partition(".")[2])
        raise ValueError(f"{key}={value!r}: needs DeepSpeed; expected engine.kind=deepspeed or auto, not torch")


def check_lora_keys(config: Config) -> None:
    """Raise ValueError for what adapters cannot be combined with.

    The frozen models are run through the policy's own modules, whose weights must be there outside of its forward.
    """
    expected = {
        "engine.zero_stage": ("auto", "0", "1", "2"),
        "engine.offload_optimizer": ("auto", "none"),
        "engine.offload_parameters": ("auto", "none"),
        "engine.frozen": ("auto", "replicated"),
    }
    for key, values in expected.items():
        value = option_of(config, key)
        if value not in values:
            raise ValueError(
                f"{key}={value!r}: expected {' or '.join(values)} with policy.lora.rank={config.policy.lora.rank}: "
                "every rank holds the base once, as policy and frozen model, and adapters need little beside it"
            )


def excess_bytes(job: Job, placement: Placement) -> int:
    """By how many bytes a placement exceeds the device or the host, whichever is worse; 0 or less when it fits."""
    parts = estimate_memory(job, placement)
    excess = needed_bytes(parts, job.hardware.device_type) - job.hardware.usable_bytes
    if job.hardware.host_bytes is not None and job.hardware.device_type == "cuda":
        excess = max(excess, host_bytes_of(parts) * job.hardware.ranks_per_host - job.hardware.host_bytes)
    return excess


def describe_need(job: Job, placement: Placement) -> str:
    """``23.4 of 68.0 GiB`` of the device, or of the host when that is what is exceeded."""
    parts, hardware = estimate_memory(job, placement), job.hardware
    needed = needed_bytes(parts, hardware.device_type)
    if needed <= hardware.usable_bytes and excess_bytes(job, placement) > 0:
        held = host_bytes_of(parts) * hardware.ranks_per_host
        return f"{held / GIB:.1f} of the host's {hardware.host_bytes / GIB:.1f} GiB"
    return f"{needed / GIB:.1f} of {hardware.usable_bytes / GIB:.1f} GiB"


def value_of(placement: Placement, key: str) -> str:
    """A placement's choice as the configuration writes it."""
    value = getattr(placement, key.partition(".")[2])
    if "offload" in key:
        return "cpu" if value else "none"
    return str(value).lower()


def explain(job: Job, chosen: Placement, key: str, plans: Sequence[Placement]) -> str:
    """One line: a choice, and what the cheaper one next to it would have needed."""
    section, name = key.split(".")
    text = f"{key}={value_of(chosen, key)}"
    if str(getattr(getattr(job.config, section), name)).lower() != "auto":
        return f"{text} (set)"
    values = list(dict.fromkeys(getattr(plan, name) for plan in plans))  # the cheapest first
    position = values.index(getattr(chosen, name))
    cheaper = [plan for plan in plans[: plans.index(chosen)] if getattr(plan, name) == values[position - 1]]
    if position == 0 or not cheaper:
        return text
    best = min(cheaper, key=lambda plan: excess_bytes(job, plan))
    return f"{text}, as {value_of(best, key)} would need {describe_need(job, best)}"


def problem_of(job: Job, placement: Placement) -> str | None:
    """None when the placement fits, else one line: what it needs and what to change."""
    if excess_bytes(job, placement) <= 0:
        return None
    ranks = f"{job.world_size} rank{'s' * (job.world_size > 1)}"
    return (
        f"the estimate does not fit: {describe_need(job, placement)} on {job.hardware.name} with {ranks}; "
        f"{', or '.join(remedies(job)) or 'take a smaller model or more memory'} (--dry-run prints the table)"
    )


def remedies(job: Job) -> list[str]:
    """Changes each of which alone makes the job fit; all changes of keys together when only that does; or more GPUs."""
    config = job.config
    changes = [(key, "auto") for key in PLACEMENT_KEYS]
    response = config.sampling.max_new_tokens - 1
    changes.append(("packing.train_tokens", max(job.longest_prompt + response, config.packing.train_tokens // 4)))
    changes.append(("packing.score_tokens", max(4 * (job.longest_prompt + response), config.packing.score_tokens // 4)))
    changes.append(("sampling.batch_size", max(1, config.sampling.batch_size // 8)))
    changes = [(key, value) for key, value in changes if is_smaller(value, option_of(config, key))]
    helpful = [f"set {key}={value}" for key, value in changes if fits(with_options(job, [(key, value)]))]
    if not helpful and fits(with_options(job, changes)):
        helpful = ["set " + " ".join(f"{key}={value}" for key, value in changes)]
    if not helpful and job.hardware.device_type == "cuda":
        counts = [n for n in (2, 4, 8, 16, 32, 64) if n > job.world_size]
        enough = next((n for n in counts if fits(with_options(job, [("engine.zero_stage", "auto")], n))), None)
        helpful = [f"take {enough} such GPUs"] if enough else []
    return helpful


def option_of(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def is_smaller(value, current) -> bool:
    """Whether a change asks for less than what is set."""
    return str(current).lower() != "auto" if value == "auto" else value < current


def with_options(job: Job, changes: Sequence[tuple[str, object]], world_size: int | None = None) -> Job:
    """The job with some options of its configuration, and maybe the number of ranks, replaced."""
    config = job.config
    for key, value in changes:
        section, name = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    num_ranks = world_size or job.world_size
    per_host = max(job.hardware.ranks_per_host, min(num_ranks, GPUS_PER_HOST) if num_ranks > job.world_size else 1)
    hardware = dataclasses.replace(job.hardware, ranks_per_host=per_host)
    return dataclasses.replace(job, config=config, hardware=hardware, world_size=num_ranks)


def fits(job: Job) -> bool:
    try:
        check_keys(job)
    except ValueError:
        return False
    return any(excess_bytes(job, plan) <= 0 for plan in candidates(job))


def check_fits(job: Job, placement: Placement) -> None:
    """Raise ValueError when a run cannot fit.

    On CUDA that is an estimate above the GPU's whole memory, or above the host's. On a CPU the estimate is of the worst
    pack and pages can be swapped: refused are weights and optimizer state that alone exceed the machine's memory.
    """
    problem = problem_of(job, placement)
    if problem is None:
        return
    parts, hardware = estimate_memory(job, placement), job.hardware
    if hardware.device_type == "cuda":
        too_much = excess_bytes(job, placement) > hardware.device_bytes - hardware.usable_bytes
        too_much |= needed_bytes(parts, "cuda") <= hardware.usable_bytes  # it is the host that is exceeded
    else:
        kept = [part for part in parts if part.name in KEPT_PARTS]
        too_much = needed_bytes(kept, hardware.device_type) > hardware.rank_bytes
    if too_much:
        raise ValueError(problem)
