"""``--dry-run``: what a run would do, checked as the run itself checks it, without loading weights or writing a file.

With ``--hardware`` the placement and the memory table are those of GPUs that need not be there.

The epoch it plans is synthetic in one respect: response lengths are drawn uniformly from 1 to
``sampling.max_new_tokens``, since only sampling can tell the real ones. Prompts are those of the first epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from .config import Config
from .config_loading import to_yaml
from .memory import GIB, PHASES, Hardware, Job, MemoryPart, estimate_memory, needed_bytes
from .model import resolve_device
from .packing import plan_packs, view_lengths
from .placement import Placement, job_of, local_hardware, parse_hardware, plan_placement, problem_of
from .records import Response, Sample
from .resolve import Resolved, resolve
from .steps import step_sizes

__all__ = ["DryRun", "dry_run", "synthetic_samples"]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a dry run found."""

    text: str
    problem: str | None  # why the run does not fit, and what to change


def dry_run(config: Config, *, resume: bool = False, hardware: str = "", world_size: int = 1) -> DryRun:
    """Resolve and check a configuration and describe the run; ValueError where the run itself would raise one.

    The run is placed on ``world_size`` ranks of this machine, or on the GPUs that ``hardware`` names (``8xA800``).
    """
    if hardware:
        machine, world_size = parse_hardware(hardware)
        resolved = dataclasses.replace(resolve(without_device(config), resume=resume), config=config)
    else:
        resolved = resolve(config, resume=resume)
        machine = local_hardware(resolve_device(config.model), ranks_per_host=world_size)
    job = job_of(resolved, machine, world_size=world_size)
    placement = plan_placement(job)
    problem = problem_of(job, placement)
    blocks = [
        "Configuration\n" + indent(to_yaml(config)),
        "Models\n" + indent(describe_models(resolved)),
        "Prompts\n" + indent(describe_prompts(resolved)),
        f"Placement on {machine.name}, {world_size} rank{'s' * (world_size > 1)}\n"
        + indent("\n".join(placement.reasons)),
        describe_memory(job, placement, problem),
        describe_epoch(resolved, world_size),
        "Nothing was started and nothing was written.",
    ]
    return DryRun("\n\n".join(blocks), problem)


def without_device(config: Config) -> Config:
    """The configuration without what only the machine that trains must have."""
    model = dataclasses.replace(config.model, device="auto", attention="auto", fused_layers=False)
    return dataclasses.replace(config, model=model, engine=dataclasses.replace(config.engine, kernel_backend="auto"))


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def describe_models(resolved: Resolved) -> str:
    lines = [f"policy and better model: {resolved.model_path}"]
    if resolved.plain_model_path is not None:
        lines.append(f"plain model: {resolved.plain_model_path} (the same vocabulary)")
    lines.append(f"vocabulary: {resolved.num_valid_vocab} token ids, EOS {resolved.tokenizer.eos_token!r}")
    lines.append(f"run directory: {resolved.run_dir}")
    return "\n".join(lines)


def describe_prompts(resolved: Resolved) -> str:
    """What became of the rows and prompts, and how much the views differ."""
    lines = [str(resolved.read_report), str(resolved.prompts.report)]
    items = resolved.prompts.training
    names = ("better", "plain") if len(items[0].prefix_ids) == 2 else ("only",)
    for view, name in enumerate(names):
        lengths = [len(item.prefix_ids[view]) + len(item.prompt_ids) for item in items]
        lines.append(f"{name} view: {int(np.median(lengths))} tokens in the median, {max(lengths)} at most")
    if resolved.test_prompts:
        lines.append(f"test prompts: {len(resolved.test_prompts)}")
    return "\n".join(lines)


def describe_memory(job: Job, placement: Placement, problem: str | None) -> str:
    """The memory table: GiB of each part in each phase, its formula, and what the device has."""
    parts, hardware, size = estimate_memory(job, placement), job.hardware, job.policy
    where = "GPU" if hardware.device_type == "cuda" else "process"
    letters = f"P = {size.num_parameters:,}, b = {job.weight_bytes}, N = {job.world_size}"
    lines = [
        f"Memory (GiB, estimated for each {where}; {letters})",
        indent(memory_table([part for part in parts if not part.on_host])),
    ]
    if any(part.on_host for part in parts):
        lines += ["In host memory (GiB, for each GPU)", indent(memory_table([part for part in parts if part.on_host]))]
    needed = needed_bytes(parts, hardware.device_type) / GIB
    numbers = f"{needed:.2f} of {describe_bytes(hardware)}"
    return "\n".join([*lines, f"  fits: {numbers}" if problem is None else f"  DOES NOT FIT: {numbers}; {problem}"])


def describe_bytes(hardware: Hardware) -> str:
    if hardware.device_type == "cuda":
        return f"{hardware.usable_bytes / GIB:.2f} GiB ({hardware.device_bytes / GIB:.2f} less 5 % and 2 GiB for CUDA)"
    return f"{hardware.usable_bytes / GIB:.2f} GiB"


def memory_table(parts: Sequence[MemoryPart]) -> str:
    """One row a part, one column a phase."""
    rows = [f"{'':28}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for part in parts:
        cells = [f"{part.num_bytes / GIB:10.2f}" if phase in part.phases else f"{'':10}" for phase in PHASES]
        rows.append(f"{part.name:28}{''.join(cells)}  {part.formula}")
    totals = {phase: sum(part.num_bytes for part in parts if phase in part.phases) for phase in PHASES}
    rows.append(f"{'total':28}" + "".join(f"{totals[phase] / GIB:10.2f}" for phase in PHASES))
    return "\n".join(rows)


def synthetic_samples(resolved: Resolved) -> list[Sample]:
    """The first epoch's prompts with responses of uniformly drawn lengths; the stream is left where it was."""
    config = resolved.config.sampling
    state = resolved.prompts.state_dict()
    prompts = resolved.prompts.next(config.samples_per_epoch, copies=config.samples_per_prompt)
    resolved.prompts.load_state_dict(state)
    rng = np.random.default_rng(resolved.config.seed)
    lengths = rng.integers(1, config.max_new_tokens, size=len(prompts), endpoint=True)
    return [
        Sample(rendered, Response(np.zeros(length, np.int32), "length", 0, "synthetic", "", 0))
        for rendered, length in zip(prompts, lengths, strict=True)
    ]


def describe_epoch(resolved: Resolved, num_ranks: int = 1) -> str:
    """The packs of a synthetic epoch: scoring packs, then the training packs of every optimizer step."""
    config, samples = resolved.config, synthetic_samples(resolved)
    num_views = len(samples[0].rendered.prefix_ids)
    if config.contrast.scores_views_together:
        score_lengths = view_lengths(samples, tuple(range(num_views)))
    else:
        score_lengths = np.max([view_lengths(samples, (view,)) for view in range(num_views)], axis=0)
    budget, scoring = config.packing.score_tokens, []
    for lengths in (score_lengths[rank::num_ranks] for rank in range(num_ranks)):  # a rank scores what it sampled
        scoring += [int(lengths[indices].sum()) for indices in plan_packs(lengths, token_budget=budget).packs()]
    train_lengths = view_lengths(samples, (-1,))
    sizes = step_sizes(len(samples), config.optim.samples_per_step)
    budget = config.packing.train_tokens
    plan = plan_packs(train_lengths, token_budget=budget, step_sizes=sizes, num_ranks=num_ranks)
    training = [
        [int(train_lengths[indices].sum()) for rank in range(num_ranks) for indices in plan.packs(step, rank)]
        for step in range(len(sizes))
    ]
    mean_length = np.mean([sample.num_actions for sample in samples])
    packs = "packs per step" if num_ranks == 1 else f"packs per step on each of {num_ranks} ranks"
    counts = [plan.num_micro_steps(step) for step in range(len(sizes))]
    return "\n".join(
        [
            f"A synthetic epoch ({len(samples)} samples; assumed responses of 1 to {config.sampling.max_new_tokens} "
            f"tokens, {mean_length:.0f} in the mean)",
            "  " + describe_packs("scoring", scoring, config.packing.score_tokens),
            "  " + describe_packs("training", [pack for packs in training for pack in packs], budget),
            f"  optimizer steps: {len(sizes)} an epoch, {len(sizes) * config.epochs} in {config.epochs} epochs; "
            f"{packs}: {describe_runs(counts)}",
        ]
    )


def describe_packs(name: str, packs: Sequence[int], budget: int) -> str:
    """One line on packs of so many tokens under a budget."""
    waste = 1.0 - sum(packs) / (len(packs) * budget)
    largest = f"largest pack {max(packs):,} of {budget:,}"
    return f"{name}: {len(packs)} packs, {sum(packs):,} tokens, {largest}, {waste:.1%} unused"


def describe_runs(counts: Sequence[int]) -> str:
    """Equal neighbours written once: ``2 × 31, 1``."""
    runs = [(value, len(list(group))) for value, group in groupby(counts)]
    return ", ".join(f"{value} × {length}" if length > 1 else str(value) for value, length in runs)
