"""Regression targets: the superior policy's log-probability of every sampled token, from two frozen distributions.

    log π̂(· | y_<t, x) = log_softmax( α log π_w(· | y_<t, x) + (1 − α) log π_l(· | y_<t, x) )

With shared weights both views of a sample stand in one pack and one forward serves both. Targets are one fp32
number per action token and stay on the host until their optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from inverseq_kernels import contrastive_logprob
from torch import Tensor

from .config import Config
from .model import FrozenPair, action_hidden, head_of
from .packing import FlatSamples, pack_views, plan_packs, view_lengths, write_pack
from .records import PackedViews, Sample, ScoredSamples

__all__ = ["score_targets"]


def score_targets(
    frozen: FrozenPair,
    samples: Sequence[Sample],
    config: Config,
    *,
    num_valid_vocab: int,
    advance: Callable[[int], None] = lambda num_samples: None,
) -> ScoredSamples:
    """Score every action of the samples: log π̂(y_t) and log π_l(y_t), fp32 [A] on the host, in sample order.

    ``advance`` is called with the number of samples a pack held after each pack.
    """
    offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum([sample.num_actions for sample in samples], out=offsets[1:])
    targets_A = torch.full((int(offsets[-1]),), float("nan"))
    plain_A = torch.full((int(offsets[-1]),), float("nan"))
    score = _score_shared if frozen.shares_weights else _score_separate
    with torch.inference_mode():
        for rows, sample_count, pack_targets, pack_plain in score(frozen, samples, offsets, config, num_valid_vocab):
            targets_A[rows] = pack_targets.cpu()
            plain_A[rows] = pack_plain.cpu()
            advance(sample_count)
    if torch.isnan(plain_A).any() or torch.isnan(targets_A).any():
        raise ArithmeticError("a frozen model gave log-probabilities that are not numbers")
    return ScoredSamples(samples, targets_A, plain_A, offsets)


def _score_shared(frozen, samples, offsets, config: Config, num_valid_vocab: int) -> Iterator:
    device = next(frozen.parameters()).device
    num_views = len(samples[0].rendered.prefix_ids) if samples else 1
    packs = pack_views(
        samples,
        tuple(range(num_views)),
        token_budget=config.packing.score_tokens,
        share_prefix=config.packing.share_prefix,
        num_valid_vocab=num_valid_vocab,
    )
    for pack in packs:
        hidden_VAD = action_hidden(frozen.plain, pack.to(device))
        yield _contrast(frozen, hidden_VAD[0], hidden_VAD[-1], pack, offsets, config, num_valid_vocab)


def _score_separate(frozen, samples, offsets, config: Config, num_valid_vocab: int) -> Iterator:
    device = next(frozen.parameters()).device
    num_views = len(samples[0].rendered.prefix_ids) if samples else 1
    lengths = np.max([view_lengths(samples, (view,)) for view in range(num_views)], axis=0)
    plan = plan_packs(lengths, token_budget=config.packing.score_tokens)
    flat, share_prefix = FlatSamples.of(samples), config.packing.share_prefix
    for indices in plan.packs():
        better_pack, plain_pack = (
            write_pack(flat, indices, (view,), share_prefix=share_prefix, num_valid_vocab=num_valid_vocab)
            for view in (0, num_views - 1)
        )
        hidden_w = action_hidden(frozen.better, better_pack.to(device))[0]
        hidden_l = action_hidden(frozen.plain, plain_pack.to(device))[0]
        yield _contrast(frozen, hidden_w, hidden_l, plain_pack, offsets, config, num_valid_vocab)


def _contrast(frozen, hidden_w: Tensor, hidden_l: Tensor, pack: PackedViews, offsets, config: Config, num_valid_vocab):
    head_w, head_l = head_of(frozen.better, num_valid_vocab), head_of(frozen.plain, num_valid_vocab)
    if (head_w.softcap, head_w.temperature) != (head_l.softcap, head_l.temperature):
        raise ValueError(
            f"contrast.plain_model: the models shape their logits differently: softcap and temperature are "
            f"{(head_w.softcap, head_w.temperature)} and {(head_l.softcap, head_l.temperature)}"
        )
    targets, plain = contrastive_logprob(
        hidden_w,
        head_w.weight,
        hidden_l,
        head_l.weight,
        pack.token_ids.to(hidden_l.device),
        config.contrast.alpha,
        bias_w=head_w.bias,
        bias_l=head_l.bias,
        softcap=head_l.softcap,
        temperature=head_l.temperature,
        num_valid_vocab=head_l.num_valid_vocab,
        return_reference=True,
        **config.engine.kernel_options(),
    )
    return pack.action_rows(offsets), len(pack.sample_index.unique()), targets, plain

