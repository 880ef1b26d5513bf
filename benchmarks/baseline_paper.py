"""The paper-like trainer that epoch_time.py compares with: the same mathematics as usually written. Frozen.

Micro-batches of two samples in data order, padded on the right to the longer of the two; logits of every position in
the model's dtype; three separate forwards of a sample (better view, plain view, policy); activation checkpointing;
PyTorch's fused attention. Padding stands on the right, so causal attention needs no mask and the flash kernels serve.
No handicap beyond that: only rows of response tokens are turned into fp32 log-probabilities, and the update is
``TorchEngine``'s, with the same optimizer, accumulation and dtype as ours. It changes only to mend an error, because
speed-ups over time are quoted against it. It gives our targets, loss and gradients up to rounding (a test).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inverseq.model import enable_gradient_checkpointing
from inverseq.records import MicroBatch, Sample, ScoredSamples, TrainStep
from inverseq.transfers import copied_to

__all__ = [
    "MICRO_BATCH",
    "PaddedBatch",
    "PaddedPolicy",
    "attention_and_checkpointing",
    "contrast",
    "pad_samples",
    "padded_steps",
    "score_padded",
    "score_pairs",
    "steps_of_pairs",
]

MICRO_BATCH = 2
DEVICE_FIELDS = ("input_ids", "batch_index", "position", "token_ids")


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A micro-batch padded on the right, and where its response tokens are predicted."""

    input_ids: Tensor  # [B, L] int64
    batch_index: Tensor  # [A] int64
    position: Tensor  # [A] int64, whose logits predict the token
    token_ids: Tensor  # [A] int64
    num_real_tokens: int

    def device_tensors(self) -> list[Tensor]:
        """What a forward reads on the device."""
        return [getattr(self, name) for name in DEVICE_FIELDS]

    def to(self, device: torch.device | str) -> PaddedBatch:
        """The same batch on ``device``."""
        return replace(self, **{name: copied_to(getattr(self, name), device) for name in DEVICE_FIELDS})


def pad_samples(samples: Sequence[Sample], view: int) -> PaddedBatch:
    """Samples under one view, padded to the longest; the last response token predicts nothing and is not fed."""
    rows = []
    for sample in samples:
        before = [sample.rendered.prefix_ids[view], sample.rendered.prompt_ids]
        rows.append(torch.from_numpy(np.concatenate([*before, sample.response.token_ids[:-1]]).astype(np.int64)))
    counts = torch.tensor([sample.num_actions for sample in samples])
    return PaddedBatch(
        input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True),
        batch_index=torch.arange(len(rows)).repeat_interleave(counts),
        position=torch.cat(
            [torch.arange(len(row) - count, len(row)) for row, count in zip(rows, counts.tolist(), strict=True)]
        ),
        token_ids=torch.from_numpy(np.concatenate([s.response.token_ids for s in samples]).astype(np.int64)),
        num_real_tokens=sum(map(len, rows)),
    )


def action_logits(model: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """Logits that predict response tokens, [A, V] in the model's dtype, taken from those of all positions."""
    logits_BLV = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits_BLV[batch.batch_index, batch.position]


def contrast(better_AV: Tensor, plain_AV: Tensor, token_ids: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log π̂(y) and log π_l(y) from logits, both [A] fp32; normalisers of π_w and π_l cancel in π̂."""
    plain_AV = plain_AV.float()
    superior_AV = (alpha * better_AV.float() + (1 - alpha) * plain_AV).log_softmax(-1)
    labels = token_ids[:, None]
    return superior_AV.gather(1, labels)[:, 0], plain_AV.log_softmax(-1).gather(1, labels)[:, 0]


def score_pairs(
    samples: Sequence[Sample], score: Callable[[range], tuple[Tensor, Tensor]], *, size: int = MICRO_BATCH
) -> ScoredSamples:
    """Score two samples at a time; ``score(indices)`` gives log π̂(y) and log π_l(y) of their actions in order."""
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)]).astype(np.int64)
    with torch.inference_mode():
        parts = [score(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
        targets, plain = (torch.cat([part[k] for part in parts]).cpu() for k in (0, 1))
    return ScoredSamples(samples, targets, plain, offsets)


def score_padded(model: PreTrainedModel, samples: Sequence[Sample], alpha: float) -> ScoredSamples:
    """The targets of all samples: two forwards for every two samples."""

    def score(indices: range) -> tuple[Tensor, Tensor]:
        pair = [samples[i] for i in indices]
        batches = [pad_samples(pair, view).to(model.device) for view in (0, -1)]
        better_AV, plain_AV = (action_logits(model, batch) for batch in batches)
        return contrast(better_AV, plain_AV, batches[1].token_ids, alpha)

    return score_pairs(samples, score)


def steps_of_pairs(
    scored: ScoredSamples, samples_per_step: int, make_batch: Callable[[range], object], *, size: int = MICRO_BATCH
) -> list[TrainStep]:
    """Optimizer steps whose micro-batches hold two samples each, in data order."""
    steps, count = [], len(scored.samples)
    for first in range(0, count, samples_per_step):
        last = min(first + samples_per_step, count)
        pairs = [range(i, min(i + size, last)) for i in range(first, last, size)]
        rows = [slice(int(scored.offsets[pair.start]), int(scored.offsets[pair.stop])) for pair in pairs]
        num_actions = sum(r.stop - r.start for r in rows)
        steps.append(
            TrainStep(
                micro_batches=[
                    MicroBatch(
                        make_batch(pair), scored.targets[r], scored.plain_logprobs[r], torch.ones(r.stop - r.start)
                    )
                    for pair, r in zip(pairs, rows, strict=True)
                ],
                denominator=float(num_actions),
                num_samples=last - first,
                num_tokens=0,
                num_actions=num_actions,
                num_packs=len(pairs),
                num_dummy_tokens=0,
                index=len(steps),
            )
        )
    return steps


def padded_steps(scored: ScoredSamples, samples_per_step: int) -> list[TrainStep]:
    """The optimizer steps of an epoch in padded micro-batches of the policy's view."""
    samples = scored.samples
    return steps_of_pairs(scored, samples_per_step, lambda indices: pad_samples([samples[i] for i in indices], view=-1))


class PaddedPolicy(nn.Module):
    """π_θ with its loss over a padded micro-batch."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: PaddedBatch,
        targets: Tensor,  # [A] fp32
        loss_weights: Tensor,  # [A] fp32
        denominator: float,
    ) -> tuple[Tensor, Tensor]:
        """Σ weight (log π̂ − log π_θ)² / denominator (fp32 scalar), and log π_θ(y) [A] fp32 detached."""
        logits_AV = action_logits(self.model, batch).float()
        logprobs = logits_AV.log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
        return (loss_weights * (targets - logprobs).square()).sum() / denominator, logprobs.detach()


@contextmanager
def attention_and_checkpointing(model: PreTrainedModel, attention: str, checkpointing: bool) -> Iterator[None]:
    """The model with another attention and with or without activation checkpointing; then as it was before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    if checkpointing:
        enable_gradient_checkpointing(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        if checkpointing:
            name = "activation_checkpointing_disable"  # transformers renamed it in 5.2x
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()
