"""Scoring and training between the paper-like baseline and ours, with one thing switched on at a time.

The first rung is baseline_paper.py, the last one the project's own ``score_targets``, ``plan_steps``, ``Policy`` and
``TorchEngine``; each rung in between keeps what the rungs before it switched on. All rungs share one policy, one frozen
model and one optimizer. The order is part of the result: another order would share the whole factor out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from baseline_paper import (
    PaddedPolicy,
    attention_and_checkpointing,
    contrast,
    padded_steps,
    score_padded,
    score_pairs,
    steps_of_pairs,
)
from inverseq_kernels import contrastive_logprob
from torch import Tensor, nn

from inverseq.attention import ATTENTION_NAME, attention_layout
from inverseq.config import Config
from inverseq.engine import TorchEngine
from inverseq.model import FrozenPair, action_hidden, head_of
from inverseq.packing import FlatSamples, plan_packs, view_lengths, write_pack
from inverseq.policy import Policy
from inverseq.records import PackedViews, Sample, ScoredSamples, StepMetrics, TrainStep
from inverseq.steps import plan_steps
from inverseq.targets import score_targets
from inverseq.transfers import copied_ahead

__all__ = [
    "LADDER",
    "SCORERS",
    "TRAINERS",
    "Bench",
    "Rung",
    "Scorer",
    "Trainer",
    "ladder",
    "score",
    "train",
    "train_without_update",
]

POLICY_VIEW = (-1,)


@dataclass(slots=True)
class Bench:
    """What every variant works on."""

    config: Config
    policy: nn.Module  # a causal language model with packed attention
    frozen: FrozenPair
    samples: Sequence[Sample]
    num_valid_vocab: int
    engine: TorchEngine | None  # None: gradients only, no update

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device


class UnfusedPolicy(nn.Module):
    """π_θ with its loss over a pack, through logits in the model's dtype: of all rows, or of action rows only."""

    def __init__(self, model: nn.Module, *, all_rows: bool):
        super().__init__()
        self.model = model
        self.all_rows = all_rows

    def forward(
        self, pack: PackedViews, targets: Tensor, loss_weights: Tensor, denominator: float
    ) -> tuple[Tensor, Tensor]:
        """As ``Policy.forward``."""
        logits_AV = packed_logits(self.model, pack, all_rows=self.all_rows).float()
        logprobs = logits_AV.log_softmax(-1).gather(1, pack.token_ids[:, None])[:, 0]
        return (loss_weights * (targets - logprobs).square()).sum() / denominator, logprobs.detach()


def packed_logits(model: nn.Module, pack: PackedViews, *, all_rows: bool) -> Tensor:
    """Logits that predict the pack's actions under its last view, [A, V] in the model's dtype."""
    if all_rows:
        logits_TV = model(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            use_cache=False,
            layout=attention_layout(pack),
        ).logits[0]
        return logits_TV.index_select(0, pack.action_index[-1])
    head = head_of(model, model.get_output_embeddings().weight.shape[0])
    logits_AV = F.linear(action_hidden(model, pack)[-1], head.weight, head.bias)
    if head.softcap is not None:
        logits_AV = head.softcap * torch.tanh(logits_AV / head.softcap)
    return logits_AV / head.temperature if head.temperature != 1.0 else logits_AV


def score_packed_pairs(bench: Bench, *, all_rows: bool) -> ScoredSamples:
    """Two samples at a time without padding: two forwards, logits in the model's dtype."""
    model, flat = bench.frozen.plain, FlatSamples.of(bench.samples)

    def score(indices: range) -> tuple[Tensor, Tensor]:
        packs = [write_pack(flat, indices, (view,)).to(bench.device) for view in (0, -1)]
        better_AV, plain_AV = (packed_logits(model, pack, all_rows=all_rows) for pack in packs)
        return contrast(better_AV, plain_AV, packs[1].token_ids, bench.config.contrast.alpha)

    return score_pairs(bench.samples, score)


def score_fused_pairs(bench: Bench) -> ScoredSamples:
    """Two samples at a time without padding: two forwards, the fused operation."""
    flat = FlatSamples.of(bench.samples)
    return score_pairs(bench.samples, lambda indices: fused_contrast(bench, flat, indices)[1:])


def score_two_passes(bench: Bench) -> ScoredSamples:
    """Packs of up to ``score_tokens``: a forward for each view, the fused operation."""
    flat = FlatSamples.of(bench.samples)
    lengths = np.max([view_lengths(flat, (view,)) for view in (0, -1)], axis=0)
    plan = plan_packs(lengths, token_budget=bench.config.packing.score_tokens)
    offsets = np.concatenate([[0], np.cumsum(flat.responses.lengths)])
    targets, plain = torch.empty(int(offsets[-1])), torch.empty(int(offsets[-1]))
    with torch.inference_mode():
        for indices in plan.packs():
            pack, pack_targets, pack_plain = fused_contrast(bench, flat, indices)
            rows = pack.action_rows(offsets)
            targets[rows], plain[rows] = pack_targets.cpu(), pack_plain.cpu()
    return ScoredSamples(bench.samples, targets, plain, offsets)


def score_one_pass(bench: Bench) -> ScoredSamples:
    """Ours with the principle read anew for every sample."""
    config = replace(bench.config, packing=replace(bench.config.packing, share_prefix=False))
    return score_targets(bench.frozen, bench.samples, config, num_valid_vocab=bench.num_valid_vocab)


def fused_contrast(bench: Bench, flat: FlatSamples, indices: Sequence[int]) -> tuple[PackedViews, Tensor, Tensor]:
    """A pack of the plain view, and log π̂(y) and log π_l(y) of its actions, from a forward per view."""
    model = bench.frozen.plain
    packs = [write_pack(flat, indices, (view,)).to(bench.device) for view in (0, -1)]
    better_AD, plain_AD = (action_hidden(model, pack)[0] for pack in packs)
    head = head_of(model, bench.num_valid_vocab)
    targets, plain = contrastive_logprob(
        better_AD,
        head.weight,
        plain_AD,
        head.weight,
        packs[1].token_ids,
        bench.config.contrast.alpha,
        bias_w=head.bias,
        bias_l=head.bias,
        softcap=head.softcap,
        temperature=head.temperature,
        num_valid_vocab=head.num_valid_vocab,
        return_reference=True,
        **bench.config.engine.kernel_options(),
    )
    return packs[1], targets, plain


def pair_steps(bench: Bench, scored: ScoredSamples) -> list[TrainStep]:
    """Optimizer steps in packs of two samples, in data order."""
    flat = FlatSamples.of(bench.samples)
    size = bench.config.optim.samples_per_step
    return steps_of_pairs(scored, size, lambda indices: write_pack(flat, indices, POLICY_VIEW))


@dataclass(frozen=True, slots=True)
class Scorer:
    """One way to score; ``attention`` is the frozen model's while it runs."""

    run: Callable[[Bench], ScoredSamples]
    attention: str = ATTENTION_NAME


@dataclass(frozen=True, slots=True)
class Trainer:
    """One way to train: its micro-batches and its policy. ``recompute`` None: as the configuration says."""

    steps: Callable[[Bench, ScoredSamples], list[TrainStep]]
    policy: Callable[[Bench], nn.Module]
    recompute: bool | None = None
    attention: str = ATTENTION_NAME


@dataclass(frozen=True, slots=True)
class Rung:
    """One more thing switched on; names of its scorer and trainer."""

    switched_on: str
    scorer: str
    trainer: str


SCORERS = {
    "baseline": Scorer(
        lambda bench: score_padded(bench.frozen.plain, bench.samples, bench.config.contrast.alpha), attention="sdpa"
    ),
    "packed pairs": Scorer(lambda bench: score_packed_pairs(bench, all_rows=True)),
    "response rows": Scorer(lambda bench: score_packed_pairs(bench, all_rows=False)),
    "fused": Scorer(score_fused_pairs),
    "token budget": Scorer(score_two_passes),
    "one pass": Scorer(score_one_pass),
    "ours": Scorer(
        lambda bench: score_targets(bench.frozen, bench.samples, bench.config, num_valid_vocab=bench.num_valid_vocab)
    ),
}

TRAINERS = {
    "baseline": Trainer(
        lambda bench, scored: padded_steps(scored, bench.config.optim.samples_per_step),
        lambda bench: PaddedPolicy(bench.policy),
        recompute=True,
        attention="sdpa",
    ),
    "packed pairs": Trainer(pair_steps, lambda bench: UnfusedPolicy(bench.policy, all_rows=True), recompute=True),
    "kept activations": Trainer(pair_steps, lambda bench: UnfusedPolicy(bench.policy, all_rows=True)),
    "response rows": Trainer(pair_steps, lambda bench: UnfusedPolicy(bench.policy, all_rows=False)),
    "fused": Trainer(pair_steps, lambda bench: Policy(bench.policy, bench.num_valid_vocab, bench.config.engine)),
    "ours": Trainer(
        lambda bench, scored: plan_steps(scored, bench.config.optim, bench.config.packing),
        lambda bench: Policy(bench.policy, bench.num_valid_vocab, bench.config.engine),
    ),
}

LADDER = (
    Rung("paper-like baseline", "baseline", "baseline"),
    Rung("padding: none", "packed pairs", "packed pairs"),
    Rung("recomputation: only where memory asks for it", "packed pairs", "kept activations"),
    Rung("head rows: response tokens only", "response rows", "response rows"),
    Rung("kernels: fused operations for logits", "fused", "fused"),
    Rung("batch size: token budget for two samples", "token budget", "ours"),
    Rung("one-pass scoring: both views in one forward", "one pass", "ours"),
    Rung("shared principle: read once a pack", "ours", "ours"),
)


def ladder(shares_prefix: bool) -> tuple[Rung, ...]:
    """The rungs where our scoring shares a prefix or not; without, the last but one is ours already."""
    return LADDER if shares_prefix else (*LADDER[:-2], replace(LADDER[-2], scorer="ours"))


def score(bench: Bench, scorer: Scorer) -> ScoredSamples:
    """Targets of the bench's samples by one variant."""
    with attention_and_checkpointing(bench.frozen.plain, scorer.attention, False):
        return scorer.run(bench)


def train(bench: Bench, trainer: Trainer, steps: Sequence[TrainStep]) -> list[StepMetrics]:
    """Every optimizer step by one variant, through the shared engine."""
    bench.engine.policy = trainer.policy(bench)
    with attention_and_checkpointing(bench.policy, trainer.attention, recomputes(bench, trainer)):
        return [bench.engine.train_step(step) for step in steps]


def train_without_update(bench: Bench, trainer: Trainer, steps: Sequence[TrainStep]) -> list[float]:
    """The losses of every step after forward and backward; gradients are dropped instead of applied."""
    policy, losses = trainer.policy(bench).train(), []
    with attention_and_checkpointing(bench.policy, trainer.attention, recomputes(bench, trainer)):
        for step in steps:
            total = torch.zeros((), device=bench.device)
            for _, batch in copied_ahead(step.micro_batches, bench.device):
                loss, _ = policy(batch.pack, batch.targets, batch.loss_weights, step.denominator)
                loss.backward()
                total += loss.detach()
            losses.append(total)
            policy.zero_grad(set_to_none=True)
            if bench.engine is not None:
                bench.engine.zero_grad()  # where 16-bit gradients are summed
    return [loss.item() for loss in losses]


def recomputes(bench: Bench, trainer: Trainer) -> bool:
    return bench.config.model.gradient_checkpointing if trainer.recompute is None else trainer.recompute
