"""``--dry-run``: what a run would do, checked as the run itself checks it, without loading weights or writing a file.

The epoch it plans is synthetic in one respect: response lengths are drawn uniformly from 1 to
``sampling.max_new_tokens``, since only sampling can tell the real ones. Prompts are those of the first epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from .config import Config
from .config_loading import to_yaml
from .memory import PHASES, MemoryPart, available_bytes, estimate_memory, model_size, needed_bytes, peak_of_phases
from .model import resolve_device, resolve_dtype
from .packing import plan_packs, view_lengths
from .records import Response, Sample
from .resolve import Resolved, resolve
from .steps import step_sizes

__all__ = ["dry_run", "synthetic_samples"]

GIB = 2**30


def dry_run(config: Config, *, resume: bool = False) -> str:
    """Resolve and check a configuration and describe the run; ValueError where the run itself would raise one."""
    resolved = resolve(config, resume=resume)
    blocks = [
        "Configuration\n" + indent(to_yaml(config)),
        "Models\n" + indent(describe_models(resolved)),
        "Prompts\n" + indent(describe_prompts(resolved)),
        describe_memory(resolved),
        describe_epoch(resolved),
        "Nothing was started and nothing was written.",
    ]
    return "\n\n".join(blocks)


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


def describe_memory(resolved: Resolved) -> str:
    """The memory table: GiB of each part in each phase, its formula, and what the device has."""
    config = resolved.config
    device = resolve_device(config.model)
    weight_bytes = torch.empty(0, dtype=resolve_dtype(config.model, device)).element_size()
    trust = config.model.trust_remote_code
    policy = model_size(resolved.model_config, trust_remote_code=trust)
    plain = None
    if resolved.plain_model_config is not None:
        plain = model_size(resolved.plain_model_config, trust_remote_code=trust)
    parts = estimate_memory(
        config,
        policy,
        plain,
        weight_bytes=weight_bytes,
        device_type=device.type,
        longest_prompt=resolved.prompts.report.longest_tokens,
    )
    available, largest = available_bytes(device.type), needed_bytes(parts, device.type)
    verdict = "fits" if largest < available else "DOES NOT FIT"
    return "\n".join(
        [
            f"Memory (GiB, estimated for one {device.type} process; P = {policy.num_parameters:,}, b = {weight_bytes})",
            indent(memory_table(parts)),
            f"  {verdict}: {largest / GIB:.2f} of {available / GIB:.2f} GiB",
        ]
    )


def memory_table(parts: Sequence[MemoryPart]) -> str:
    """One row a part, one column a phase."""
    rows = [f"{'':28}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for part in parts:
        cells = [f"{part.num_bytes / GIB:10.2f}" if phase in part.phases else f"{'':10}" for phase in PHASES]
        rows.append(f"{part.name:28}{''.join(cells)}  {part.formula}")
    totals = peak_of_phases(parts)
    rows.append(f"{'total':28}" + "".join(f"{totals[phase] / GIB:10.2f}" for phase in PHASES))
    return "\n".join(rows)


def synthetic_samples(resolved: Resolved) -> list[Sample]:
    """The first epoch's prompts with responses of uniformly drawn lengths; the stream is left where it was."""
    config = resolved.config.sampling
    state = resolved.prompts.state_dict()
    prompts = resolved.prompts.next(config.samples_per_epoch)
    resolved.prompts.load_state_dict(state)
    rng = np.random.default_rng(resolved.config.seed)
    lengths = rng.integers(1, config.max_new_tokens, size=len(prompts), endpoint=True)
    return [
        Sample(rendered, Response(np.zeros(length, np.int32), "length", 0, "synthetic", "", 0))
        for rendered, length in zip(prompts, lengths, strict=True)
    ]


def describe_epoch(resolved: Resolved) -> str:
    """The packs of a synthetic epoch: scoring packs, then the training packs of every optimizer step."""
    config, samples = resolved.config, synthetic_samples(resolved)
    num_views = len(samples[0].rendered.prefix_ids)
    if config.contrast.kind == "principle":
        score_lengths = view_lengths(samples, tuple(range(num_views)))
    else:
        score_lengths = np.max([view_lengths(samples, (view,)) for view in range(num_views)], axis=0)
    budget = config.packing.score_tokens
    scoring = [int(score_lengths[indices].sum()) for indices in plan_packs(score_lengths, token_budget=budget).packs()]
    train_lengths = view_lengths(samples, (-1,))
    sizes = step_sizes(len(samples), config.optim.samples_per_step)
    budget = config.packing.train_tokens
    plan = plan_packs(train_lengths, token_budget=budget, step_sizes=sizes)
    steps = [[int(train_lengths[indices].sum()) for indices in plan.packs(step, 0)] for step in range(len(sizes))]
    mean_length = np.mean([sample.num_actions for sample in samples])
    return "\n".join(
        [
            f"A synthetic epoch ({len(samples)} samples; assumed responses of 1 to {config.sampling.max_new_tokens} "
            f"tokens, {mean_length:.0f} in the mean)",
            "  " + describe_packs("scoring", scoring, config.packing.score_tokens),
            "  " + describe_packs("training", [pack for packs in steps for pack in packs], budget),
            f"  optimizer steps: {len(steps)} an epoch, {len(steps) * config.epochs} in {config.epochs} epochs; "
            f"packs per step: {describe_runs([len(packs) for packs in steps])}",
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
