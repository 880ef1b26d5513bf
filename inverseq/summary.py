"""Metric rows: what a step, an epoch and the held-out set report, as flat dictionaries.

Means over an epoch are weighted by action tokens, and counts are over all ranks. ``pad_waste`` is the share of the
processed tokens that stand for no sample (dummy packs: nothing is padded); ``pack_fill`` is the share of the packs'
token budget that was used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from .records import ScoredSamples, StepMetrics, TrainStep

__all__ = ["epoch_row", "held_out_row", "response_metrics", "step_row"]


def step_row(epoch: int, num_updates: int, step: TrainStep, metrics: StepMetrics, token_budget: int) -> dict:
    """One optimizer step."""
    return {
        "epoch": epoch,
        "step": num_updates,
        **{name: value for name, value in asdict(metrics).items() if value is not None},
        "num_samples": step.num_samples,
        "num_actions": step.num_actions,
        "num_tokens": step.num_tokens,
        "num_packs": step.num_packs,
        **_packing_metrics([step], token_budget),
        "tokens_per_second": step.num_tokens / metrics.duration_s,
    }


def _packing_metrics(steps: Sequence[TrainStep], token_budget: int) -> dict:
    real = sum(step.num_tokens for step in steps)
    return {
        "pad_waste": 1.0 - real / (real + sum(step.num_dummy_tokens for step in steps)),
        "pack_fill": real / (sum(step.num_packs for step in steps) * token_budget),
    }


def epoch_row(epoch: int, num_updates: int, steps: Sequence[tuple[TrainStep, StepMetrics]], token_budget: int) -> dict:
    """An epoch's training, over its steps."""
    weights = [step.num_actions for step, _ in steps]
    total = sum(weights)

    def mean(values) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total

    all_metrics = [metrics for _, metrics in steps]
    initial = all_metrics[0].kl_to_initial
    num_tokens = sum(step.num_tokens for step, _ in steps)
    return {
        "epoch": epoch,
        "step": num_updates,
        "loss": mean(m.loss for m in all_metrics),
        "mean_log_ratio": mean(m.mean_log_ratio for m in all_metrics),
        "rms_log_ratio": math.sqrt(mean(m.rms_log_ratio**2 for m in all_metrics)),
        "kl_to_plain": mean(m.kl_to_plain for m in all_metrics),
        **({} if initial is None else {"kl_to_initial": mean(m.kl_to_initial for m in all_metrics)}),
        "grad_norm": mean(m.grad_norm for m in all_metrics),
        "learning_rate": all_metrics[-1].learning_rate,
        "num_samples": sum(step.num_samples for step, _ in steps),
        "num_actions": total,
        "num_tokens": num_tokens,
        **_packing_metrics([step for step, _ in steps], token_budget),
        "train_tokens_per_second": num_tokens / sum(m.duration_s for m in all_metrics),
        "peak_memory_bytes": max(m.peak_memory_bytes for m in all_metrics),
    }


def response_metrics(scored: ScoredSamples) -> dict:
    """What the sampled responses look like."""
    samples = scored.samples
    stopped = sum(sample.response.finish_reason == "stop" for sample in samples)
    return {
        "response_length": sum(sample.num_actions for sample in samples) / len(samples),
        "eos_rate": stopped / len(samples),
        "truncation_rate": 1.0 - stopped / len(samples),
        "mean_target_gain": (scored.targets - scored.plain_logprobs).double().mean().item(),
    }


def held_out_row(held_out: ScoredSamples, policy_logprobs: Tensor) -> dict:
    """Mean of (log π̂ − log π_θ)² over the held-out actions, and how far the policy is from π_l on them.

    ``policy_logprobs`` is log π_θ(y_t), [A] fp32 on the host, in the order of the held-out targets. With
    ``contrast.kl_to_initial`` also how far it is from the initial policy, whose samples these are.
    """
    values = {name: column.double() for name, column in held_out.values.items()}
    row = {
        "held_out/mean_squared_log_ratio": (values["targets"] - policy_logprobs).square().mean().item(),
        "held_out/mean_log_ratio_to_plain": (policy_logprobs.double() - values["plain_logprobs"]).mean().item(),
    }
    if "initial_logprobs" in values:
        row["held_out/mean_log_ratio_to_initial"] = (policy_logprobs - values["initial_logprobs"]).mean().item()
    return row
