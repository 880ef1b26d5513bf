"""Optimizer steps of an epoch: which samples train together, packed for every rank, with the step's denominator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .config import OptimConfig, PackingConfig
from .packing import DUMMY_TOKENS, FlatSamples, plan_packs, view_lengths, write_pack
from .records import MicroBatch, PackedViews, ScoredSamples, TrainStep

__all__ = ["plan_steps", "step_sizes"]

POLICY_VIEW = (-1,)


def step_sizes(num_samples: int, samples_per_step: int) -> list[int]:
    """Samples of each optimizer step; the last step holds what is left."""
    full, rest = divmod(num_samples, samples_per_step)
    return [samples_per_step] * full + ([rest] if rest else [])


def plan_steps(
    scored: ScoredSamples,
    optim: OptimConfig,
    packing: PackingConfig,
    *,
    num_ranks: int = 1,
    rank: int = 0,
) -> list[TrainStep]:
    """The optimizer steps of one epoch for one rank, in sample order.

    Every rank gets the same number of micro-batches in a step; where its samples do not fill them a dummy pack of
    weight zero stands in, so that collective operations stay in step.
    """
    samples = scored.samples
    sizes = step_sizes(len(samples), optim.samples_per_step)
    flat = FlatSamples.of(samples)
    lengths = view_lengths(flat, POLICY_VIEW)
    plan = plan_packs(lengths, token_budget=packing.train_tokens, num_ranks=num_ranks, step_sizes=sizes)
    num_actions = np.diff(scored.offsets)
    steps, first = [], 0
    for index, size in enumerate(sizes):
        step_samples = slice(first, first + size)
        packs = [write_pack(flat, indices, POLICY_VIEW) for indices in plan.packs(index, rank)]
        steps.append(
            TrainStep(
                micro_batches=[_micro_batch(pack, scored, num_actions, optim.loss_reduction) for pack in packs],
                denominator=_denominator(num_actions[step_samples], optim.loss_reduction),
                num_samples=size,
                num_tokens=int(lengths[step_samples].sum()),
                num_actions=int(num_actions[step_samples].sum()),
                num_packs=num_ranks * len(packs),
                num_dummy_tokens=plan.num_dummies(index) * DUMMY_TOKENS,
                index=index,
            )
        )
        first += size
    return steps


def _micro_batch(pack: PackedViews, scored: ScoredSamples, num_actions: np.ndarray, loss_reduction: str) -> MicroBatch:
    rows = pack.action_rows(scored.offsets)
    own = {name: values[rows] for name, values in scored.values.items()}
    return MicroBatch(pack, loss_weights=_loss_weights(pack, num_actions, loss_reduction), **own)


def _loss_weights(pack: PackedViews, num_actions: np.ndarray, loss_reduction: str) -> Tensor:
    if pack.is_dummy:
        return torch.zeros(pack.num_actions)
    if loss_reduction == "sequence_mean":
        return 1.0 / torch.from_numpy(num_actions)[pack.sample_index].float()
    return torch.ones(pack.num_actions)


def _denominator(num_actions: Sequence[int], loss_reduction: str) -> float:
    return {"token_mean": float(sum(num_actions)), "sequence_mean": float(len(num_actions)), "sum": 1.0}[loss_reduction]
